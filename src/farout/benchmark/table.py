"""The tables of a benchmark: all rows with markers, means of groups, and who is ahead of whom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from farout.benchmark.plan import Job, Plan
from farout.benchmark.spec import DetectorSpec
from farout.core.errors import FaroutError
from farout.data.image_source import ImageSource
from farout.evaluation.baselines import TRIVIAL
from farout.evaluation.evaluate import COLUMNS
from farout.evaluation.scored_datasets import OWN, PAIRED, Side, by_indicator, paired, slug
from farout.scoring.folder import read_scores

__all__ = ["GROUPS", "MARKERS", "behind", "group_means", "leads", "marked", "rated_sides", "words_of"]

MARKERS = {
    "control": "a trivial or random-weights baseline",
    "size": "the set's native size differs from that of the in-distribution images: resizing alone may distinguish it",
    "overlap": "images or classes of the set are among the in-distribution ones",
    "backbone": "it uses a network pretrained on other images, which may resemble either side",
    "constant": "all scores are equal",
    "below half": "AUROC below one half: the set's images have lower scores than the in-distribution ones",
    "unbeaten": "no other method's AUROC is significantly higher (paired 95 % interval) in any seed",
}
"""Words of the column `marker`, and what they mean; `untested` sets have no rows."""
GROUPS = [
    "bench", "detector", "indicator", "group", "auroc", "auroc_std", "aupr_in", "aupr_out", "fpr95", "fpr95_std",
    "false_alarm", "detection", "sets", "untested", "seeds", "marker",
]  # fmt: skip
"""Columns of `groups.csv`: means over seeds of the means over sets; _std: deviation over seeds of these (n - 1); sets:
those with figures, which a set without a readable image has not."""
_MEANS = ("auroc", "aupr_in", "aupr_out", "fpr95", "false_alarm", "detection")


def rated_sides(job: Job, sources: Sequence[ImageSource]) -> list[Side]:
    """What a job scored of these sources, the in-distribution one first."""
    return [Side(source, read_scores(job.folder / "scores" / slug(source))) for source in sources]


def marked(
    plan: Plan, jobs: Iterable[tuple[Job, Sequence[Side]]], facts: Mapping[str, Mapping[str, Any]], ahead: pd.DataFrame
) -> pd.DataFrame:
    """All rows of jobs that are done, with the benchmark's groups, its name and markers.

    Args:
        plan: of the benchmark.
        jobs: each with what it scored.
        facts: by source, what is known of it; its `markers` go to its rows.
        ahead: see `leads`.
    """
    tables, beaten = [], behind(plan, ahead)
    for job, sides in jobs:
        table = pd.read_csv(job.folder / "metrics.csv", keep_default_na=False, na_values=[""], dtype={"preset": str})
        table = table[table["ood"].isin(plan.present)].fillna({"preset": "", "group": "", "role": ""})
        constant = set(_constant(sides))
        own = list(_of_detector(plan, job))
        words = [
            [*own, *facts[row["ood"]]["markers"], *_of_row(row, constant, job.name in plan.spec.detectors, beaten)]
            for row in table.to_dict("records")
        ]
        about = {"group": table["ood"].map(plan.spec.group), "bench": plan.spec.name}
        tables.append(table.assign(**about, marker=[_joined(each) for each in words]))
    if not tables:
        raise FaroutError(f"nothing of the benchmark {plan.spec.name} is evaluated yet")
    return pd.concat(tables, ignore_index=True)[[*COLUMNS, "bench", "marker"]]


def _joined(words: Iterable[str]) -> str:
    """In the order of `MARKERS`, each once."""
    found = set(words)
    return ";".join(word for word in MARKERS if word in found)


def words_of(marker: str) -> list[str]:
    """The words of a cell of the column `marker`, which semicolons part."""
    return [word for word in marker.split(";") if word]


def _of_row(
    row: Mapping[str, Any], constant: set[tuple[str, str]], method: bool, beaten: set[tuple[str, str]]
) -> Iterator[str]:
    if (row["ood"], row["indicator"]) in constant:
        yield "constant"
    if row["auroc"] < 0.5:
        yield "below half"
    if method and row["indicator"] == OWN and row["n_ood"] and (row["detector"], row["ood"]) not in beaten:
        yield "unbeaten"


def _constant(sides: Sequence[Side]) -> Iterator[tuple[str, str]]:
    """Sets and indicators for which all scores, those of the in-distribution images included, are equal."""
    inside, *outside = sides
    for side in outside:
        theirs = by_indicator(side.scores)
        for name, mine in by_indicator(inside.scores).items():
            values = np.concatenate([mine, theirs[name]])
            values = values[np.isfinite(values)]
            if len(values) and np.ptp(values) == 0:
                yield side.source.name, name


def _of_detector(plan: Plan, job: Job) -> Iterator[str]:
    if job.name == TRIVIAL:
        yield "control"
        return
    of = plan.job("detectors", job.name, job.seed).control_of
    if of is not None:
        yield "control"
    if _knows_other_images(plan, plan.spec.detectors[of or job.name], random=of is not None):
        yield "backbone"


def _knows_other_images(plan: Plan, entry: DetectorSpec, *, random: bool) -> bool:
    """Whether a frozen backbone, a perceptual distance or a given network was trained on images of elsewhere."""
    needs, config = entry.made().needs, entry.arguments
    own_weights = config.get("weights") == "random" or (random and "diffusion" not in needs)
    compared = {*config.get("metrics", ()), *config.get("density_metrics", ())}
    named = [plan.spec.networks[name] for name in (entry.diffusion, entry.classifier) if name is not None]
    given = any(network.folder is not None for network in named) and not random
    return ("features" in needs and not own_weights) or "perceptual" in compared or given


def group_means(plan: Plan, metrics: pd.DataFrame) -> pd.DataFrame:
    """Means over the sets of a group and the seeds, see `GROUPS`."""
    rows = []
    for (detector, indicator, group), part in metrics.groupby(["detector", "indicator", "group"], sort=False):
        by_seed = part.groupby("seed")[list(_MEANS)].mean()
        spread = by_seed.std(ddof=1)
        words = {word for text in part["marker"] for word in words_of(text)} - {"unbeaten"}
        row = {"bench": plan.spec.name, "detector": detector, "indicator": indicator, "group": group}
        row |= by_seed.mean().to_dict() | {f"{name}_std": spread[name] for name in ("auroc", "fpr95")}
        row |= {"sets": part.loc[part["auroc"].notna(), "ood"].nunique(), "seeds": len(by_seed)}
        untested = sum(source in plan.absent for source in plan.spec.ood[str(group)])
        rows.append({**row, "untested": untested, "marker": _joined(words)})
    return pd.DataFrame(rows, columns=GROUPS)


def leads(jobs: Sequence[tuple[Job, Sequence[Side]]]) -> pd.DataFrame:
    """AUROC of each detector's own score minus that of every other one of the same seed, on the same images, with its
    interval; columns of `PAIRED`, and seed.
    """
    rows = []
    for (one, mine), (other, theirs) in combinations(jobs, 2):
        if one.seed == other.seed:
            for row in paired((one.name, mine), (other.name, theirs), one.seed):
                turned = {"difference": -row["difference"], "low": -row["high"], "high": -row["low"]}
                back = {**row, "first": row["second"], "second": row["first"], **turned}
                rows += [{**each, "seed": one.seed} for each in (row, back)]
    return pd.DataFrame(rows, columns=[*PAIRED, "seed"])


def behind(plan: Plan, ahead: pd.DataFrame) -> set[tuple[str, str]]:
    """Of `leads`, detectors and sets on which a method is ahead in some seed; controls are not in the race."""
    beaten = ahead[(ahead["high"] < 0) & ahead["second"].isin(list(plan.spec.detectors))]
    return set(zip(beaten["first"], beaten["ood"]))
