"""The semantic detector and what needs no diffusion, on the same cached features: AUROC over seeds, paired differences.

    FAROUT_DATA=… python benchmarks/features.py far --protocols native direct common --out rows.csv
    FAROUT_DATA=… python benchmarks/features.py near --out rows.csv
    python benchmarks/features.py table --out rows.csv

Every run adds its rows to the file as soon as it has them, and leaves out what is there.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import machine, table

from farout import registry
from farout.detectors.base import Detector, Scores
from farout.detectors.semantic import Semantic
from farout.evaluation.controls import TrivialControls
from farout.evaluation.intervals import paired_difference
from farout.evaluation.metrics import evaluate
from farout.images.sources import ImageSource, open_source

CIFAR_NAMES = (
    *("bullfrog", "black stork", "albatross", "chihuahua", "golden retriever", "german shepherd", "tabby"),
    *("egyptian cat", "gazelle", "beach wagon", "convertible", "limousine", "gondola", "trolleybus", "tractor"),
)
"""Classes of Tiny-ImageNet that name, or are a kind of, a class of CIFAR-10: not out of its distribution."""

ANIMALS, VEHICLES = "2,3,4,5,6,7", "0,1,8,9"
COLUMNS = ["task", "protocol", "seed", "detector", "indicator", "ood", "auroc", "low", "high", "fpr95", "difference"]
COLUMNS += ["difference_low", "difference_high", "n_id", "n_ood", "fit_s"]


@dataclass(frozen=True)
class Task:
    """One in-distribution set, its test images, and what is to be told from it."""

    name: str
    train: str
    test: str
    ood: dict[str, str]
    train_limit: int
    protocol: str = "native"
    seeds: tuple[int, ...] = (0,)
    backbones: tuple[str | None, ...] = (None,)
    limit: int = 1000
    extra: dict[str, Any] = field(default_factory=dict)


def far(protocols: Sequence[str], seeds: Sequence[int]) -> Iterator[Task]:
    """CIFAR-10 against other sets."""
    names = open_source("tiny_imagenet:test").class_names or ()
    kept = ",".join(str(number) for number, name in enumerate(names) if name not in CIFAR_NAMES)
    ood = {"tiny_imagenet": f"tiny_imagenet:test@classes={kept}", "textures": "textures:test", "mnist": "mnist:test"}
    for protocol in protocols:
        yield Task(
            "cifar10", "cifar10:train", "cifar10:test", ood, 10000, protocol, tuple(seeds), (None, "random"), limit=1000
        )


def near(seeds: Sequence[int]) -> Iterator[Task]:
    """Classes of one set against its other classes."""
    for name, inside, outside in (("animals", ANIMALS, VEHICLES), ("vehicles", VEHICLES, ANIMALS)):
        sources = [f"cifar10:{part}@classes={classes}" for part, classes in _parts(inside, outside)]
        yield Task(f"cifar10 {name}", sources[0], sources[1], {"other classes": sources[2]}, 5000, seeds=tuple(seeds))
    for split in range(5):
        yield _split("tiny_imagenet", 100, 50, split, 5000)
    for split in range(5):
        yield _split("fashion_mnist", 10, 8, split, 4000)


def _parts(inside: str, outside: str) -> tuple[tuple[str, str], ...]:
    return (("train", inside), ("test", inside), ("test", outside))


def _split(name: str, classes: int, kept: int, split: int, train_limit: int) -> Task:
    order = np.random.default_rng(split).permutation(classes)
    inside, outside = (",".join(map(str, sorted(part.tolist()))) for part in (order[:kept], order[kept:]))
    sources = [f"{name}:{part}@classes={chosen}" for part, chosen in _parts(inside, outside)]
    ood = {"other classes": sources[2]}
    return Task(f"{name} split {split}", sources[0], sources[1], ood, train_limit, seeds=(split,))


def detectors(task: Task, seed: int, backbone: str | None) -> Iterator[tuple[str, Detector]]:
    """Every method once a seed; what has no randomness but the split is fitted anew all the same."""
    shared = {"weights": backbone}
    prefix = "" if backbone is None else f"{backbone} backbone: "
    yield f"{prefix}semantic", Semantic(**shared, **task.extra)
    if backbone is None:
        for name in Semantic.companions:
            if name != "autoencoder" or seed == task.seeds[0]:
                yield name, registry.find("detectors", name).load()(**shared)
        yield "trivial_controls", TrivialControls()
    else:
        yield f"{prefix}mahalanobis", registry.find("detectors", "mahalanobis").load()(**shared)


def run(task: Task, out: Path) -> None:
    """Fits and rates everything of a task that the file lacks."""
    for seed in task.seeds:
        reference: dict[str, Scores] = {}
        for backbone in task.backbones if seed == task.seeds[0] else (None,):
            for name, detector in detectors(task, seed, backbone):
                if _known(out, task, seed, name) and (name != "semantic"):
                    continue
                rows = list(_rated(task, seed, name, detector, reference))
                if not _known(out, task, seed, name):
                    frame = pd.DataFrame(rows, columns=COLUMNS)
                    frame.to_csv(out, mode="a", header=not out.is_file(), index=False)
                print(task.name, task.protocol, seed, name, *(f"{row['auroc']:.3f}" for row in rows[:3]), flush=True)


def _known(out: Path, task: Task, seed: int, name: str) -> bool:
    if not out.is_file():
        return False
    done = pd.read_csv(out)
    same = (done["task"] == task.name) & (done["protocol"] == task.protocol)
    return bool((same & (done["seed"] == seed) & (done["detector"] == name)).any())


def _rated(
    task: Task, seed: int, name: str, detector: Detector, reference: dict[str, Scores]
) -> Iterator[dict[str, Any]]:
    limit = {"limit": min(1000, task.train_limit)} if name == "trivial_controls" else {"limit": task.train_limit}
    started = time.perf_counter()
    detector.fit(task.train, seed=seed, protocol=task.protocol, **limit)
    fit_s = round(time.perf_counter() - started, 1)
    inside = detector.score(_chosen(task.test, task.limit))
    for ood, spec in task.ood.items():
        outside = detector.score(_chosen(spec, task.limit))
        if name == "semantic":
            reference |= {"id": inside, ood: outside}
        for indicator in ("score", *inside.indicators):
            own = detector.score_name if indicator == "score" else indicator
            pair = inside.indicators[own], outside.indicators[own]
            rated = evaluate(*pair)
            # of the default score of the semantic detector to this one
            base = (reference["id"].score, reference[ood].score)
            paired = paired_difference(base, pair)
            yield {
                **{"task": task.name, "protocol": task.protocol, "seed": seed, "detector": name, "ood": ood},
                **{"indicator": indicator, "auroc": rated.auroc, "low": rated.auroc_low, "high": rated.auroc_high},
                **{"fpr95": rated.fpr95, "n_id": rated.n_id, "n_ood": rated.n_ood, "fit_s": fit_s},
                "difference": paired.value,
                "difference_low": paired.low,
                "difference_high": paired.high,
            }


def _chosen(spec: str, limit: int) -> ImageSource:
    """The same test images for every seed and method."""
    return open_source(spec, limit=limit, seed=0)


def summary(rows: pd.DataFrame) -> str:
    """One table per task and protocol: mean AUROC over seeds, the widest interval of one seed, and how often the paired
    interval to the semantic detector's default score excludes zero (+ it is ahead, - it is behind).
    """
    parts = [machine()]
    rows = rows.assign(task=rows["task"].str.replace(r" split \d", " splits", regex=True))
    for (task, protocol), some in rows.groupby(["task", "protocol"], sort=False):
        oods = list(dict.fromkeys(some["ood"]))
        lines = []
        for (detector, indicator), each in some.groupby(["detector", "indicator"], sort=False):
            cells = [_cell(each[each["ood"] == ood]) for ood in oods]
            lines.append([detector, indicator, each["seed"].nunique(), *cells])
        counts = f"n = {some['n_id'].max()} in, {some['n_ood'].min()} to {some['n_ood'].max()} out"
        parts.append(
            f"**{task}**, protocol {protocol}, {counts}\n\n" + table(["detector", "score", "runs", *oods], lines)
        )
    return "\n\n".join(parts)


def _cell(rows: pd.DataFrame) -> str:
    ahead, behind = int((rows["difference_low"] > 0).sum()), int((rows["difference_high"] < 0).sum())
    decided = "".join([f" +{ahead}" if ahead else "", f" -{behind}" if behind else ""])
    spread = f"{rows['auroc'].min():.3f}-{rows['auroc'].max():.3f}, " if len(rows) > 1 else ""
    return f"{rows['auroc'].mean():.3f} ({spread}{rows['low'].min():.3f} to {rows['high'].max():.3f}){decided}"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["far", "near", "table"])
    parser.add_argument("--protocols", nargs="+", default=["native"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.what == "table":
        print(summary(pd.read_csv(given.out)))
        return
    for task in far(given.protocols, given.seeds) if given.what == "far" else near(given.seeds):
        run(task, given.out)


if __name__ == "__main__":
    main()
