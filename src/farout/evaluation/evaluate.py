"""Evaluation of a detector: metrics of all its indicators on every out-of-distribution set, next to baselines."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from farout.core.csv_files import write_csv
from farout.core.devices import join_processes, single_process
from farout.core.errors import FaroutError, MisleadingResultWarning
from farout.core.names import encode_name_once, expand_path
from farout.data.image_source import ImageSource
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.detectors import DETECTORS
from farout.detectors.base import Detector
from farout.detectors.calibration import check_fitted, compute_p_values
from farout.evaluation.baselines import EvaluatedDetector, fit_baselines, method_name
from farout.evaluation.metrics import detection_metrics, detection_rate, false_alarm_rate
from farout.evaluation.ood_subsets import average_over_subsets
from farout.evaluation.results import Evaluation
from farout.evaluation.scored_datasets import (
    DIFFERENCE_COLUMNS,
    METHOD_SCORE,
    ScoredDataset,
    compare_detectors,
    dataset_columns,
    folder_name,
    scores_by_indicator,
    shared_image_ids,
)
from farout.scoring.folder import read_scores, score_folder

__all__ = ["COLUMNS", "TEXT_COLUMNS", "evaluate", "evaluate_scores", "peak_memory_mib", "write_table"]

COLUMNS = [
    "detector",
    "preset",
    "indicator",
    "protocol",
    "id",
    "ood",
    "ood_group",
    "role",
    "seed",
    "auroc",
    "auroc_low",
    "auroc_high",
    "aupr_in",
    "aupr_out",
    "fpr95",
    "fpr95_low",
    "fpr95_high",
    "alpha",
    "false_alarm",
    "detection",
    "nfe",
    "gmacs",
    "images_per_s",
    "peak_mib",
    "fit_s",
    "n_id",
    "n_ood",
]
"""Columns of `metrics.csv`: fractions, not percent."""

TEXT_COLUMNS = ("detector", "preset", "indicator", "protocol", "id", "ood", "ood_group", "role")
"""Those that contain texts, which stay as they are when the table is read: a detector may be called 1 or nan."""


def evaluate(
    detector: Detector,
    id_source: Any,
    ood_sources: Sequence[Any],
    out: str | Path,
    *,
    limit: int | None = None,
    standard_baselines: bool = True,
    trivial_baselines: bool = True,
    random_weights_baseline: bool = False,
    baseline_images: Any = None,
    baseline_limit: int | None = 1000,
    ood_subsets: int = 0,
    name: str | None = None,
    reading: ReadSettings = DEFAULT_READING,
    processes: int = 1,
) -> Evaluation:
    """Score in-distribution and out-of-distribution images, and compute metrics for every indicator of the detector.

    Writes `metrics.csv`, the scores in `scores/`, and `differences.csv`: the differences between the detector and each
    baseline on the same images. An interrupted evaluation continues when called again. The processes of a launcher that
    all call this function share the images.

    Args:
        detector: a fitted detector.
        id_source: in-distribution images that were not used to train, fit or calibrate the detector.
        ood_sources: out-of-distribution sources.
        out: folder of the results.
        limit: use a seeded random sample of this many images of each source; None: all.
        standard_baselines: also evaluate the methods that the detector names as its baselines.
        trivial_baselines: also evaluate trivial baselines, which need no network.
        random_weights_baseline: also evaluate the same detector with random weights, see `with_random_weights`.
        baseline_images: source that the baselines are fitted on; None: that of the detector.
        baseline_limit: maximum number of images that trivial baselines and random weights are fitted on; None: all.
            Standard baselines are fitted on all images.
        ood_subsets: number of random subsets of the out-of-distribution images, over which averages of the metrics are
            written to `subsets.csv`, as in many papers (see `average_over_subsets`); 0: none.
        name: name of the detector in the tables; None: that of its method.
        reading: how image files are read; without a value range, that of the fitted images is used.
        processes: number of processes on this machine that score images; see `score_folder`.

    Raises:
        FaroutError: the detector is not fitted, there is no out-of-distribution source, `ood_subsets` is
            negative, or `baseline_limit` is less than 1.
        StoreError: the folder contains scores of another detector or of other images.
    """
    check_fitted(detector)
    if ood_subsets < 0:
        raise FaroutError(f"ood_subsets is {ood_subsets}; expected 0 or more")
    if baseline_limit is not None and baseline_limit < 1:
        raise FaroutError(f"baseline_limit is {baseline_limit}; expected 1 or more")
    if not isinstance(ood_sources, list | tuple) or not ood_sources:
        given = repr(ood_sources) if isinstance(ood_sources, str | list | tuple) else f"a {type(ood_sources).__name__}"
        raise FaroutError(f"out-of-distribution sources must be a list of at least one source, got {given}")
    out = expand_path(out)
    sources = [detector.open_images(images, limit=limit, reading=reading) for images in (id_source, *ood_sources)]
    unnamed = [source for images, source in zip((id_source, *ood_sources), sources) if _has_no_name(images)]
    for number, source in enumerate(unnamed if len(unnamed) > 1 else [], 1):
        source.name = f"{source.name} {number}"  # otherwise their rows in the tables would be named alike
    _warn_of_seen_images(detector, sources[0])

    own = EvaluatedDetector(name or method_name(detector), detector, out / "scores")
    with single_process():  # several processes of a launcher fit the same baselines
        baselines = fit_baselines(
            detector,
            out,
            standard_baselines=standard_baselines,
            trivial_baselines=trivial_baselines,
            random_weights_baseline=random_weights_baseline,
            baseline_images=baseline_images,
            baseline_limit=baseline_limit,
        )
    evaluated = [own, *baselines]
    datasets = [[_score_dataset(each, source, processes) for source in sources] for each in evaluated]

    def write_tables() -> Evaluation:
        rows = [row for each, scored in zip(evaluated, datasets) for row in _metric_rows(each, scored)]
        metrics = pd.DataFrame(rows, columns=COLUMNS)
        paths = [_write_metrics(metrics, out)]
        compared = [
            row
            for baseline, scored in zip(evaluated[1:], datasets[1:])
            for row in compare_detectors((own.name, datasets[0]), (baseline.name, scored), detector.seed)
        ]
        differences = pd.DataFrame(compared, columns=DIFFERENCE_COLUMNS)
        if len(differences):
            paths.append(write_table(differences, out / "differences.csv"))
        subsets = None
        if ood_subsets:
            averages = [
                row for each, scored in zip(evaluated, datasets) for row in _subset_rows(each, scored, ood_subsets)
            ]
            subsets = pd.DataFrame(averages)
            paths.append(write_table(subsets, out / "subsets.csv"))
        paths += [str(own.folder / folder_name(source) / "page.html") for source in sources[1:]]
        return Evaluation(metrics, differences, subsets, tuple(paths))

    return join_processes(detector.runtime.device).run_on_main_process(write_tables)


def _has_no_name(images: object) -> bool:
    """Whether a source is given as a Python object, all of which have the same name."""
    return not isinstance(images, str | Path | ImageSource)


def _warn_of_seen_images(detector: Detector, source: ImageSource) -> None:
    """Warn of in-distribution images that the detector was trained, fitted or calibrated on."""
    source = source.with_reduced_decoding(detector.preprocessing.reduced_decoding)
    seen = detector.statistics_hashes | detector.calibration_hashes | detector.trained_on
    count = sum(content_hash in seen for content_hash in source.content_hashes())
    if count:
        message = (
            f"{count} of {len(source)} images of {source.name} were used to train, fit or calibrate the detector: "
            "its results are too good; evaluate it on other images"
        )
        warnings.warn(message, MisleadingResultWarning, stacklevel=3)


def _score_dataset(evaluated: EvaluatedDetector, source: ImageSource, processes: int) -> ScoredDataset:
    """Score a source; the speed is known only if no scores or features were stored before."""
    cache_hits = evaluated.detector.cache_hits
    if DETECTORS.find_name(type(evaluated.detector)) is None:
        processes = 1  # it cannot be saved for them, such as the trivial baselines, which are fast
    out = evaluated.folder / folder_name(source)
    done = score_folder(evaluated.detector, source, out, top_images=12, processes=processes)
    readable = len(source) - len(done.unreadable)
    is_complete_run = done.scored_now == readable and evaluated.detector.cache_hits == cache_hits
    speed = done.scored_now / done.seconds if is_complete_run else float("nan")
    return ScoredDataset(source, read_scores(out), speed)


def _metric_rows(evaluated: EvaluatedDetector, datasets: Sequence[ScoredDataset]) -> Iterator[dict[str, Any]]:
    """Rows of `metrics.csv`: every indicator on every out-of-distribution dataset."""
    detector, (in_distribution, *others) = evaluated.detector, datasets
    cost = detector.cost()
    for ood in others:
        ids, ood_scores = shared_image_ids(in_distribution, ood), scores_by_indicator(ood.scores)
        for indicator, id_scores in scores_by_indicator(in_distribution.scores).items():
            own_name = detector.score_name if indicator == METHOD_SCORE else indicator
            calibration = detector.calibration_scores[own_name]
            metrics = detection_metrics(
                id_scores,
                ood_scores[indicator],
                image_ids=ids,
                seed=detector.seed,
                name=f"{evaluated.name}, {own_name}, {ood.source.name}",
                check_direction=indicator == METHOD_SCORE,
            )
            yield {
                "detector": evaluated.name,
                "preset": detector.provenance.get("preset", ""),
                "indicator": indicator,
                "protocol": detector.preprocessing.protocol,
                **dataset_columns(in_distribution.source.name, ood.source.name),
                "seed": detector.seed,
                **asdict(metrics),
                "alpha": detector.alpha,
                "false_alarm": false_alarm_rate(compute_p_values(id_scores, calibration), detector.alpha),
                "detection": detection_rate(compute_p_values(ood_scores[indicator], calibration), detector.alpha),
                "nfe": cost.nfe,
                "gmacs": round(cost.gmacs, 4),
                "images_per_s": round(ood.images_per_s, 2),
                "peak_mib": round(peak_memory_mib(), 1),
                "fit_s": detector.provenance.get("fit_s", float("nan")),
            }


def _subset_rows(
    evaluated: EvaluatedDetector, datasets: Sequence[ScoredDataset], count: int
) -> Iterator[dict[str, Any]]:
    """Rows of `subsets.csv`: every indicator on random subsets of every out-of-distribution dataset."""
    in_distribution, *others = datasets
    for ood in others:
        ood_scores = scores_by_indicator(ood.scores)
        for indicator, id_scores in scores_by_indicator(in_distribution.scores).items():
            yield {
                "detector": evaluated.name,
                "indicator": indicator,
                **dataset_columns(in_distribution.source.name, ood.source.name),
                **average_over_subsets(id_scores, ood_scores[indicator], count, seed=evaluated.detector.seed),
            }


def write_table(table: pd.DataFrame, path: Path) -> str:
    """Write a CSV table; returns its path as text."""
    write_csv(table, path)
    return str(path)


def _write_metrics(metrics: pd.DataFrame, out: Path) -> str:
    """Write `metrics.csv`, and remove the tables of an earlier evaluation that this one may not write."""
    path = out / "metrics.csv"
    if path.is_file():
        for name in ("differences.csv", "subsets.csv"):
            (out / name).unlink(missing_ok=True)
    return write_table(metrics, path)


def peak_memory_mib() -> float:
    """Peak memory so far in MiB: of the accelerator, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource  # not available on Windows

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def evaluate_scores(files: Sequence[str | Path], out: str | Path | None = None) -> Evaluation:
    """Compute metrics of given score tables, such as those of other software.

    A file is a table (.csv or .parquet) with the columns `key` and `score`, higher being more anomalous, or a folder
    written by `score_folder`. Other indicators are evaluated if both tables have them.

    Args:
        files: the in-distribution table first, then one or more out-of-distribution tables.
        out: folder of `metrics.csv`; None: nothing is written.

    Returns:
        An evaluation in which the columns that scores alone do not determine are empty.

    Raises:
        FaroutError: fewer than two files.
        StoreError: a file is missing or is not a score table.
    """
    if len(files) < 2:
        raise FaroutError(
            "scores require at least two files: the in-distribution one first, then out-of-distribution ones"
        )
    in_distribution = scores_by_indicator(read_scores(files[0]))
    rows = []
    names = [encode_name_once(str(file)) for file in files]
    for file, name in zip(files[1:], names[1:], strict=True):
        ood = scores_by_indicator(read_scores(file))
        for indicator in (name for name in in_distribution if name in ood):
            metrics = detection_metrics(
                in_distribution[indicator],
                ood[indicator],
                name=f"{indicator}, {file}",
                check_direction=indicator == METHOD_SCORE,
            )
            columns = {"detector": "given", "indicator": indicator, "id": names[0], "ood": name}
            rows.append({**columns, **asdict(metrics)})
    metrics_table = pd.DataFrame(rows).reindex(columns=COLUMNS)
    paths = () if out is None else (_write_metrics(metrics_table, expand_path(out)),)
    return Evaluation(metrics_table, paths=paths)
