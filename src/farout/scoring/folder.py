"""Scoring a source into a folder: in bounded memory, resumable, with the same bytes after an interruption.

The images are measured in parts with fixed boundaries, each written to a file of its own, by this process, by worker
processes, or by the processes of a launcher. The first process makes the tables of them.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, Field

from farout.core import storage, store
from farout.core.backends import Backend, explain_unusable_backend
from farout.core.csv_files import open_csv_writer, read_csv
from farout.core.devices import ProcessGroup, join_processes
from farout.core.errors import (
    DamagedFileWarning,
    FaroutError,
    MisleadingResultWarning,
    StoreError,
    TooFewImagesWarning,
    UnreadableImageError,
)
from farout.core.files import hash_file
from farout.core.names import expand_path, find_path
from farout.core.profiling import add_process_profile, is_profiling, record_profile, timed
from farout.core.progress import task
from farout.core.remote_files import NETWORK_ERROR, FilePath, is_url
from farout.core.schema import Schema, check_content
from farout.data.image_source import ImageSource, Policy, ReadingRecord
from farout.data.preprocessing import find_mismatches
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.splits import calibration_size
from farout.detectors.backend_choice import choose_backend
from farout.detectors.base import Detector, Measurements, Scores
from farout.detectors.calibration import check_fitted
from farout.detectors.results import PARQUET_SETTINGS
from farout.detectors.saving import describe_detector
from farout.report.score_page import LISTED_ROWS, write_score_page
from farout.scoring.scorer import Scorer
from farout.scoring.summary import ScoredParts, ScoreSummary, add_table
from farout.scoring.worker_pool import open_worker_scorer, share_with_workers

__all__ = [
    "MEMORY_MIB",
    "ScoredFolder",
    "check_selection",
    "check_settings",
    "describe_settings",
    "divide_into_parts",
    "has_intact_scores",
    "has_network_error",
    "hash_texts",
    "read_manifest",
    "read_score_table",
    "read_scores",
    "score_folder",
    "warn_before_scoring",
]

_IMAGES_PER_PART = 256
"""Images measured between two files on disk, at most."""
_FEWEST_IMAGES_PER_PART = 64
"""The same of small sets: a batch of networks on small images."""
_PARTS_OF_SMALL_SETS = 64
"""Number of parts up to which parts are small: enough for several processes to end at nearly the same time."""
MEMORY_MIB = 64
"""Memory for decoded images: those that are looked at before they are scored, and those of the page."""
_SETTINGS_FILE, _PARTS, _MANIFEST, _MEASUREMENTS = "settings.json", "parts", "manifest.json", "measurements.parquet"


class _ManifestContent(BaseModel):
    """What is read of `manifest.json`; other entries are for users and for the page."""

    source: str
    policy: Literal["raise", "skip", "nan"]
    contents: list[str]
    files: dict[str, str]
    counts: dict[str, int]
    flagged: int
    unreadable: dict[str, str]
    environments: Annotated[list[dict[str, Any]], Field(min_length=1)]


class _PartContent(Schema):
    """The file next to the measurements of a part."""

    unreadable: dict[str, str]
    empty: bool
    content: str
    measurements: str
    environment: dict[str, Any]


@dataclass(frozen=True)
class ScoredFolder:
    """What `score_folder` has written.

    Attributes:
        folder: the folder, or the prefix of an object store.
        counts: number of images by status.
        flagged: number of images with `is_ood`.
        unreadable: reasons by key.
        scored_now: number of images measured in this call, without the unreadable ones.
        seconds: time of these measurements.
    """

    folder: FilePath
    counts: dict[str, int]
    flagged: int
    unreadable: dict[str, str]
    scored_now: int
    seconds: float


def score_folder(
    detector: Detector,
    images: Any,
    out: str | Path,
    *,
    limit: int | None = None,
    policy: Policy = "nan",
    top_images: int = 24,
    fdr: float | None = None,
    reading: ReadSettings = DEFAULT_READING,
    processes: int = 1,
) -> ScoredFolder:
    """Score images into a folder: `scores.csv`, `measurements.parquet`, `manifest.json` and `page.html`.

    An interrupted run continues when it is called again with the same arguments, with any number of processes. The
    processes of a launcher (`torchrun`, `accelerate launch`) that all call this function share the images.

    Args:
        detector: a fitted detector.
        images: any image source.
        out: folder of the results.
        limit: a seeded sample of this many images.
        policy: for an unreadable image: `nan` (listed, without score), `skip` or `raise`.
        top_images: number of images with the highest scores on the page.
        fdr: adds a column `selected`: images chosen by Benjamini-Hochberg at this false discovery rate.
        reading: how image files are read; without a value range, that of the fitted images is used.
        processes: number of processes on this machine, with this one; with GPUs, each uses the next one.

    Raises:
        FaroutError: for a detector that is not fitted, a negative `top_images`, a rate that is not between 0 and 1, or
            worker processes that cannot be used.
        StoreError: when `out` contains the results of another detector, source or setting, or of other images with the
            same names.
    """
    check_fitted(detector)
    check_selection(top_images, fdr)
    if processes < 1:
        raise FaroutError(f"processes is {processes}; expected 1 or more")
    if is_url(out):
        raise FaroutError(f"{out} is a URL, to which only score_with_ray writes (--engine ray); give a folder")
    source = detector.open_images(images, policy=policy, limit=limit, reading=reading, memory_mib=MEMORY_MIB)
    out, group = expand_path(out), join_processes(detector.runtime.device)
    if processes > 1 and group.num_processes > 1:
        raise FaroutError(f"a launcher started {group.num_processes} processes already; leave out processes")
    warn_before_scoring(detector, source)
    calibration = detector.calibration_scores[detector.score_name]

    def open_results() -> tuple[dict[str, Any], list[range], dict[str, Any] | None, list[range]]:
        """Open the folder; returns the settings, all parts, and the manifest of finished results, or the parts that are
        missing.
        """
        size = _find_part_size(out, len(source))
        _choose_backend(detector, out, len(source))
        runtime = {"device": detector.runtime.device.partition(":")[0], "precision": detector.runtime.precision}
        if detector.backend != "eager":
            runtime["backend"] = detector.backend
        settings, parts = describe_settings(detector, source, fdr, size, runtime), divide_into_parts(len(source), size)
        _open_folder(out, settings)
        manifest = _read_finished(out, source, parts)
        if manifest is None:
            return settings, parts, None, _find_missing_parts(source, parts, out)
        _check_contents(source, parts, manifest["contents"], out)
        return settings, parts, manifest, []

    settings, parts, manifest, missing = group.run_on_main_process(open_results)
    detector.use_backend(settings["runtime"].get("backend", "eager"))
    started = time.perf_counter()
    scored_now = _measure_parts(detector, source, missing, out, group, processes)
    seconds = time.perf_counter() - started

    def write_results() -> dict[str, Any]:
        summary, finished = ScoreSummary(calibration, detector.alpha, keep=max(top_images, LISTED_ROWS)), manifest
        if finished is None:
            finished = settings | _write_tables(detector, source, parts, out, fdr, summary)
        if finished.get("top_images") != top_images or not (out / "page.html").is_file():
            finished["top_images"] = top_images
            if manifest is not None:
                add_table(summary, out / "scores.csv", source.keys, finished["unreadable"])
            write_score_page(detector, source, summary, finished, out, top_images=top_images)
            # the manifest is written last: a folder with a manifest is finished
            store.write_sealed_json(out / _MANIFEST, finished)
        shutil.rmtree(out / _PARTS, ignore_errors=True)
        return finished

    manifest = group.run_on_main_process(write_results)
    source.warn_about_reading()
    return ScoredFolder(out, manifest["counts"], manifest["flagged"], manifest["unreadable"], scored_now, seconds)


def read_scores(path: str | Path) -> Scores:
    """Read scores from a scored folder or from any `.csv` or `.parquet` table with columns key and score."""
    return read_score_table(path)[0]


def read_score_table(path: str | Path) -> tuple[Scores, pd.DataFrame]:
    """As `read_scores`, with all columns of the table, such as the time at which an image was taken."""
    path = find_path(path)
    file = path / "scores.csv" if path.is_dir() else path
    if path.is_dir() and os.path.lexists(path / _MANIFEST):
        _check_file(path, read_manifest(path), file.name)
    elif path.is_dir() and os.path.lexists(path / _SETTINGS_FILE):
        raise StoreError(f"{path} is not finished; run the same `farout score` again")
    if not file.is_file():
        raise StoreError(f"there is no score table {file}")
    try:
        table = _read_table(file)
        return Scores.from_frame(table), table
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror or error}") from error
    except FaroutError as error:
        raise StoreError(f"{file}: {error}") from error
    except (pa.ArrowException, LookupError, OverflowError, TypeError, ValueError) as error:
        raise StoreError(f"{file} cannot be read as a score table ({error}); expected columns key and score") from error


def read_manifest(folder: FilePath) -> dict[str, Any]:
    """Read the manifest of a scored folder; raises StoreError if it is missing, or was changed after it was written."""
    path = folder / _MANIFEST
    manifest = store.read_sealed_json(path) if isinstance(path, Path) else storage.read_sealed_json(path)
    check_content(manifest, _ManifestContent, str(folder / _MANIFEST))
    return manifest


def has_intact_scores(folder: Path) -> bool:
    """Whether a scored folder, or all that are in a folder, are as they were written."""
    try:
        for path in sorted(folder.rglob(_MANIFEST)):
            if (path.parent / _SETTINGS_FILE).is_file():
                manifest = read_manifest(path.parent)
                for name in manifest["files"]:
                    _check_file(path.parent, manifest, name)
    except StoreError:
        return False
    return True


def _check_file(folder: Path, manifest: dict[str, Any], name: str) -> None:
    """Raise StoreError unless a file of the results is as it was written."""
    advice = "run the same `farout score` again, or give an edited table as a file, under another name"
    store.check_file(folder / name, manifest["files"].get(name), advice)


def _read_finished(out: Path, source: ImageSource, parts: list[range]) -> dict[str, Any] | None:
    """The manifest of finished results; None if they are not finished.

    Damaged results are named in a warning and count as not finished, and so do those with images that a store did not
    deliver, which are read again. If the measurements are not damaged, the parts are restored from them, so that no
    network runs again for the others.
    """
    if not os.path.lexists(out / _MANIFEST):
        return None
    manifest = None
    try:
        manifest = read_manifest(out)
        for name in manifest["files"]:
            _check_file(out, manifest, name)
        if not has_network_error(manifest["unreadable"]):
            return manifest
    except StoreError as error:
        what = str(error).partition(";")[0]
        warnings.warn(f"{what}; the results are written again", DamagedFileWarning, stacklevel=3)
    if manifest is not None:
        undelivered = {key for key, reason in manifest["unreadable"].items() if NETWORK_ERROR in reason}
        delivered = {
            part: content
            for part, content in zip(parts, manifest["contents"], strict=True)
            if undelivered.isdisjoint(source.keys[part.start : part.stop])
        }
        _check_contents(source, list(delivered), list(delivered.values()), out)
        with suppress(StoreError):
            _check_file(out, manifest, _MEASUREMENTS)
            _restore_parts(source, parts, manifest, out)
    _remove(out / _MANIFEST)  # last: an interruption in between leaves damaged results, not unfinished ones
    return None


def _restore_parts(source: ImageSource, parts: list[range], manifest: dict[str, Any], out: Path) -> None:
    """Write the parts of finished results from their measurements."""
    unreadable, (environment, *_) = manifest["unreadable"], manifest["environments"]
    readable = ([key for key in source.keys[part.start : part.stop] if key not in unreadable] for part in parts)
    measured = Measurements.read_consecutive(out / _MEASUREMENTS, readable)
    for part, content, measurements in zip(parts, manifest["contents"], measured, strict=True):
        keys = source.keys[part.start : part.stop]
        reasons = {key: unreadable[key] for key in keys if key in unreadable}
        _write_part(_part_path(out, part), measurements, reasons, content, environment)


def _remove(path: Path) -> None:
    """Remove a file, or a folder that is in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _read_table(file: Path) -> pd.DataFrame:
    if file.suffix == ".parquet":
        with file.open("rb") as opened:  # pyarrow opens only paths in UTF-8
            return pd.read_parquet(opened)
    return read_csv(file)


def hash_texts(texts: Sequence[str]) -> str:
    """Return the SHA-256 of texts in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _hash_content(images: ImageSource) -> str:
    """Hash of the pixels of all images, as `MeasuredImages.content` has them."""
    hashes = []
    for index in range(len(images)):
        try:
            hashes.append(images.identity(index))
        except UnreadableImageError:
            if images.policy == "raise":
                raise
            hashes.append("unreadable")
    return hash_texts(hashes)


def _check_contents(source: ImageSource, parts: Sequence[range], before: Sequence[str], out: Path) -> None:
    """Raise StoreError unless the images of each part are those that were scored."""
    if [_hash_content(source.subset(part)) for part in parts] != list(before):
        raise StoreError(f"{out} contains scores of other images of the same names; give a new folder or remove it")


def _open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Create the folder or continue in it; raises StoreError when it contains something else."""
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; give a folder for the results")
    if not (out / _SETTINGS_FILE).is_file():
        existing = out.iterdir() if out.is_dir() else ()
        others = sorted(path.name for path in existing if not path.name.startswith(f".{_SETTINGS_FILE}."))
        if others:
            raise StoreError(f"{out} is not empty ({', '.join(others[:3])}, …); give a new folder for the results")
        store.write_sealed_json(out / _SETTINGS_FILE, settings)
    check_settings(out, store.read_sealed_json(out / _SETTINGS_FILE), settings)
    (out / _PARTS).mkdir(exist_ok=True)
    # temporary files of a run that was killed
    for name in (_SETTINGS_FILE, _MANIFEST, "scores.csv", "measurements.parquet", "page.html"):
        for temporary in out.glob(f".{name}.*"):
            temporary.unlink()


def check_selection(top_images: int, fdr: float | None) -> None:
    """Raise FaroutError for a number of images of the page, or a false discovery rate, that is out of range."""
    if top_images < 0 or (fdr is not None and not 0 < fdr < 1):
        raise FaroutError(
            f"top_images is {top_images}, fdr is {fdr}; expected 0 images or more, and a rate between 0 and 1"
        )


def warn_before_scoring(detector: Detector, source: ImageSource) -> None:
    """Warn of images that differ from the fitted ones in kind, and of too few calibration images for any flag."""
    for message in find_mismatches(source, detector.preprocessing, fitted_gray=detector.provenance.get("gray", False)):
        warnings.warn(message, MisleadingResultWarning, stacklevel=3)
    count = len(detector.calibration)
    if count < calibration_size(0, detector.alpha):
        message = f"with {count} calibration images no p-value reaches alpha {detector.alpha}"
        warnings.warn(f"{message}, so nothing can be flagged", TooFewImagesWarning, stacklevel=3)


def describe_settings(
    detector: Detector, source: ImageSource, fdr: float | None, images_per_part: int, runtime: dict[str, str]
) -> dict[str, Any]:
    """What must be the same for a run to continue in a folder, see `check_settings`."""
    return {
        "detector": detector.fingerprint,
        "source": source.name,
        "location": source.location,
        "policy": source.policy,
        "reading": source.reading.to_dict(),
        "fdr": fdr,
        "images": len(source),
        "images_per_part": images_per_part,
        "keys": hash_texts(source.keys),
        "runtime": runtime,
    }


def divide_into_parts(count: int, size: int) -> list[range]:
    """The indices of each part: the boundaries do not depend on who scores it."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _choose_backend(detector: Detector, out: Path, images: int) -> None:
    """The backend of a run that was begun in the folder, else by the number of images."""
    if detector.runtime.backend == "auto" and (out / _SETTINGS_FILE).is_file():
        backend: Backend = store.read_sealed_json(out / _SETTINGS_FILE).get("runtime", {}).get("backend", "eager")
        if not explain_unusable_backend(backend, torch.device(detector.runtime.device), detector.precision):
            detector.use_backend(backend)
    else:
        choose_backend(detector, images)


def _find_part_size(out: Path, count: int) -> int:
    """Images per part: that of a run that was begun in the folder, else by the number of images."""
    if (out / _SETTINGS_FILE).is_file():
        recorded = store.read_sealed_json(out / _SETTINGS_FILE).get("images_per_part")
        if isinstance(recorded, int) and recorded > 0:
            return recorded
    batches = math.ceil(count / (_FEWEST_IMAGES_PER_PART * _PARTS_OF_SMALL_SETS))
    return min(_IMAGES_PER_PART, _FEWEST_IMAGES_PER_PART * max(1, batches))


def check_settings(out: FilePath, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise StoreError unless the results in `out` were begun with the same settings."""
    differences = [
        f"{name}: {before.get(name)} before, {settings.get(name)} now"
        for name in {**before, **settings}
        if before.get(name) != settings.get(name)
        and name != ("source" if settings["location"] == before.get("location") else "location")
    ]
    if before.get("detector") != settings["detector"]:
        raise StoreError(
            f"{out} contains scores of another detector (or of this one before it was fitted or calibrated again); "
            "give a new folder or remove it"
        )
    if differences:
        raise StoreError(f"{out} contains another run ({'; '.join(differences)}); give a new folder or remove it")


def _part_path(out: Path, part: range) -> Path:
    return out / _PARTS / f"{part.start:09d}.parquet"


def has_network_error(unreadable: Mapping[str, str]) -> bool:
    """Whether an image is unreadable, by these reasons, only because a store did not deliver it."""
    return any(NETWORK_ERROR in reason for reason in unreadable.values())


def _find_missing_parts(source: ImageSource, parts: list[range], out: Path) -> list[range]:
    """The parts that no earlier run has measured; raises StoreError if the images of the others have changed."""
    missing = []
    for part in parts:
        part_info = _read_part_info(_part_path(out, part))
        # what a store did not deliver is read again, and not taken for an image that has changed
        if part_info is not None and not has_network_error(part_info["unreadable"]):
            _check_contents(source, [part], [part_info["content"]], out)
        else:
            missing.append(part)
    return missing


@dataclass(frozen=True)
class _Part:
    """A part to measure: the indices of its images, the images, the file of their measurements, and whether the seconds
    by stage are recorded.
    """

    indices: range
    images: ImageSource
    path: Path
    profiled: bool


def _measure_parts(
    detector: Detector, source: ImageSource, missing: list[range], out: Path, group: ProcessGroup, processes: int
) -> int:
    """Write the measurements of each missing part to a file of its own; returns the number of images measured."""
    measured, processes, scorer = 0, min(processes, len(missing)), Scorer(detector)
    with task(f"scoring {source.name}", sum(map(len, missing))) as bar:

        def measure_here(job: _Part, exchange: Callable[[], None] = lambda: None) -> None:
            def advance(images: int) -> None:
                bar.advance(images)
                exchange()

            nonlocal measured
            count, *_ = _measure_part(scorer, job, advance)  # which adds what workers have measured meanwhile
            measured += count

        def collect(job: _Part, result: tuple[int, int, ReadingRecord, dict[str, Any] | None]) -> None:
            nonlocal measured
            count, cache_hits, record, profile = result
            if profile is not None:
                add_process_profile(profile)
            measured += count
            detector.cache_hits += cache_hits
            source.add_reading_record(record, job.indices)
            bar.advance(len(job.indices))

        share = group.split_between_processes(missing)
        profiled = is_profiling()
        jobs = (_Part(part, source.subset(part), _part_path(out, part), profiled) for part in share)
        if processes > 1:
            with open_worker_scorer(detector) as shared:
                share_with_workers(
                    jobs,
                    shared,
                    _measure_part_in_worker,
                    collect=collect,
                    run_here=measure_here,
                    processes=processes,
                    device=detector.runtime.device,
                )
        else:
            for job in jobs:
                measure_here(job)
    records = group.gather_objects((measured, source.reading_record))
    for process, (_, record) in enumerate(records):
        if process != group.process_index:
            source.add_reading_record(record, range(len(source)))
    return sum(count for count, _ in records)


def _measure_part_in_worker(scorer: Scorer, part: _Part) -> tuple[int, int, ReadingRecord, dict[str, Any] | None]:
    """Measure and write a part in a worker process; returns also its seconds by stage, if they are recorded."""
    if not part.profiled:
        return *_measure_part(scorer, part), None
    with record_profile() as profile:
        result = _measure_part(scorer, part)
    return *result, profile.to_dict()


def _measure_part(
    scorer: Scorer, part: _Part, advance: Callable[[int], object] | None = None
) -> tuple[int, int, ReadingRecord]:
    """Measure and write a part; returns the number of images that could be read, that of those whose features came from
    the cache, and what was found while they were read.
    """
    cache_hits = scorer.detector.cache_hits
    measured = scorer.measure(part.images, advance)
    environment = replace(scorer.detector.runtime, backend=scorer.detector.backend).describe_environment()
    _write_part(part.path, measured.measurements, measured.unreadable, hash_texts(measured.content), environment)
    return measured.count, scorer.detector.cache_hits - cache_hits, part.images.reading_record


@timed("writing")
def _write_part(
    path: Path,
    measurements: Measurements | None,
    unreadable: dict[str, str],
    content: str,
    environment: dict[str, Any],
) -> None:
    """Write the measurements of a part, and then what is known about it: a part with both files is complete."""
    with store.atomic_file(path) as temporary:
        if measurements is not None:
            measurements.write_parquet(temporary)
    part_info = {
        "unreadable": unreadable,
        "empty": measurements is None,
        "content": content,
        "measurements": hash_file(path),
        "environment": environment,
    }
    store.write_sealed_json(path.with_suffix(".json"), part_info)


def _read_part_info(path: Path) -> dict[str, Any] | None:
    """What `_write_part` wrote; None for a part that is not complete or, with a warning, damaged."""
    if not os.path.lexists(path) or not os.path.lexists(path.with_suffix(".json")):
        return None
    try:
        part_info = store.read_sealed_json(path.with_suffix(".json"))
        check_content(part_info, _PartContent, str(path.with_suffix(".json")))
        store.check_file(path, part_info["measurements"])
    except StoreError as error:
        warnings.warn(f"{error}; these images are measured again", DamagedFileWarning, stacklevel=4)
        _remove(path)
        _remove(path.with_suffix(".json"))
        return None
    return part_info


@timed("writing")
def _write_tables(
    detector: Detector, source: ImageSource, parts: list[range], out: Path, fdr: float | None, summary: ScoreSummary
) -> dict[str, Any]:
    """Join the parts to `measurements.parquet` and `scores.csv`, one in memory at a time, and add them to the summary;
    returns facts for the manifest.
    """
    scored_parts = ScoredParts(source, summary)
    with ExitStack() as stack:
        measurement_writer = None
        # to select images at a false discovery rate, the p-values of all of them must be known
        writer = stack.enter_context(open_csv_writer(out / "scores.csv")) if fdr is None else None
        for part, scores, part_info in _read_parts(detector, source, parts, out):
            scored_parts.add(part, scores, part_info["unreadable"], part_info["content"], part_info["environment"])
            if scores.measurements is not None:
                table = scores.measurements.to_table()
                if measurement_writer is None:  # no file where no image could be read
                    temporary = stack.enter_context(store.atomic_file(out / _MEASUREMENTS))
                    file = stack.enter_context(temporary.open("wb"))  # pyarrow opens only paths in UTF-8
                    measurement_writer = stack.enter_context(pq.ParquetWriter(file, table.schema, **PARQUET_SETTINGS))
                measurement_writer.write_table(table)
            if writer is not None:
                writer.write(scores.to_frame())
    if fdr is not None:
        largest = summary.benjamini_hochberg(fdr)
        with open_csv_writer(out / "scores.csv") as writer:
            for _, scores, _ in _read_parts(detector, source, parts, out):
                frame = scores.to_frame()
                frame.insert(4, "selected", scores.p_value <= largest)
                writer.write(frame)
    written = [name for name in ("scores.csv", _MEASUREMENTS) if (out / name).is_file()]
    return {
        "files": {name: hash_file(out / name) for name in written},
        "about": describe_detector(detector),
        **scored_parts.describe(),
    }


def _read_parts(
    detector: Detector, source: ImageSource, parts: list[range], out: Path
) -> Iterator[tuple[range, Scores, dict[str, Any]]]:
    """Yield each part with its scores, a row per image unless unreadable ones are skipped, and what is known of it."""
    for part in parts:
        path = _part_path(out, part)
        part_info = store.read_sealed_json(path.with_suffix(".json"))
        scores = Scores.empty(detector.calibration_scores)
        if not part_info["empty"]:
            scores = detector.score_measurements(Measurements.read_parquet(path))
        if source.policy != "skip":
            scores = scores.reindex(source.keys[part.start : part.stop])
        yield part, scores, part_info
