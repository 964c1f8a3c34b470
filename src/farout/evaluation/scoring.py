"""Scoring a source into a folder: streamed, in bounded memory, resumable, the same bytes however it was reached."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from farout import store
from farout.calibration import check_scores
from farout.detectors._tables import Measurements, Scores
from farout.detectors.base import Detector
from farout.errors import StoreError, TrapWarning
from farout.evaluation.page import write_page
from farout.images.preprocessing import check_against
from farout.images.sources import ImageSource, Policy
from farout.progress import task

__all__ = ["ScoredFolder", "read_scores", "score_folder"]

_PART = 256
_PLAN, _PARTS = "plan.json", "parts"


@dataclass(frozen=True)
class ScoredFolder:
    """What `score_folder` wrote: counts of statuses, images flagged, and how many were scored in this call."""

    folder: Path
    counts: dict[str, int]
    flagged: int
    scored_now: int


def score_folder(
    detector: Detector,
    images: Any,
    out: str | Path,
    *,
    limit: int | None = None,
    policy: Policy = "nan",
    furthest: int = 24,
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

    Raises:
        StoreError: when `out` holds the results of another detector, source or setting.
    """
    detector.check_fitted()
    source = detector.open(images, limit=limit, policy=policy)
    for trap in check_against(source, detector.preprocessing):
        warnings.warn(trap, TrapWarning, stacklevel=2)
    out = Path(out)
    _begin(out, _plan(detector, source))
    done = _measure_parts(detector, source, out / _PARTS)
    summary = _assemble(detector, source, out)
    write_page(detector, source, out, furthest)
    shutil.rmtree(out / _PARTS)
    return replace(summary, scored_now=done)


def read_scores(path: str | Path) -> Scores:
    """Scores from a scored folder or from any `.csv` or `.parquet` table with columns key and score."""
    path = Path(path)
    file = path / "scores.csv" if path.is_dir() else path
    if not file.is_file():
        raise StoreError(f"there is no score table {file}")
    if file.suffix == ".parquet":
        return Scores.from_frame(pd.read_parquet(file))
    return Scores.from_frame(pd.read_csv(file, dtype={"key": str}))


def _plan(detector: Detector, source: ImageSource) -> dict[str, Any]:
    """What decides the result; two runs into one folder must agree on it."""
    runtime = detector.runtime
    return {
        "detector": detector.fingerprint,
        "source": source.name,
        "policy": source.policy,
        "images": len(source),
        "keys": hashlib.sha256("\0".join(source.keys).encode()).hexdigest(),
        "runtime": {"device": runtime.device, "precision": runtime.precision, "rows": runtime.rows},
    }


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Opens the folder; raises StoreError when another run's results are there."""
    out.mkdir(parents=True, exist_ok=True)
    (out / _PARTS).mkdir(exist_ok=True)
    if not (out / _PLAN).is_file():
        others = sorted(path.name for path in out.iterdir() if path.name != _PARTS)
        if others:
            raise StoreError(f"{out} is not empty ({', '.join(others[:3])}, …); give a new folder for the results")
        store.write_json(out / _PLAN, plan)
        return
    known = store.read_json(out / _PLAN)
    differing = [f"{name}: {known.get(name)} there, {value} now" for name, value in plan.items() if known.get(name) != value]
    if differing:
        raise StoreError(f"{out} holds another run ({'; '.join(differing)}); give a new folder or remove it")


def _measure_parts(detector: Detector, source: ImageSource, folder: Path) -> int:
    """Measures what has no part yet; returns the number of images measured."""
    finished = (folder.parent / "manifest.json").is_file() and not any(folder.iterdir())
    starts = [] if finished else range(0, len(source), _PART)
    missing = [start for start in starts if not _part(folder, start).is_file()]
    count = sum(min(_PART, len(source) - start) for start in missing)
    with task(f"scoring {source.name}", count) as bar:
        for start in missing:
            some = source.subset(range(start, min(start + _PART, len(source))))
            parts = []
            for scores in detector.score_chunks(some):
                parts += [scores.measurements] if scores.measurements is not None else []
                bar.advance(len(scores))
            _write_part(_part(folder, start), parts, {k: v for k, v in source.unreadable.items() if k in set(some.keys)})
    return count


def _part(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.parquet"


def _write_part(path: Path, parts: list[Measurements], unreadable: dict[str, str]) -> None:
    table = Measurements.join(parts).to_table() if parts else None
    with store.atomic_file(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"unreadable": unreadable, "empty": table is None}))
    with store.atomic_file(path) as temporary:
        if table is not None:
            pq.write_table(table, temporary, compression="zstd")


def _assemble(detector: Detector, source: ImageSource, out: Path) -> ScoredFolder:
    """Joins the parts to `measurements.parquet` and `scores.csv`; a finished folder is read instead."""
    if not any((out / _PARTS).iterdir()) and (out / "manifest.json").is_file():
        manifest = store.read_json(out / "manifest.json")
        return ScoredFolder(out, manifest["counts"], manifest["flagged"], 0)
    unreadable: dict[str, str] = {}
    frames = []
    with store.atomic_file(out / "measurements.parquet") as temporary:
        writer = None
        for scores, reasons in _read_parts(detector, source, out / _PARTS):
            unreadable |= reasons
            frames.append(scores.to_frame())
            if scores.measurements is not None:
                table = scores.measurements.to_table()
                writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
                writer.write_table(table)
        if writer is not None:
            writer.close()
    return _write_results(detector, source, out, pd.concat(frames, ignore_index=True), unreadable)


def _read_parts(detector: Detector, source: ImageSource, folder: Path) -> Iterator[tuple[Scores, dict[str, str]]]:
    for start in range(0, len(source), _PART):
        path = _part(folder, start)
        about = store.read_json(path.with_suffix(".json"))
        measured = None if about["empty"] else Measurements.read(path)
        keys = source.keys[start : start + _PART]
        yield detector.rescore_all(keys, measured, skip=source.policy == "skip"), about["unreadable"]


def _write_results(
    detector: Detector, source: ImageSource, out: Path, frame: pd.DataFrame, unreadable: dict[str, str]
) -> ScoredFolder:
    check_scores(frame["score"].to_numpy(dtype=float)[frame["status"] == "ok"], source.name)
    counts = {str(status): int(count) for status, count in sorted(Counter(frame["status"]).items())}
    flagged = int(frame["is_ood"].fillna(False).sum())
    with store.atomic_file(out / "scores.csv") as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")
    manifest = {
        **_plan(detector, source),
        "about": detector.describe(),
        "counts": counts,
        "flagged": flagged,
        "unreadable": unreadable,
        "versions": store.versions(),
    }
    store.write_json(out / "manifest.json", manifest)
    return ScoredFolder(out, counts, flagged, 0)
