"""Rating a detector: every indicator against every out-of-distribution source, with controls beside it."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from farout import store
from farout.calibration import p_values
from farout.detectors._tables import Scores
from farout.detectors.base import Detector
from farout.errors import FaroutError, TrapWarning
from farout.evaluation.beside import Beside, Rated, name_of, rated_beside
from farout.evaluation.draws import over_draws
from farout.evaluation.intervals import paired_difference
from farout.evaluation.metrics import detection, false_alarm
from farout.evaluation.metrics import evaluate as rate
from farout.evaluation.scoring import read_scores, score_folder
from farout.images import catalog
from farout.images.sources import ImageSource

__all__ = ["COLUMNS", "evaluate_detector", "evaluate_scores"]

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
PAIRED = ["first", "second", "id", "ood", "group", "role", "difference", "low", "high"]
"""Columns of `paired.csv`: AUROC of the first detector minus that of the second, with its 95 % interval."""


@dataclass
class _Side:
    """A scored source."""

    source: ImageSource
    scores: Scores
    images_per_s: float


def evaluate_detector(
    detector: Detector,
    id_source: Any,
    ood_sources: Sequence[Any],
    out: str | Path,
    *,
    limit: int | None = None,
    beside: Beside | None = None,
    ood_draws: int = 0,
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

    Returns:
        The table, one row per detector, indicator and out-of-distribution source.
    """
    detector.check_fitted()
    if ood_draws < 0:
        raise FaroutError(f"ood_draws is {ood_draws}; expected 0 or more")
    if isinstance(ood_sources, str) or not len(ood_sources):
        raise FaroutError(f"out-of-distribution sources are a list of at least one, got {ood_sources!r}")
    out = Path(out)
    inside, *outside = [detector.open(images, limit=limit) for images in (id_source, *ood_sources)]
    _check_unseen(detector, inside)
    rated = [Rated(name_of(detector), detector, out / "scores")]
    rated += rated_beside(detector, beside or Beside(), out)
    sides = [[_score(each, source) for source in (inside, *outside)] for each in rated]
    rows = [row for each, (first, *others) in zip(rated, sides) for row in _rows(each, first, others)]
    table = _written(pd.DataFrame(rows, columns=COLUMNS), out / "metrics.csv")
    paired = pd.DataFrame(_paired(rated, sides), columns=PAIRED)
    if len(paired):
        _written(paired, out / "paired.csv")
        table.attrs["paired"] = paired.to_dict("records")
        table.attrs["paths"] += paired.attrs["paths"]
    if ood_draws:
        drawn = [row for each, (first, *others) in zip(rated, sides) for row in _drawn(each, first, others, ood_draws)]
        table.attrs["paths"] += _written(pd.DataFrame(drawn), out / "draws.csv").attrs["paths"]
    table.attrs["paths"] += [str(out / "scores" / _slug(source) / "page.html") for source in outside]
    return table


def _paired(rated: Sequence[Rated], sides: Sequence[Sequence[_Side]]) -> Iterator[dict[str, Any]]:
    """AUROC of the first detector's score minus that of each other one's."""
    (own, *others), ((inside, *outside), *theirs) = rated, sides
    for other, (their_inside, *their_outside) in zip(others, theirs):
        for mine, their in zip(outside, their_outside):
            first = _shared(inside, their_inside), _shared(mine, their)
            if not len(first[0][0]) or not len(first[1][0]):
                continue
            groups = _shared_images(inside, mine)
            if groups is not None:
                groups = groups[0][first[0][2]], groups[1][first[1][2]]
            pairs = [(first[0][i], first[1][i]) for i in (0, 1)]
            found = paired_difference(pairs[0], pairs[1], groups=groups, seed=own.detector.seed)
            names = _names(inside.source.name, mine.source.name)
            yield {
                "first": own.name,
                "second": other.name,
                **names,
                "difference": found.value,
                "low": found.low,
                "high": found.high,
            }


def _shared(one: _Side, other: _Side) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of the images that both detectors scored, and which they are among the first one's."""
    theirs = dict(zip(other.scores.keys, other.scores.score, strict=True))
    second = np.array([theirs.get(key, np.nan) for key in one.scores.keys])
    good = np.isfinite(one.scores.score) & np.isfinite(second)
    return one.scores.score[good], second[good], good


def _check_unseen(detector: Detector, source: ImageSource) -> None:
    """Warns of in-distribution images that the detector has seen: they flatter it."""
    seen = detector.statistics_hashes | detector.calibration_hashes | detector.trained_on
    count = sum(name in seen for name in source.content_hashes())
    if count:
        message = f"{count} of {len(source)} images of {source.name} were used to train, fit or calibrate the detector"
        warnings.warn(f"{message}: its figures are too good; rate it on others", TrapWarning, stacklevel=3)


def _written(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Writes a table and notes its path with it."""
    with store.atomic_file(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    table.attrs["paths"] = [str(path)]
    return table


def _rows(rated: Rated, inside: _Side, others: Sequence[_Side]) -> Iterator[dict[str, Any]]:
    cost = rated.detector.cost()
    for outside in others:
        common = {
            "detector": rated.name,
            "preset": rated.detector.provenance.get("preset", ""),
            "protocol": rated.detector.preprocessing.protocol,
            "seed": rated.detector.seed,
            **_names(inside.source.name, outside.source.name),
            "nfe": cost.nfe,
            "gmacs": round(cost.gmacs, 4),
            "images_per_s": round(outside.images_per_s, 2),
            "peak_mib": round(peak_mib(), 1),
            "fit_s": rated.detector.provenance.get("fit_s", float("nan")),
        }
        yield from _indicator_rows(rated.detector, inside, outside, common)


def _drawn(rated: Rated, inside: _Side, others: Sequence[_Side], draws: int) -> Iterator[dict[str, Any]]:
    for outside in others:
        for name in ["score", *inside.scores.indicators]:
            own = rated.detector.score_name if name == "score" else name
            pair = inside.scores.indicators[own], outside.scores.indicators[own]
            yield {
                "detector": rated.name,
                "indicator": name,
                **_names(inside.source.name, outside.source.name),
                **over_draws(*pair, draws, seed=rated.detector.seed),
            }


def _indicator_rows(
    detector: Detector, inside: _Side, outside: _Side, common: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    groups = _shared_images(inside, outside)
    for name in ["score", *inside.scores.indicators]:
        own = detector.score_name if name == "score" else name
        id_scores, ood_scores = inside.scores.indicators[own], outside.scores.indicators[own]
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


def _score(rated: Rated, source: ImageSource) -> _Side:
    """Scores a source; its speed is known only where nothing was there before."""
    before = rated.detector.cache_hits
    done = score_folder(rated.detector, source, rated.folder / _slug(source), furthest=12)
    whole = done.scored_now == len(source) and rated.detector.cache_hits == before
    return _Side(source, read_scores(done.folder), done.scored_now / done.seconds if whole else float("nan"))


def _slug(source: ImageSource) -> str:
    """A folder name for a source: sources of one name, such as two tensors, differ in content."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", source.name).strip("_.") or "images"
    return f"{plain[-80:]}-{source.fingerprint()[:8]}"


def _names(id_name: str, ood_name: str) -> dict[str, str]:
    return {
        "id": id_name,
        "ood": ood_name,
        "group": catalog.group(id_name, ood_name),
        "role": catalog.role(id_name, ood_name),
    }


def _shared_images(inside: _Side, outside: _Side) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids of the source images behind the scores of both sides, where a variant of one is on the other: they are not
    independent.
    """
    first, second = _hashes(inside), _hashes(outside)
    return (first, second) if set(first) & set(second) - {""} else None


def _hashes(side: _Side) -> np.ndarray:
    """The content hash behind every score; empty for an unreadable image, which has no score."""
    known = dict(zip(side.source.keys, side.source.content_hashes(), strict=True))
    return np.array([known[key] or "" for key in side.scores.keys])


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
    """
    if len(files) < 2:
        raise FaroutError(
            "scores want at least two files: the in-distribution one first, then out-of-distribution ones"
        )
    inside = read_scores(files[0])
    rows = []
    for file in files[1:]:
        outside = read_scores(file)
        shared = [name for name in inside.indicators if name in outside.indicators]
        for name in ["score", *shared]:
            pair = [side.score if name == "score" else side.indicators[name] for side in (inside, outside)]
            common = {"detector": "given", "indicator": name, "id": str(files[0]), "ood": str(file)}
            rows.append({**common, **asdict(rate(pair[0], pair[1], name=f"{name}, {file}"))})
    table = pd.DataFrame(rows).reindex(columns=COLUMNS)
    return table if out is None else _written(table, Path(out) / "metrics.csv")
