"""Scoring a source into a folder: streamed, in bounded memory, resumable, and after an interruption the same bytes."""

from __future__ import annotations

import hashlib
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from farout.core import store
from farout.core.errors import FaroutError, StoreError, TrapWarning, UnreadableImageError
from farout.core.progress import Task, task
from farout.data.image_source import ImageSource, Policy
from farout.data.preprocessing import check_against
from farout.detectors.base import Detector, Measurements, Scores
from farout.detectors.calibration import benjamini_hochberg, check_scores
from farout.report.score_page import write_score_page

__all__ = ["ScoredFolder", "read_scores", "score_folder"]

_PART = 256
_PLAN, _PARTS, _MANIFEST = "plan.json", "parts", "manifest.json"
_GAPS = ["", "nan", "NaN", "NA", "null", "None"]
"""What stands in a table for no number."""
_RESULTS = (_MANIFEST, "scores.csv", "measurements.parquet", "page.html")


@dataclass(frozen=True)
class ScoredFolder:
    """What `score_folder` wrote: counts of statuses, images flagged, and how many were measured in this call, and in
    how many seconds, page and tables not counted.
    """

    folder: Path
    counts: dict[str, int]
    flagged: int
    scored_now: int
    seconds: float


def score_folder(
    detector: Detector,
    images: Any,
    out: str | Path,
    *,
    limit: int | None = None,
    policy: Policy = "nan",
    furthest: int = 24,
    fdr: float | None = None,
) -> ScoredFolder:
    """Scores `images` into `out`: `scores.csv`, `measurements.parquet`, `manifest.json` and `page.html`.

    An interrupted run goes on where it stopped when called again with the same arguments.

    Args:
        detector: a fitted detector.
        images: any image source.
        out: folder of the results.
        limit: a seeded sample of this many images.
        policy: what becomes of an unreadable image: `nan` (listed, without score), `skip` or `raise`.
        furthest: images shown on the page.
        fdr: adds a column `selected`: images chosen by Benjamini-Hochberg at this false discovery rate.

    Raises:
        FaroutError: for a detector that is not fitted, fewer than 0 images shown, a rate that is not between 0 and 1.
        StoreError: when `out` holds the results of another detector, source or setting, other images of the same
            names included.
    """
    detector.check_fitted()
    if furthest < 0 or (fdr is not None and not 0 < fdr < 1):
        given = f"furthest is {furthest}, fdr is {fdr}"
        raise FaroutError(f"{given}; expected 0 images or more, and a rate between 0 and 1")
    source = detector.open(images, limit=limit, policy=policy)
    for trap in check_against(source, detector.preprocessing, fitted_grey=detector.provenance.get("grey", False)):
        warnings.warn(trap, TrapWarning, stacklevel=2)
    out = Path(out)
    _begin(out, _plan(detector, source, fdr))
    measured, started = 0, time.perf_counter()
    if not _finished(out):
        measured = _measure_parts(detector, source, out / _PARTS)
        seconds = time.perf_counter() - started
        manifest = _assemble(detector, source, out, fdr)
    else:
        seconds = 0.0
        manifest = store.read_json(out / _MANIFEST)
        _check_content(_contents(source), manifest["content"], out)
    if manifest.get("furthest") != furthest or not (out / "page.html").is_file():
        manifest["furthest"] = furthest
        write_score_page(detector, source, _read_table(out / "scores.csv"), manifest, out, highest=furthest)
        # the manifest comes last: where it is, the folder is finished
        store.write_json(out / _MANIFEST, manifest)
    shutil.rmtree(out / _PARTS, ignore_errors=True)
    return ScoredFolder(out, manifest["counts"], manifest["flagged"], measured, seconds)


def read_scores(path: str | Path) -> Scores:
    """Scores from a scored folder or from any `.csv` or `.parquet` table with columns key and score."""
    path = Path(path)
    file = path / "scores.csv" if path.is_dir() else path
    if not file.is_file():
        raise StoreError(f"there is no score table {file}")
    try:
        table = _read_table(file)
        return Scores.from_frame(table)
    except FaroutError as error:
        raise StoreError(f"{file}: {error}") from error
    except (ValueError, TypeError) as error:
        raise StoreError(f"{file} cannot be read as a score table ({error}); expected columns key and score") from error


def _read_table(file: Path) -> pd.DataFrame:
    if file.suffix == ".parquet":
        return pd.read_parquet(file)
    # a key may read "NA" or "007", and scores are to come back to the last bit
    gaps = {name: _GAPS for name in pd.read_csv(file, nrows=0).columns if name != "key"}
    return pd.read_csv(file, dtype={"key": str}, keep_default_na=False, na_values=gaps, float_precision="round_trip")


def _plan(detector: Detector, source: ImageSource, fdr: float | None) -> dict[str, Any]:
    """What decides the result; two runs into one folder must agree on it."""
    runtime = detector.runtime
    return {
        "detector": detector.fingerprint,
        "source": source.name,
        "policy": source.policy,
        "fdr": fdr,
        "images": len(source),
        "part": _PART,
        "keys": hashlib.sha256("\0".join(source.keys).encode()).hexdigest(),
        "runtime": {"device": runtime.device.partition(":")[0], "precision": runtime.precision},
    }


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Opens the folder; raises StoreError when something else is there, which is left as it is."""
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; give a folder for the results")
    if not (out / _PLAN).is_file():
        inside = out.iterdir() if out.is_dir() else ()
        others = sorted(path.name for path in inside if not path.name.startswith(f".{_PLAN}."))
        if others:
            raise StoreError(f"{out} is not empty ({', '.join(others[:3])}, …); give a new folder for the results")
        store.write_json(out / _PLAN, plan)
    known = store.read_json(out / _PLAN)
    differing = [
        f"{name}: {known.get(name)} before, {value} now" for name, value in plan.items() if known.get(name) != value
    ]
    if differing:
        raise StoreError(f"{out} holds another run ({'; '.join(differing)}); give a new folder or remove it")
    (out / _PARTS).mkdir(exist_ok=True)
    for name in (_PLAN, *_RESULTS):  # a killed run leaves its temporary files
        for left in out.glob(f".{name}.*"):
            left.unlink()


def _finished(out: Path) -> bool:
    return (out / _MANIFEST).is_file() and (out / "scores.csv").is_file()


def _contents(source: ImageSource) -> str:
    """What identifies the pixels of all parts."""
    return _digest(_content(source.subset(part)) for part in _spans(source))


def _spans(source: ImageSource) -> list[range]:
    return [range(start, min(start + _PART, len(source))) for start in range(0, len(source), _PART)]


def _content(part: ImageSource) -> str:
    """What identifies the pixels of one part: its content hashes."""
    return _digest(_hash_or_none(part, index) for index in range(len(part)))


def _hash_or_none(part: ImageSource, index: int) -> str:
    try:
        return part.content_hash(index)
    except UnreadableImageError:
        if part.policy == "raise":
            raise
        return "unreadable"


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _check_content(now: str, then: str, out: Path) -> None:
    if now != then:
        raise StoreError(f"{out} holds scores of other images of the same names; give a new folder or remove it")


def _measure_parts(detector: Detector, source: ImageSource, folder: Path) -> int:
    """Measures what has no part yet; returns the number of images measured."""
    missing = []
    for span in _spans(source):
        path = _part(folder, span.start)
        if path.is_file():
            known = store.read_json(path.with_suffix(".json"))["content"]
            _check_content(_content(source.subset(span)), known, folder.parent)
        else:
            missing.append(span)
    count = sum(map(len, missing))
    with task(f"scoring {source.name}", count) as bar:
        for span in missing:
            _measure_part(detector, source.subset(span), _part(folder, span.start), bar)
    return count


def _measure_part(detector: Detector, some: ImageSource, path: Path, bar: Task) -> None:
    size = detector.batch_size
    measured = []
    for start, batch in zip(range(0, len(some), size), detector.batches(some), strict=True):
        measured += [detector.measure(batch)] if batch.keys else []
        bar.advance(min(size, len(some) - start))
    table = Measurements.join(measured).to_table() if measured else None
    about = {"unreadable": some.unreadable, "empty": table is None, "content": _content(some)}
    store.write_json(path.with_suffix(".json"), about)
    with store.atomic_file(path) as temporary:
        if table is not None:
            pq.write_table(table, temporary, compression="zstd")


def _part(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.parquet"


def _assemble(detector: Detector, source: ImageSource, out: Path, fdr: float | None) -> dict[str, Any]:
    """Joins the parts to `measurements.parquet` (none where no image could be read) and `scores.csv`; returns the
    manifest.
    """
    unreadable: dict[str, str] = {}
    frames, contents = [], []
    with _Tables(out / "measurements.parquet") as tables:
        for scores, about in _read_parts(detector, source, out / _PARTS):
            unreadable |= about["unreadable"]
            contents.append(about["content"])
            frames.append(scores.to_frame())
            if scores.measurements is not None:
                tables.write(scores.measurements.to_table())
    frame = pd.concat([part for part in frames if len(part)] or frames[:1], ignore_index=True)
    if fdr is not None:
        frame.insert(4, "selected", benjamini_hochberg(frame["p_value"], fdr))
    check_scores(frame["score"].to_numpy(dtype=float)[frame["status"] != "unreadable"], source.name)
    with store.atomic_file(out / "scores.csv") as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")
    return {
        **_plan(detector, source, fdr),
        "content": _digest(contents),
        "about": detector.describe(),
        "counts": {str(status): int(count) for status, count in sorted(Counter(frame["status"]).items())},
        "flagged": int(frame["is_ood"].fillna(False).sum()),
        "unreadable": unreadable,
        "versions": store.versions(),
    }


class _Tables:
    """Appends tables to one parquet file, which appears at the end and only when there was a table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer: pq.ParquetWriter | None = None
        self.exits = ExitStack()

    def __enter__(self) -> _Tables:
        self.exits.__enter__()
        return self

    def write(self, table: pa.Table) -> None:
        """Adds one table."""
        if self.writer is None:
            temporary = self.exits.enter_context(store.atomic_file(self.path))
            self.writer = self.exits.enter_context(pq.ParquetWriter(temporary, table.schema, compression="zstd"))
        self.writer.write_table(table)

    def __exit__(self, *error: Any) -> None:
        self.exits.__exit__(*error)


def _read_parts(detector: Detector, source: ImageSource, folder: Path) -> Iterator[tuple[Scores, dict[str, Any]]]:
    """Scores of every part, and what was written beside it."""
    for span in _spans(source):
        path = _part(folder, span.start)
        about = store.read_json(path.with_suffix(".json"))
        measured = None if about["empty"] else Measurements.read(path)
        keys = source.keys[span.start : span.stop]
        yield detector.rescore_all(keys, measured, skip=source.policy == "skip"), about
