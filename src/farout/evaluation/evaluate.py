"""Rating a detector: every indicator against every out-of-distribution source, with controls beside it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from farout.core import store
from farout.core.errors import FaroutError, TrapWarning
from farout.data.image_source import ImageSource
from farout.detectors.base import Detector
from farout.detectors.calibration import p_values
from farout.evaluation.comparison import Beside, Rated, name_of, rated_beside
from farout.evaluation.metrics import detection, false_alarm
from farout.evaluation.metrics import evaluate as rate
from farout.evaluation.ood_draws import over_draws
from farout.evaluation.scored_datasets import OWN, PAIRED, Side, by_indicator, names, paired, shared_images, slug
from farout.scoring.folder import read_scores, score_folder

__all__ = ["COLUMNS", "evaluate_detector", "evaluate_scores", "peak_mib", "written"]

COLUMNS = [
    "detector",
    "preset",
    "indicator",
    "protocol",
    "id",
    "ood",
    "group",
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


def evaluate_detector(
    detector: Detector,
    id_source: Any,
    ood_sources: Sequence[Any],
    out: str | Path,
    *,
    limit: int | None = None,
    beside: Beside | None = None,
    ood_draws: int = 0,
    name: str | None = None,
) -> pd.DataFrame:
    """Scores all sources into `out/scores/`, rates every indicator, and writes `out/metrics.csv`; and the differences
    between the detector's score and the others' on the same images, with their intervals, as `out/paired.csv`.

    Args:
        detector: a fitted detector.
        id_source: in-distribution images that the detector has not seen.
        ood_sources: out-of-distribution sources.
        out: folder of the results; an interrupted run goes on there.
        limit: a seeded sample of this many images of each source.
        beside: what else is rated; None: the methods that the detector names, and trivial controls.
        ood_draws: also write `out/draws.csv`: means and deviations over this many random draws of a fifth as many
            out-of-distribution images as in-distribution ones, the protocol of many papers (see `over_draws`).
        name: what the detector is called in the tables; None: as its method.

    Returns:
        The table, one row per detector, indicator and out-of-distribution source; `attrs["paths"]`: what was written.

    Raises:
        FaroutError: for a detector that is not fitted, no out-of-distribution source, fewer than 0 draws.
        StoreError: where scores of another detector or of other images are in the folder.
    """
    detector.check_fitted()
    if ood_draws < 0:
        raise FaroutError(f"ood_draws is {ood_draws}; expected 0 or more")
    if isinstance(ood_sources, str) or not len(ood_sources):
        raise FaroutError(f"out-of-distribution sources are a list of at least one, got {ood_sources!r}")
    out = Path(out)
    inside, *outside = [detector.open(images, limit=limit) for images in (id_source, *ood_sources)]
    _check_unseen(detector, inside)
    rated = [Rated(name or name_of(detector), detector, out / "scores")]
    rated += rated_beside(detector, beside or Beside(), out)
    sides = [[_score(each, source) for source in (inside, *outside)] for each in rated]
    rows = [row for each, (inner, *outer) in zip(rated, sides) for row in _rows(each, inner, outer)]
    table = _metrics_into(out, pd.DataFrame(rows, columns=COLUMNS))
    (first, *others), (own, *theirs) = [each.name for each in rated], sides
    leads = [paired((first, own), pair, detector.seed) for pair in zip(others, theirs, strict=True)]
    differences = pd.DataFrame([row for lead in leads for row in lead], columns=PAIRED)
    if len(differences):
        written(differences, out / "paired.csv")
        table.attrs["paired"] = differences.to_dict("records")
        table.attrs["paths"] += differences.attrs["paths"]
    if ood_draws:
        drawn = [row for each, (inner, *outer) in zip(rated, sides) for row in _drawn(each, inner, outer, ood_draws)]
        table.attrs["paths"] += written(pd.DataFrame(drawn), out / "draws.csv").attrs["paths"]
    table.attrs["paths"] += [str(out / "scores" / slug(source) / "page.html") for source in outside]
    return table


def _check_unseen(detector: Detector, source: ImageSource) -> None:
    """Warns of in-distribution images that the detector has seen: they flatter it."""
    seen = detector.statistics_hashes | detector.calibration_hashes | detector.trained_on
    count = sum(name in seen for name in source.content_hashes())
    if count:
        message = f"{count} of {len(source)} images of {source.name} were used to train, fit or calibrate the detector"
        warnings.warn(f"{message}: its results are too good; evaluate it on other images", TrapWarning, stacklevel=3)


def written(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Writes a table and notes its path with it."""
    with store.atomic_file(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    table.attrs["paths"] = [str(path)]
    return table


def _metrics_into(out: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Writes `metrics.csv`; with that of an earlier run go its tables that this one may not write."""
    path = out / "metrics.csv"
    if path.is_file():
        for name in ("paired.csv", "draws.csv"):
            (out / name).unlink(missing_ok=True)
    return written(table, path)


def _rows(rated: Rated, inside: Side, others: Sequence[Side]) -> Iterator[dict[str, Any]]:
    cost = rated.detector.cost()
    for outside in others:
        common = {
            "detector": rated.name,
            "preset": rated.detector.provenance.get("preset", ""),
            "protocol": rated.detector.preprocessing.protocol,
            "seed": rated.detector.seed,
            **names(inside.source.name, outside.source.name),
            "nfe": cost.nfe,
            "gmacs": round(cost.gmacs, 4),
            "images_per_s": round(outside.images_per_s, 2),
            "peak_mib": round(peak_mib(), 1),
            "fit_s": rated.detector.provenance.get("fit_s", float("nan")),
        }
        yield from _indicator_rows(rated.detector, inside, outside, common)


def _drawn(rated: Rated, inside: Side, others: Sequence[Side], draws: int) -> Iterator[dict[str, Any]]:
    for outside in others:
        theirs = by_indicator(outside.scores)
        for name, mine in by_indicator(inside.scores).items():
            yield {
                "detector": rated.name,
                "indicator": name,
                **names(inside.source.name, outside.source.name),
                **over_draws(mine, theirs[name], draws, seed=rated.detector.seed),
            }


def _indicator_rows(
    detector: Detector, inside: Side, outside: Side, common: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    groups, theirs = shared_images(inside, outside), by_indicator(outside.scores)
    for name, id_scores in by_indicator(inside.scores).items():
        own, ood_scores = detector.score_name if name == OWN else name, theirs[name]
        calibration = detector.calibration_scores[own]
        what = f"{common['detector']}, {own}, {outside.source.name}"
        yield {
            **common,
            "indicator": name,
            **asdict(rate(id_scores, ood_scores, groups=groups, seed=detector.seed, name=what)),
            "alpha": detector.alpha,
            "false_alarm": false_alarm(p_values(id_scores, calibration), detector.alpha),
            "detection": detection(p_values(ood_scores, calibration), detector.alpha),
        }


def _score(rated: Rated, source: ImageSource) -> Side:
    """Scores a source; its speed is known only where nothing was there before."""
    before = rated.detector.cache_hits
    done = score_folder(rated.detector, source, rated.folder / slug(source), furthest=12)
    whole = done.scored_now == len(source) and rated.detector.cache_hits == before
    return Side(source, read_scores(done.folder), done.scored_now / done.seconds if whole else float("nan"))


def peak_mib() -> float:
    """The most memory held so far: of the accelerator, or of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import psutil

    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if peak is not None:
        return float(peak) / 2**20
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def evaluate_scores(files: Sequence[str | Path], out: str | Path | None = None) -> pd.DataFrame:
    """Rates anyone's scores: the first file is the in-distribution set, each further one an out-of-distribution set.

    A file is a table (.csv or .parquet) with columns key and score, higher = further out, or a scored folder.
    Indicators are rated where both sides have them.

    Args:
        files: at least two.
        out: folder for `metrics.csv`; None: nothing is written.

    Returns:
        The table of `evaluate_detector`; columns that scores do not tell are empty.

    Raises:
        FaroutError: for fewer than two files.
        StoreError: for a file that is missing or is no score table.
    """
    if len(files) < 2:
        raise FaroutError(
            "scores require at least two files: the in-distribution one first, then out-of-distribution ones"
        )
    inside = by_indicator(read_scores(files[0]))
    rows = []
    for file in files[1:]:
        outside = by_indicator(read_scores(file))
        for name in (name for name in inside if name in outside):
            common = {"detector": "given", "indicator": name, "id": str(files[0]), "ood": str(file)}
            rows.append({**common, **asdict(rate(inside[name], outside[name], name=f"{name}, {file}"))})
    table = pd.DataFrame(rows).reindex(columns=COLUMNS)
    return table if out is None else _metrics_into(Path(out), table)
