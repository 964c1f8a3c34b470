"""What detectors write: measurements (raw values per image) and scores (one row per image)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from farout.core.errors import FaroutError, StoreError
from farout.detectors.plots import draw_score_histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Measurements", "Scores"]

_GRID_COLUMNS = ["key", "level", "draw", "metric", "value"]


@dataclass
class Measurements:
    """Raw values of images, from which every score is made.

    keys: B image keys; values: float32 (B, level, draw, metric) with the names of levels and metrics beside it; or
    vectors: named float32 tensors (B, d). maps: per-pixel values (B, H, W) where they were asked for, and pictures
    (B, C, H, W) in [0, 1] by name, or maps (B, 1, H, W) where the detector's `map_pictures` names them; pictures whose
    name begins with _ are for the method alone. None of these is stored.
    """

    keys: tuple[str, ...]
    values: Tensor | None = None
    levels: tuple[float, ...] = ()
    metrics: tuple[str, ...] = ()
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    maps: Tensor | None = None
    pictures: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @staticmethod
    def join(parts: Sequence[Measurements]) -> Measurements:
        """One after the other; maps and pictures are joined where all parts have them."""
        first = parts[0]
        keys = tuple(key for part in parts for key in part.keys)
        grids = [part.values for part in parts if part.values is not None]
        vectors = {name: torch.cat([part.vectors[name] for part in parts]) for name in first.vectors}
        maps = [part.maps for part in parts if part.maps is not None]
        pictures = {name: torch.cat([part.pictures[name] for part in parts]) for name in first.pictures}
        return Measurements(
            keys,
            torch.cat(grids) if grids else None,
            first.levels,
            first.metrics,
            vectors,
            torch.cat(maps) if len(maps) == len(parts) else None,
            pictures,
        )

    def select(self, index: Sequence[int]) -> Measurements:
        """The measurements of some images, in the given order, without maps and pictures."""
        rows = torch.tensor(list(index), dtype=torch.long)
        values = None if self.values is None else self.values[rows]
        vectors = {name: vector[rows] for name, vector in self.vectors.items()}
        return Measurements(tuple(self.keys[i] for i in index), values, self.levels, self.metrics, vectors)

    def finite(self) -> Tensor:
        """Whether all values of an image are numbers, (B,) bool."""
        flat = [] if self.values is None else [self.values.flatten(1)]
        whole = torch.cat([*flat, *[vector.flatten(1) for vector in self.vectors.values()]], dim=1)
        return torch.isfinite(whole).all(1)

    def to_table(self) -> pa.Table:
        """Long form (key, level, draw, metric, value), or one row per image with a list per vector."""
        if self.values is None:
            lists = {name: list(vector.numpy()) for name, vector in self.vectors.items()}
            types = [("key", pa.string()), *[(name, pa.list_(pa.float32())) for name in lists]]
            return pa.table({"key": list(self.keys), **lists}, schema=pa.schema(types))
        count, levels, draws, metrics = self.values.shape
        inner = levels * draws * metrics
        columns: dict[str, Any] = {
            "key": pa.array(np.repeat(np.array(self.keys, dtype=object), inner), pa.string()),
            "level": np.tile(np.repeat(np.array(self.levels, dtype=np.float64), draws * metrics), count),
            "draw": np.tile(np.repeat(np.arange(draws, dtype=np.int32), metrics), count * levels),
            "metric": pa.array(np.tile(np.array(self.metrics, dtype=object), count * levels * draws), pa.string()),
            "value": self.values.numpy().astype(np.float32).reshape(-1),
        }
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table) -> Measurements:
        """Reads `to_table`; raises StoreError for a table of another form."""
        if table.column_names != _GRID_COLUMNS:
            return cls._from_vectors(table)
        keys = list(dict.fromkeys(table["key"].to_pylist()))
        levels = tuple(dict.fromkeys(table["level"].to_pylist()))
        metrics = tuple(dict.fromkeys(table["metric"].to_pylist()))
        value = np.array(table["value"].to_numpy(), dtype=np.float32)
        cells = len(keys) * len(levels) * len(metrics)
        if cells == 0 or len(value) % cells:
            raise StoreError(f"measurements hold {len(value)} values for {len(keys)} images; the table is incomplete")
        shape = (len(keys), len(levels), -1, len(metrics))
        return cls(tuple(keys), torch.from_numpy(value.reshape(shape)), levels, metrics)

    @classmethod
    def _from_vectors(cls, table: pa.Table) -> Measurements:
        if "key" not in table.column_names:
            raise StoreError(f"measurements require a column 'key', this table has {table.column_names}")
        keys = tuple(table["key"].to_pylist())
        vectors = {name: _matrix(table[name], len(keys)) for name in table.column_names if name != "key"}
        return cls(keys, vectors=vectors)

    def write(self, path: Path) -> None:
        """Writes the table as parquet."""
        pq.write_table(self.to_table(), path, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> Measurements:
        """Reads a parquet table; raises StoreError when it is missing or damaged."""
        if not path.is_file():
            raise StoreError(f"{path} is missing; the folder is incomplete")
        try:
            # by default, older versions add a column for each folder of the path that is named like `seed=0`
            return cls.from_table(pq.read_table(path, partitioning=None))
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreError(f"{path} cannot be read as parquet ({error})") from error


def _matrix(column: pa.ChunkedArray, count: int) -> Tensor:
    """A column of lists of one length as (count, d) float32; raises StoreError where they differ."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if count == 0 or len(flat) % count:
        raise StoreError(f"measurements hold {len(flat)} values for {count} images; the table is incomplete")
    return torch.from_numpy(flat.reshape(count, -1).copy())


@dataclass
class Scores:
    """One row per image, in the order of the source.

    keys; score: float64 (B,), higher = further out, NaN where there is none; p_value: float64 (B,); is_ood: bool (B,),
    False where there is no score (see `status`); status: `ok`, `unreadable` or `not a number`; indicators: every other
    score of the method by name, float64 (B,).
    """

    keys: tuple[str, ...]
    score: np.ndarray
    p_value: np.ndarray
    is_ood: np.ndarray
    status: tuple[str, ...]
    indicators: Mapping[str, np.ndarray]
    measurements: Measurements | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"Scores({self._summary()})"

    def _repr_html_(self) -> str:
        """HTML for notebooks: counts, and the first rows of the table."""
        rows = self.to_frame().head(10)
        table = rows.to_html(index=False, float_format=lambda value: f"{value:.4g}", na_rep="", border=0)
        more = f"<p>… {len(self) - len(rows)} more rows</p>" if len(self) > len(rows) else ""
        return f"<p>{self._summary()}</p>{table}{more}"

    def _summary(self) -> str:
        counts = Counter(status for status in self.status if status != "ok")
        parts = [f"{len(self)} images", f"{int(self.is_ood.sum())} flagged"]
        return ", ".join(parts + [f"{count} {status}" for status, count in sorted(counts.items())])

    @property
    def threshold(self) -> float:
        """Score above which images are flagged, as far as these images tell: midway between the highest score that is
        not flagged and the lowest that is; infinite if no image is flagged.
        """
        flagged = self.score[self.is_ood]
        others = self.score[~self.is_ood & ~np.isnan(self.score)]
        if not len(flagged):
            return math.inf
        return float((flagged.min() + others.max()) / 2 if len(others) else flagged.min())

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a histogram of the scores with the threshold above which images are flagged.

        Args:
            axes: matplotlib axes to draw on; None: a new figure.
        """
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.subplots()[1]
        draw_score_histogram(axes, {f"{int(np.isfinite(self.score).sum())} images": self.score}, self.threshold)
        return axes

    def to_frame(self) -> pd.DataFrame:
        """The table of `scores.csv`; `is_ood` is empty where there is no score."""
        scored = np.array([status == "ok" for status in self.status], dtype=bool)
        flags = pd.array(np.where(scored, self.is_ood, False), dtype="boolean")
        flags[~scored] = pd.NA
        columns = {
            "key": list(self.keys),
            "score": self.score,
            "p_value": self.p_value,
            "is_ood": flags,
            "status": list(self.status),
        }
        return pd.DataFrame({**columns, **dict(self.indicators)})

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Scores:
        """Reads `to_frame`, or any table with columns `key` and `score`; what is missing is filled in as unknown."""
        if not {"key", "score"} <= set(frame.columns):
            raise FaroutError(f"a score table requires columns key and score, this one has {list(frame.columns)}")
        score = frame["score"].to_numpy(dtype=np.float64)
        known = {"key", "score", "p_value", "is_ood", "selected", "status"}
        p_value = frame["p_value"].to_numpy(dtype=np.float64) if "p_value" in frame else np.full(len(frame), np.nan)
        is_ood = frame["is_ood"].isin([True, "True"]) if "is_ood" in frame else False
        status = frame["status"] if "status" in frame else np.where(np.isnan(score), "not a number", "ok")
        others = [name for name in frame.columns if name not in known and pd.api.types.is_numeric_dtype(frame[name])]
        indicators = {name: frame[name].to_numpy(dtype=np.float64) for name in others}
        flags = np.broadcast_to(np.asarray(is_ood, dtype=bool), len(frame))
        return cls(tuple(frame["key"].astype(str)), score, p_value, flags, tuple(status), indicators)

    @staticmethod
    def join(parts: Sequence[Scores]) -> Scores:
        """One after the other; raises FaroutError when there are none."""
        if not parts:
            raise FaroutError("there was nothing to score")
        names = list(parts[0].indicators)
        measured = [part.measurements for part in parts if part.measurements is not None]
        return Scores(
            tuple(key for part in parts for key in part.keys),
            np.concatenate([part.score for part in parts]),
            np.concatenate([part.p_value for part in parts]),
            np.concatenate([part.is_ood for part in parts]),
            tuple(status for part in parts for status in part.status),
            {name: np.concatenate([part.indicators[name] for part in parts]) for name in names},
            Measurements.join(measured) if measured else None,
        )

    @staticmethod
    def with_gaps(keys: tuple[str, ...], scores: Scores | None, names: Sequence[str]) -> Scores:
        """The scores joined to all keys; images that could not be read have none and are never normal."""
        have = scores.keys if scores is not None else ()
        rows = {key: row for row, key in enumerate(have)}
        index = np.array([rows.get(key, -1) for key in keys], dtype=int)

        def place(values: np.ndarray | None, empty: Any) -> np.ndarray:
            padded = np.append(values if values is not None else [], empty)
            return padded[index]

        status = tuple(scores.status[i] if scores is not None and i >= 0 else "unreadable" for i in index)
        return Scores(
            keys,
            place(None if scores is None else scores.score, np.nan),
            place(None if scores is None else scores.p_value, np.nan),
            place(None if scores is None else scores.is_ood, False).astype(bool),
            status,
            {name: place(None if scores is None else scores.indicators[name], np.nan) for name in names},
            None if scores is None else scores.measurements,
        )
