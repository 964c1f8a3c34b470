"""What detectors return: measurements (raw values per image) and scores (one row per image)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from farout.core.errors import FaroutError, StoreError
from farout.core.files import open_regular_file
from farout.core.notebook import render_table
from farout.detectors.plots import draw_score_histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PARQUET_SETTINGS", "Measurements", "Scores"]

_GRID_COLUMNS = ["key", "level", "draw", "metric", "value"]
PARQUET_SETTINGS: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["key", "level", "draw", "metric"]}
"""How tables of measurements are written: dictionaries of measured values, which hardly repeat, take time and space."""


@dataclass
class Measurements:
    """What the networks compute about images: everything that their scores depend on.

    Either `values` with `levels` and `metrics`, or `vectors`. Maps and pictures are for reports; they are not saved.

    Attributes:
        keys: B image keys.
        values: float32 (B, level, draw, metric).
        levels: the noise levels of `values`.
        metrics: the names of the metrics of `values`.
        vectors: float32 tensors (B, d) by name.
        maps: heat maps (B, H, W).
        pictures: by name, images (B, C, H, W) in [0, 1], or the maps (B, 1, H, W) that `HeatMaps.pictures` names.
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
        """Concatenate measurements of one method, without maps and pictures."""
        first = parts[0]
        values = [part.values for part in parts if part.values is not None]
        return Measurements(
            keys=tuple(key for part in parts for key in part.keys),
            values=torch.cat(values) if values else None,
            levels=first.levels,
            metrics=first.metrics,
            vectors={name: torch.cat([part.vectors[name] for part in parts]) for name in first.vectors},
        )

    def select(self, indices: Sequence[int]) -> Measurements:
        """The measurements of some images, in the given order, without maps and pictures."""
        rows = torch.tensor(list(indices), dtype=torch.long)
        return Measurements(
            keys=tuple(self.keys[i] for i in indices),
            values=None if self.values is None else self.values[rows],
            levels=self.levels,
            metrics=self.metrics,
            vectors={name: vector[rows] for name, vector in self.vectors.items()},
        )

    def is_finite(self) -> Tensor:
        """Whether all values of an image are numbers, (B,) bool."""
        columns = [*self.vectors.values()] if self.values is None else [self.values, *self.vectors.values()]
        return torch.isfinite(torch.cat([column.flatten(1) for column in columns], dim=1)).all(1)

    def to_table(self) -> pa.Table:
        """Convert to the long form (key, level, draw, metric, value), or one row per image with a list per vector."""
        if self.values is None:
            vectors = {name: list(vector.numpy()) for name, vector in self.vectors.items()}
            types = [("key", pa.string()), *((name, pa.list_(pa.float32())) for name in vectors)]
            return pa.table({"key": list(self.keys), **vectors}, schema=pa.schema(types))
        count, levels, draws, metrics = self.values.shape
        per_image = levels * draws * metrics
        columns: dict[str, Any] = {
            "key": pa.array(np.repeat(np.array(self.keys, dtype=object), per_image), pa.string()),
            "level": np.tile(np.repeat(np.array(self.levels, dtype=np.float64), draws * metrics), count),
            "draw": np.tile(np.repeat(np.arange(draws, dtype=np.int32), metrics), count * levels),
            "metric": pa.array(np.tile(np.array(self.metrics, dtype=object), count * levels * draws), pa.string()),
            "value": self.values.numpy().astype(np.float32).reshape(-1),
        }
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table) -> Measurements:
        """Convert back from `to_table`; raises StoreError for a table of another form."""
        if "key" not in table.column_names:
            raise StoreError(f"measurements require a column 'key', this table has {table.column_names}")
        keys = tuple(dict.fromkeys(table["key"].to_pylist()))
        if table.column_names != _GRID_COLUMNS:
            vectors = {}
            for name in table.column_names:
                if name != "key":
                    column = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                    if not keys or len(column) % len(keys):
                        raise StoreError(
                            f"measurements contain {len(column)} values for {len(keys)} images; the table is incomplete"
                        )
                    vectors[name] = torch.from_numpy(column.astype(np.float32).reshape(len(keys), -1))
            return cls(keys, vectors=vectors)
        levels = tuple(dict.fromkeys(table["level"].to_pylist()))
        metrics = tuple(dict.fromkeys(table["metric"].to_pylist()))
        value = np.array(table["value"].to_numpy(), dtype=np.float32)
        cells = len(keys) * len(levels) * len(metrics)
        if cells == 0 or len(value) % cells:
            raise StoreError(
                f"measurements contain {len(value)} values for {len(keys)} images; the table is incomplete"
            )
        return cls(keys, torch.from_numpy(value.reshape(len(keys), len(levels), -1, len(metrics))), levels, metrics)

    def write_parquet(self, path: Path) -> None:
        """Write the table as parquet."""
        with path.open("wb") as file:  # pyarrow opens only paths in UTF-8
            pq.write_table(self.to_table(), file, **PARQUET_SETTINGS)

    @classmethod
    def read_parquet(cls, path: Path, keys: Collection[str] | None = None) -> Measurements:
        """Read a parquet table.

        Args:
            path: the file.
            keys: images to be read, in the order of the file; one row group at a time is in memory. None: all images.

        Raises:
            StoreError: the file is missing or damaged.
        """
        with _parquet_errors(path), open_regular_file(path) as file:
            return cls.from_table(pq.read_table(file) if keys is None else _read_rows(pq.ParquetFile(file), keys))

    @classmethod
    def read_consecutive(cls, path: Path, keys: Iterable[Collection[str]]) -> Iterator[Measurements | None]:
        """Yield the measurements of sets of images one after the other; None for an empty set.

        Few row groups are in memory at a time.

        Args:
            path: the file of a parquet table.
            keys: for each set the keys of its images, which follow those of the set before in the file.

        Raises:
            StoreError: the file is missing or damaged.
        """
        with _parquet_errors(path), open_regular_file(path) as file:
            parquet = pq.ParquetFile(file)
            groups, rows = iter(range(parquet.num_row_groups)), parquet.schema_arrow.empty_table()
            for selected in keys:
                # an image may have many rows: those of the last one are complete where the next image begins
                while pc.count_distinct(rows["key"]).as_py() <= len(selected):
                    group = next(groups, None)
                    if group is None:
                        break
                    rows = pa.concat_tables([rows, parquet.read_row_group(group)])
                is_selected = pc.is_in(rows["key"], value_set=pa.array(list(selected), pa.string()))
                found, rows = rows.filter(is_selected), rows.filter(pc.invert(is_selected))
                yield cls.from_table(found) if len(found) else None


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """Convert what a missing or broken table of measurements raises to a StoreError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; the folder is incomplete") from None
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    except (pa.ArrowException, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StoreError(f"{path} cannot be read as a table of measurements ({reason})") from error


def _read_rows(file: pq.ParquetFile, keys: Collection[str]) -> pa.Table:
    """The rows of some images; row groups without any of them are not read, except for their keys."""
    selected, parts = pa.array(sorted(keys), pa.string()), []
    for group in range(file.num_row_groups):
        is_selected = pc.is_in(file.read_row_group(group, columns=["key"])["key"], value_set=selected)
        if pc.any(is_selected).as_py():
            parts.append(file.read_row_group(group).filter(is_selected))
    return pa.concat_tables(parts) if parts else file.schema_arrow.empty_table()


@dataclass
class Scores:
    """One row per image, in the order of the source.

    Attributes:
        keys: B image keys.
        score: float64 (B,), higher = more anomalous, NaN where there is none.
        p_value: float64 (B,), NaN where there is no score.
        is_ood: bool (B,), whether p_value <= alpha; False where there is no score, see `status`.
        status: `ok`, `unreadable` or `not a number`.
        indicators: every score of the method by name, float64 (B,).
        measurements: what the scores were computed from.
        calibration: scores of the detector's calibration images, sorted; None if unknown, as for a table of a file.
        calibration_threshold: score above which images are flagged, infinite if the calibration is too small to flag
            any; None if unknown.
    """

    keys: tuple[str, ...]
    score: np.ndarray
    p_value: np.ndarray
    is_ood: np.ndarray
    status: tuple[str, ...]
    indicators: Mapping[str, np.ndarray]
    measurements: Measurements | None = None
    calibration: np.ndarray | None = None
    calibration_threshold: float | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"Scores({self._summary()})"

    def _repr_html_(self) -> str:
        """HTML for notebooks: counts, and the rows with the highest scores."""
        rows = self.to_frame().sort_values(["score", "key"], ascending=[False, True]).head(10)
        scored = int(np.isfinite(self.score).sum())
        caption = f"<p>{len(rows)} highest of {scored} scores</p>" if scored > len(rows) else ""
        return f"<p>{self._summary()}</p>{caption}{render_table(rows, '.4g')}"

    def _summary(self) -> str:
        counts = Counter(status for status in self.status if status != "ok")
        parts = [f"{len(self)} images", f"{int(self.is_ood.sum())} flagged"]
        return ", ".join(parts + [f"{count} {status}" for status, count in sorted(counts.items())])

    @property
    def threshold(self) -> float:
        """Score above which images are flagged.

        If the detector's threshold is unknown, it is estimated from the flags: midway between the highest score that is
        not flagged and the lowest that is; infinite if no image is flagged.
        """
        if self.calibration_threshold is not None:
            return self.calibration_threshold
        flagged = self.score[self.is_ood]
        others = self.score[~self.is_ood & ~np.isnan(self.score)]
        if not len(flagged):
            return math.inf
        return float((flagged.min() + others.max()) / 2 if len(others) else flagged.min())

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a histogram of the scores, with those of the calibration images if they are known, and the threshold.

        Args:
            axes: matplotlib axes to draw on; None: a new figure.
        """
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.subplots()[1]
        samples = {f"{int(np.isfinite(self.score).sum())} scored images": self.score}
        if self.calibration is not None:
            samples = {f"{len(self.calibration)} calibration images": self.calibration, **samples}
        draw_score_histogram(axes, samples, self.threshold)
        return axes

    def to_frame(self) -> pd.DataFrame:
        """Convert to the table of `scores.csv`; `is_ood` is empty where there is no score."""
        has_score = np.array(self.status, dtype=object) == "ok"
        is_ood = pd.array(np.where(has_score, self.is_ood, False), dtype="boolean")
        is_ood[~has_score] = pd.NA
        columns = {
            "key": list(self.keys),
            "score": self.score,
            "p_value": self.p_value,
            "is_ood": is_ood,
            "status": list(self.status),
        }
        return pd.DataFrame({**columns, **self.indicators})

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Scores:
        """Convert back from `to_frame`, or from any table with columns `key` and `score`."""
        if not {"key", "score"} <= set(frame.columns):
            raise FaroutError(f"a score table requires columns key and score, this one has {list(frame.columns)}")
        score = frame["score"].to_numpy(dtype=np.float64)
        p_value = frame["p_value"].to_numpy(dtype=np.float64) if "p_value" in frame else np.full(len(frame), np.nan)
        is_ood = frame["is_ood"].isin([True, "True"]) if "is_ood" in frame else np.zeros(len(frame))
        status = frame["status"] if "status" in frame else np.where(np.isnan(score), "not a number", "ok")
        known = {"time", "key", "score", "p_value", "is_ood", "selected", "status", "reason", "file_version"}
        others = [name for name in frame.columns if name not in known and pd.api.types.is_numeric_dtype(frame[name])]
        indicators = {name: frame[name].to_numpy(dtype=np.float64) for name in others}
        keys = tuple(frame["key"].astype(str))
        return cls(keys, score, p_value, np.asarray(is_ood, dtype=bool), tuple(status), indicators)

    @staticmethod
    def empty(indicators: Iterable[str]) -> Scores:
        """A table without rows."""
        none = np.zeros(0)
        return Scores((), none, none, none.astype(bool), (), dict.fromkeys(indicators, none))

    @staticmethod
    def join(parts: Sequence[Scores]) -> Scores:
        """Concatenate tables of one detector."""
        measurements = [part.measurements for part in parts if part.measurements is not None]
        return Scores(
            keys=tuple(key for part in parts for key in part.keys),
            score=np.concatenate([part.score for part in parts]),
            p_value=np.concatenate([part.p_value for part in parts]),
            is_ood=np.concatenate([part.is_ood for part in parts]),
            status=tuple(status for part in parts for status in part.status),
            indicators={
                name: np.concatenate([part.indicators[name] for part in parts]) for name in parts[0].indicators
            },
            measurements=Measurements.join(measurements) if measurements else None,
            calibration=parts[-1].calibration,
            calibration_threshold=parts[-1].calibration_threshold,
        )

    def select(self, indices: Sequence[int] | np.ndarray) -> Scores:
        """The rows at `indices`, in this order; with the measurements if there is one for every row."""
        rows = np.asarray(indices, dtype=np.int64)
        measurements = self.measurements
        if measurements is not None:
            measurements = measurements.select(rows.tolist()) if measurements.keys == self.keys else None
        return Scores(
            keys=tuple(self.keys[row] for row in rows),
            score=self.score[rows],
            p_value=self.p_value[rows],
            is_ood=self.is_ood[rows],
            status=tuple(self.status[row] for row in rows),
            indicators={name: value[rows] for name, value in self.indicators.items()},
            measurements=measurements,
            calibration=self.calibration,
            calibration_threshold=self.calibration_threshold,
        )

    def reindex(self, keys: tuple[str, ...]) -> Scores:
        """The rows of `keys`, in this order; images without a row were unreadable and are never normal."""
        if keys == self.keys:
            return self
        rows = {key: row for row, key in enumerate(self.keys)}
        indices = np.array([rows.get(key, -1) for key in keys], dtype=int)  # -1: the row that is appended
        return Scores(
            keys=keys,
            score=np.append(self.score, np.nan)[indices],
            p_value=np.append(self.p_value, np.nan)[indices],
            is_ood=np.append(self.is_ood, False)[indices],
            status=tuple((*self.status, "unreadable")[i] for i in indices),
            indicators={name: np.append(value, np.nan)[indices] for name, value in self.indicators.items()},
            measurements=self.measurements,
            calibration=self.calibration,
            calibration_threshold=self.calibration_threshold,
        )
