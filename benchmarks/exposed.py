"""What the benchmarks of classifiers that learn from outliers share: scores, rows, tables."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import auroc_cell, compared, machine, table

from farout.classifiers.model import Classifier
from farout.data.batching import batches
from farout.data.image_source import ImageSource

NONE = "none"
PROBE = "round trip"
"""In-distribution test images against the generator's reconstructions of them: 0.5 is honest."""


def outward(classifier: Classifier, source: ImageSource) -> dict[str, np.ndarray]:
    """Scores of logits, an image each, higher is further out: msp, max_logit and energy."""
    logits = torch.cat(
        [classifier.outputs(batch.images, 64).logits for batch in batches(source, classifier.preprocessing, 64)]
    ).double()
    found = {"msp": logits.softmax(1).amax(1), "max_logit": logits.amax(1), "energy": logits.logsumexp(1)}
    return {name: -score.numpy() for name, score in found.items()}


def rated(scores: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """A row for each set, with the lead over the classifier that learns from nothing else."""
    for ood in list(scores)[1:]:
        same = np.arange(len(scores["id"]))
        groups = (same, same[: len(scores[ood])]) if ood == PROBE else None
        pair = (scores["id"], scores[ood])
        yield {"ood": ood, **compared(pair, pair, (base["id"], base[ood]), groups)}


def summary(rows: pd.DataFrame) -> str:
    """AUROC, FPR95 and the lead over `none` by set, means over seeds."""
    counts = (
        f"{rows['seed'].nunique()} seeds, {rows['steps'].iloc[0]} updates, n = {rows['n_id'].max()} in; {machine()}"
    )
    return "\n\n".join([counts, by_set(rows, auroc_cell), by_set(rows, fpr95_cell), by_set(rows, lead_cell)])


def by_set(rows: pd.DataFrame, cell: Any) -> str:
    """A table of one cell for each case and set."""
    oods = list(dict.fromkeys(rows["ood"]))
    lines = []
    for name, each in rows.groupby("case", sort=False):
        accuracy = each.groupby("seed")["accuracy"].first()
        cells = [cell(each[each["ood"] == ood]) for ood in oods]
        lines.append([name, len(accuracy), f"{accuracy.mean():.3f}", *cells])
    return table(["learns from", "seeds", "accuracy", *oods], lines)


def fpr95_cell(rows: pd.DataFrame) -> str:
    """Mean over seeds."""
    return f"{rows['fpr95'].mean():.2f}"


def lead_cell(rows: pd.DataFrame) -> str:
    """Mean lead over seeds, its range, and in how many seeds the interval excludes zero, ahead and behind."""
    lead = rows["difference"]
    ahead, behind = int((rows["difference_low"] > 0).sum()), int((rows["difference_high"] < 0).sum())
    return f"{lead.mean():+.3f} ({lead.min():+.3f} to {lead.max():+.3f}) +{ahead} -{behind}"


def arguments(about: str | None, what: Sequence[str], *, count: int, steps: int) -> argparse.ArgumentParser:
    """The command line of such a benchmark, with these defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=what)
    parser.add_argument("work", type=Path, nargs="?", help="folder of outliers, reconstructions and classifiers")
    parser.add_argument("--networks", type=Path, help="folder of denoising.py's networks, trained where missing")
    parser.add_argument("--count", type=int, default=count, help="outliers of each method")
    parser.add_argument("--test", type=int, default=500, help="test images of a set")
    parser.add_argument("--steps", type=int, default=steps, help="updates of a classifier")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path)
    return parser


def read(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was typed; ends with a message where something is missing."""
    given = parser.parse_args()
    wanted = {"table": ["out"], "make": ["work", "networks"]}.get(given.what, ["work", "networks", "out"])
    missing = [name for name in wanted if getattr(given, name) is None]
    if missing:
        parser.error(f"{given.what} wants {', '.join(missing)}")
    warnings.simplefilter("ignore")
    return given
