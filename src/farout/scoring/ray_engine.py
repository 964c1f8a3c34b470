"""Scoring a source with Ray Data, on this machine or on a cluster: workers score and write parts of the source."""

from __future__ import annotations

import hashlib
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from farout.core import storage, store
from farout.core.csv_files import CsvWriter
from farout.core.errors import (
    DamagedFileWarning,
    FaroutError,
    MisleadingResultWarning,
    StoreError,
)
from farout.core.files import hash_file
from farout.core.progress import task
from farout.core.storage import FilePath
from farout.data.batching import prefetch
from farout.data.image_source import ImageSource, Policy, ReadingRecord
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.detectors.base import Detector, Scores, find_detector, load
from farout.detectors.saving import KIND, describe_detector
from farout.report.score_page import LISTED_ROWS, write_score_page
from farout.scoring.folder import (
    MEMORY_MIB,
    ScoredFolder,
    check_selection,
    check_settings,
    describe_settings,
    divide_into_parts,
    has_network_error,
    hash_texts,
    read_manifest,
    warn_before_scoring,
)
from farout.scoring.ray_session import RaySettings, connect_ray, run_on_ray
from farout.scoring.score_parts import (
    ScoredPart,
    list_parts,
    read_part,
    remove_part,
    remove_temporary_parts,
    write_part,
)
from farout.scoring.scorer import Scorer
from farout.scoring.summary import ScoredParts, ScoreSummary

__all__ = ["score_with_ray"]

_READ_AHEAD = 16
"""Parts that are read at the same time: from an object store, most of the time is waiting."""
_SETTINGS, _TABLE, _PAGE, _MANIFEST = "settings.json", "scores.csv", "page.html", "manifest.json"


def score_with_ray(
    detector: str | Path,
    images: Any,
    out: str | FilePath,
    *,
    ray: RaySettings | None = None,
    limit: int | None = None,
    policy: Policy = "nan",
    top_images: int = 24,
    fdr: float | None = None,
    reading: ReadSettings = DEFAULT_READING,
    **runtime: Any,
) -> ScoredFolder:
    """Score images with the workers of a Ray cluster into a folder or a prefix of an object store.

    The results are those of `score_folder`, except that the measurements are not kept, and that the parts stay: tables
    of `ray.images_per_part` images in parquet. An interrupted run continues with the missing parts when it is called
    again with the same arguments.

    Args:
        detector: folder of a fitted detector, which all machines of the cluster can read.
        images: any image source, whose files all machines can read.
        out: folder that all machines can write, or URL such as `s3://bucket/results`.
        ray: address of the cluster, and number and resources of the workers; None: see `RaySettings`.
        limit: a seeded sample of this many images.
        policy: for an unreadable image: `nan` (listed, without score), `skip` or `raise`.
        top_images: number of images with the highest scores on the page.
        fdr: adds a column `selected`: images chosen by Benjamini-Hochberg at this false discovery rate.
        reading: how image files are read; without a value range, that of the fitted images is used.
        **runtime: settings that replace those of the fit. The device is `cuda` if workers have GPUs, else `cpu`.

    Raises:
        FaroutError: for settings that do not fit, or if a worker fails.
        StoreError: when `out` contains something else.
    """
    ray = RaySettings() if ray is None else ray
    check_selection(top_images, fdr)
    folder, target = find_detector(detector), storage.as_file_path(out)
    expected = _resolve_runtime(folder, runtime, ray)
    fitted = _load_on_driver(folder, runtime, expected["precision"])
    source = fitted.open_images(images, policy=policy, limit=limit, reading=reading, memory_mib=MEMORY_MIB)
    warn_before_scoring(fitted, source)
    settings = {"engine": "ray", **describe_settings(fitted, source, fdr, ray.images_per_part, expected)}
    _open_results(target, settings)
    remove_temporary_parts(target)
    manifest, scored_now, seconds = _read_finished(target), 0, 0.0
    if manifest is None or manifest["top_images"] != top_images:
        parts = divide_into_parts(len(source), ray.images_per_part)
        missing = _find_missing(target, parts, expected)
        started = time.perf_counter()
        if missing:
            scorer = Scorer(folder, fingerprint=fitted.fingerprint, **{**runtime, **expected})
            scored_now = _score_missing(scorer, source, missing, target, ray)
            remove_temporary_parts(target)
        seconds = time.perf_counter() - started
        about = {**describe_detector(fitted), "runtime": {**describe_detector(fitted)["runtime"], **expected}}
        manifest = _finish(fitted, source, parts, target, {**settings, "about": about, "top_images": top_images})
    source.warn_about_reading()
    return ScoredFolder(target, manifest["counts"], manifest["flagged"], manifest["unreadable"], scored_now, seconds)


def _resolve_runtime(folder: Path, runtime: dict[str, Any], ray: RaySettings) -> dict[str, str]:
    """The device and precision of all workers, which do not depend on the machines that they run on."""
    device = runtime.get("device", "auto")
    if device == "auto":
        device = "cuda" if ray.gpus_per_worker else "cpu"
    if (device.partition(":")[0] == "cuda") != bool(ray.gpus_per_worker):
        raise FaroutError(
            f"the device is {device}, and workers have {ray.gpus_per_worker:g} GPUs; give --gpus-per-worker 1 for the "
            "device cuda, and 0 for other ones"
        )
    precision = runtime.get("precision") or store.read_config(folder, KIND)["runtime"]["precision"]
    if precision == "auto":
        raise FaroutError("the precision auto depends on the machine; with the engine ray give fp32, bf16 or fp16")
    return {"device": device.partition(":")[0], "precision": precision}


def _load_on_driver(folder: Path, runtime: dict[str, Any], precision: str) -> Detector:
    """Load the detector in this process, which may have no GPU: its networks run only for the pictures of the page."""
    settings = {**runtime, "device": "auto"}
    if precision != "fp16":
        return load(folder, **settings)
    try:
        return load(folder, **settings)
    except FaroutError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MisleadingResultWarning)  # scores are computed by the workers
            return load(folder, **{**settings, "precision": "fp32"})


def _check_environment(environment: dict[str, Any], expected: dict[str, str], what: str) -> None:
    """Raise StoreError for scores that differ by more than the last digits from those of other parts."""
    found = {name: environment[name] for name in expected}
    if found != expected:
        raise StoreError(
            f"{what} has scores of {found['device']} in {found['precision']}, the other parts those of "
            f"{expected['device']} in {expected['precision']}; they cannot be mixed: remove it, or give a new folder"
        )


def _open_results(out: FilePath, settings: dict[str, Any]) -> None:
    """Begin the results or continue with them; raises StoreError when there is something else."""
    if isinstance(out, Path) and out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; give a folder for the results")
    if not storage.exists(out / _SETTINGS):
        others = list(storage.list_files(out))
        if others:
            raise StoreError(f"{out} is not empty ({', '.join(others[:3])}, …); give a new folder for the results")
        storage.write_sealed_json(out / _SETTINGS, settings)
        return
    check_settings(out, storage.read_sealed_json(out / _SETTINGS), settings)


def _read_finished(out: FilePath) -> dict[str, Any] | None:
    """The manifest of finished results; None if they are not finished, have images that a store did not deliver, or,
    with a warning, are damaged.
    """
    if not storage.exists(out / _MANIFEST):
        return None
    try:
        manifest = read_manifest(out)
        for name, sha256 in manifest["files"].items():
            if _hash_file(out / name) != sha256:
                raise StoreError(f"{out / name} was changed after it was written")
    except (StoreError, OSError) as error:
        warnings.warn(f"{error}; the results are written again", DamagedFileWarning, stacklevel=3)
        return None
    return manifest if storage.exists(out / _PAGE) and not has_network_error(manifest["unreadable"]) else None


def _hash_file(path: FilePath) -> str:
    if isinstance(path, Path):
        return hash_file(path)
    with path.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_missing(out: FilePath, parts: Sequence[range], expected: dict[str, str]) -> list[range]:
    """The parts that have to be scored; damaged ones are removed, with a warning."""
    listed = list_parts(out)
    missing = [part for part in parts if part.start not in listed]
    complete = [part for part in parts if part.start in listed]
    contents = prefetch([partial(_try_to_read, out, part) for part in complete], _READ_AHEAD)
    for part, read in zip(complete, contents, strict=True):
        if isinstance(read, ScoredPart):
            _check_environment(read.environment, expected, f"the part {part.start:09d} in {out}")
            if has_network_error(read.unreadable):  # what a store did not deliver is read again
                missing.append(part)
            continue
        warnings.warn(f"{read}; these images are scored again", DamagedFileWarning, stacklevel=3)
        remove_part(out, part.start)
        missing.append(part)
    return sorted(missing, key=lambda part: part.start)


def _try_to_read(out: FilePath, part: range) -> ScoredPart | StoreError:
    try:
        return read_part(out, part)
    except StoreError as error:
        return error


def _score_missing(scorer: Scorer, source: ImageSource, parts: Sequence[range], out: FilePath, ray: RaySettings) -> int:
    """Score parts with Ray; returns the number of images that were measured."""

    def describe(index: int) -> str:
        first, last = parts[index].start, parts[index].stop - 1
        return f"the images {first} ({source.keys[first]}) to {last} ({source.keys[last]})"

    jobs = ((scorer, source.subset(part), part, out) for part in parts)
    measured = 0
    with (
        connect_ray(ray),
        task(f"scoring {source.name}", sum(map(len, parts))) as bar,
        closing(run_on_ray(_score_part, jobs, ray, describe)) as results,
    ):
        for index, (count, record) in results:
            measured += count
            source.add_reading_record(record, parts[index])
            bar.advance(len(parts[index]))
    return measured


def _score_part(scorer: Scorer, images: ImageSource, indices: range, out: FilePath) -> tuple[int, ReadingRecord]:
    """Score and write a part, in a worker; returns the number of images that could be read, and what was found."""
    measured = scorer.measure(images)
    scores = Scores.empty(scorer.detector.calibration_scores)
    if measured.measurements is not None:
        scores = scorer.detector.score_measurements(measured.measurements)
    if images.policy != "skip":
        scores = scores.reindex(images.keys)
    environment = replace(scorer.detector.runtime, backend=scorer.detector.backend).describe_environment()
    write_part(out, ScoredPart(indices, scores, measured.unreadable, hash_texts(measured.content), environment))
    return measured.count, images.reading_record


def _read_in_order(out: FilePath, parts: Sequence[range]) -> Iterator[ScoredPart]:
    return prefetch([partial(read_part, out, part) for part in parts], _READ_AHEAD)


def _finish(
    detector: Detector, source: ImageSource, parts: Sequence[range], out: FilePath, settings: dict[str, Any]
) -> dict[str, Any]:
    """Write table, page and manifest from the parts, one of which is in memory at a time; returns the manifest."""
    largest_selected = None
    if settings["fdr"] is not None:
        counts = ScoreSummary(detector.calibration_scores[detector.score_name], detector.alpha, keep=0)
        for part in _read_in_order(out, parts):
            counts.add(part.scores, part.indices.start)
        largest_selected = counts.benjamini_hochberg(settings["fdr"])
    keep = max(settings["top_images"], LISTED_ROWS)
    summary = ScoreSummary(detector.calibration_scores[detector.score_name], detector.alpha, keep=keep)
    scored_parts = ScoredParts(source, summary)
    with storage.atomic_file(out / _TABLE) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = CsvWriter(file)
            for part in _read_in_order(out, parts):
                where = f"the part {part.indices.start:09d} in {out}"
                _check_environment(part.environment, settings["runtime"], where)
                scored_parts.add(part.indices, part.scores, part.unreadable, part.content, part.environment)
                frame = part.scores.to_frame()
                if largest_selected is not None:
                    frame.insert(4, "selected", part.scores.p_value <= largest_selected)
                writer.write(frame)
        table_hash = hash_file(temporary)
    manifest = {**settings, "files": {_TABLE: table_hash}, **scored_parts.describe()}
    with tempfile.TemporaryDirectory(prefix="farout-page-") as name:
        _measure_shown(detector, source, summary, Path(name), settings["top_images"])
        page = write_score_page(detector, source, summary, manifest, Path(name), top_images=settings["top_images"])
        storage.write_bytes(out / _PAGE, page.read_bytes())
    # last: results with a manifest are finished
    storage.write_sealed_json(out / _MANIFEST, manifest)
    return manifest


def _measure_shown(
    detector: Detector, source: ImageSource, summary: ScoreSummary, folder: Path, top_images: int
) -> None:
    """Write the measurements of the images that the page shows: it finds their neighbors among normal images."""
    shown = summary.top(top_images)
    measured = Scorer(detector).measure(source.subset(shown.indices)).measurements
    if measured is not None:
        measured.write_parquet(folder / "measurements.parquet")
