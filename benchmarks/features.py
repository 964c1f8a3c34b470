"""The semantic detector and what needs no diffusion, on the same cached features: AUROC over seeds, paired differences.

    FAROUT_DATA=… python benchmarks/features.py far --protocols native direct common --out rows.csv
    FAROUT_DATA=… python benchmarks/features.py near --out rows.csv
    FAROUT_DATA=… python benchmarks/features.py dev --out dev.csv
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
import torch
from common import VARIANTS, auroc_cell, compared, decided, known, machine, table

from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.detectors import DETECTORS
from farout.detectors.base import Detector, Scores
from farout.detectors.semantic import Semantic
from farout.evaluation.trivial_baselines import TrivialBaselines

CIFAR_NAMES = (
    *("bullfrog", "black stork", "albatross", "chihuahua", "golden retriever", "german shepherd", "tabby"),
    *("egyptian cat", "gazelle", "beach wagon", "convertible", "limousine", "gondola", "trolleybus", "tractor"),
)
"""Classes of Tiny-ImageNet that name, or are a kind of, a class of CIFAR-10: not out of its distribution."""

ANIMALS, VEHICLES = (2, 3, 4, 5, 6, 7), (0, 1, 8, 9)
COLUMNS = ["task", "protocol", "seed", "detector", "indicator", "ood", "auroc", "low", "high", "fpr95", "difference"]
COLUMNS += ["difference_low", "difference_high", "n_id", "n_ood", "fit_s"]


@dataclass(frozen=True)
class Task:
    """One in-distribution set and what is to be told from it; `inside`: its classes, the others are out."""

    name: str
    data: str
    ood: dict[str, str] = field(default_factory=dict)
    inside: frozenset[int] = frozenset()
    train_limit: int = 10000
    limit: int = 1000
    sample: int = 0
    protocol: str = "native"
    seeds: tuple[int, ...] = (0,)
    random_backbone: bool = False

    def train(self, limit: int | None = None) -> ImageSource:
        """The training images: the same for every seed and method."""
        chosen = open_source(f"{self.data}:train", limit=self.train_limit, seed=self.sample)
        return open_source(_of_classes(chosen, self.inside), limit=limit)

    def test(self) -> ImageSource:
        """In-distribution test images."""
        return _of_classes(open_source(f"{self.data}:test", limit=self.limit), self.inside)

    def outside(self) -> dict[str, ImageSource]:
        """Out-of-distribution images by name."""
        if not self.inside:
            return {name: open_source(spec, limit=self.limit) for name, spec in self.ood.items()}
        test = open_source(f"{self.data}:test", limit=self.limit)
        return {"other classes": _of_classes(test, frozenset(test.labels or ()) - self.inside)}


@dataclass(frozen=True)
class DevTask(Task):
    """Training images only: some are fitted, of the rest one half is in-distribution and the other half is changed."""

    held: int = 1000

    def _parts(self) -> tuple[ImageSource, list[int], list[int], list[int]]:
        source = open_source(f"{self.data}:train", limit=self.train_limit + self.held, seed=1)
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
        fitted, held = order[: self.train_limit], order[self.train_limit :]
        return source, fitted, held[len(held) // 2 :], held[: len(held) // 2]

    def train(self, limit: int | None = None) -> ImageSource:
        """The fitted part."""
        source, fitted, *_ = self._parts()
        return open_source(source.subset(fitted), limit=limit)

    def test(self) -> ImageSource:
        """One half of the rest."""
        source, _, plain, _ = self._parts()
        return source.subset(plain)

    def outside(self) -> dict[str, ImageSource]:
        """The other half, changed in six ways."""
        changed = self._parts()[3]
        total = self.train_limit + self.held
        return {
            name: open_source(f"{self.data}:train@{name}", limit=total, seed=1).subset(changed) for name in VARIANTS
        }


def dev() -> Iterator[Task]:
    """The sources that defaults are chosen on."""
    for data, count, held in (("cifar10", 5000, 1000), ("tiny_imagenet", 4000, 1000), ("fashion_mnist", 3000, 800)):
        yield DevTask(f"dev {data}", data, train_limit=count, held=held)


def _of_classes(source: ImageSource, classes: frozenset[int]) -> ImageSource:
    if not classes or source.labels is None:
        return source
    return source.subset([i for i, label in enumerate(source.labels) if label in classes])


def far(protocols: Sequence[str], seeds: Sequence[int]) -> Iterator[Task]:
    """CIFAR-10 against other sets; fewer images and no random backbone where the protocol is not the default one."""
    names = open_source("tiny_imagenet:test").class_names or ()
    kept = ",".join(str(number) for number, name in enumerate(names) if name not in CIFAR_NAMES)
    ood = {"tiny_imagenet": f"tiny_imagenet:test@classes={kept}", "textures": "textures:test", "mnist": "mnist:test"}
    for protocol in protocols:
        counts = {"train_limit": 10000, "limit": 1000} if protocol == "native" else {"train_limit": 4000, "limit": 500}
        yield Task(
            "cifar10",
            "cifar10",
            ood,
            protocol=protocol,
            seeds=tuple(seeds),
            random_backbone=protocol == "native",
            **counts,
        )


def near(seeds: Sequence[int]) -> Iterator[Task]:
    """Classes of one set against its other classes."""
    for name, inside in (("animals", ANIMALS), ("vehicles", VEHICLES)):
        yield Task(f"cifar10 {name} in", "cifar10", inside=frozenset(inside), seeds=tuple(seeds))
    for split in range(5):
        yield _split("tiny_imagenet", 100, 50, split, 5000)
    for split in range(5):
        yield _split("fashion_mnist", 10, 8, split, 3800)


def _split(name: str, classes: int, kept: int, split: int, train_limit: int) -> Task:
    inside = np.random.default_rng(split).permutation(classes)[:kept].tolist()
    return Task(
        f"{name} split {split}", name, inside=frozenset(inside), train_limit=train_limit, sample=1, seeds=(split,)
    )


def detectors(task: Task, seed: int) -> Iterator[tuple[str, Detector, int | None]]:
    """Name, method and limit of its training images; what costs much and has no weights of its own, once."""
    yield "semantic", Semantic(regret=True), None
    for name in Semantic.companions:
        if name != "autoencoder" or seed == task.seeds[0]:
            yield name, DETECTORS[name].load()(), None
    yield "trivial_baselines", TrivialBaselines(), 1000
    if task.random_backbone and seed == task.seeds[0]:
        for name in ("semantic", "mahalanobis"):
            yield f"{name}, random backbone", DETECTORS[name].load()(weights="random"), 2000


def run(task: Task, out: Path) -> None:
    """Fits and rates everything of a task that the file lacks."""
    for seed in task.seeds:
        reference: dict[str, Scores] = {}
        lacking = [each for each in detectors(task, seed) if not _there(out, task, seed, each[0])]
        first = [each for each in detectors(task, seed) if each[0] == "semantic" and lacking]
        for name, detector, limit in first + [each for each in lacking if each[0] != "semantic"]:
            rows = list(_rated(task, seed, name, detector, limit, reference))
            if not _there(out, task, seed, name):
                frame = pd.DataFrame(rows, columns=COLUMNS)
                frame.to_csv(out, mode="a", header=not out.is_file(), index=False)
            areas = [f"{row['ood']} {row['auroc']:.3f}" for row in rows if row["indicator"] == "score"]
            print(task.name, task.protocol, seed, name, *areas, flush=True)


def _there(out: Path, task: Task, seed: int, name: str) -> bool:
    return known(out, task=task.name, protocol=task.protocol, seed=seed, detector=name)


def _rated(
    task: Task, seed: int, name: str, detector: Detector, limit: int | None, reference: dict[str, Scores]
) -> Iterator[dict[str, Any]]:
    started = time.perf_counter()
    detector.fit(task.train(limit), seed=seed, protocol=task.protocol)
    fit_s = round(time.perf_counter() - started, 1)
    inside = detector.score(task.test())
    for ood, images in task.outside().items():
        outside = detector.score(images)
        if name == "semantic":
            reference |= {"id": inside, ood: outside}
        for indicator in ("score", *inside.indicators):
            own = detector.score_name if indicator == "score" else indicator
            pair = inside.indicators[own], outside.indicators[own]
            # of the default score of the semantic detector to this one
            found = compared(pair, (reference["id"].score, reference[ood].score), pair)
            told = {"task": task.name, "protocol": task.protocol, "seed": seed, "detector": name, "ood": ood}
            yield {**told, "indicator": indicator, "fit_s": fit_s, **found}


def summary(rows: pd.DataFrame) -> str:
    """One table per task and protocol: mean AUROC over seeds, the widest interval of one seed, and how often the paired
    interval to the semantic detector's default score excludes zero (+ it is ahead, - it is behind).
    """
    parts = [machine()]
    # of the semantic detector every score, of the others their own
    rows = rows[(rows["detector"] == "semantic") != (rows["indicator"] == "score")]
    rows = rows.assign(task=rows["task"].str.replace(r" split \d", " splits", regex=True))
    chosen_on = rows["task"].str.startswith("dev ")
    if chosen_on.any():
        parts.append(_means(rows[chosen_on]))
    for (task, protocol), some in rows[~chosen_on].groupby(["task", "protocol"], sort=False):
        parts.append(_of_task(task, protocol, some))
    return "\n\n".join(parts)


def _means(rows: pd.DataFrame) -> str:
    """Of the dev sources: the mean over changes, and in how many of them the paired interval excludes zero."""
    tasks = list(dict.fromkeys(rows["task"]))
    lines = []
    for (detector, indicator), each in rows.groupby(["detector", "indicator"], sort=False):
        cells = [_mean(each[each["task"] == task]) for task in tasks]
        lines.append([detector, indicator, *cells, _mean(each)])
    return table(["detector", "score", *[task.removeprefix("dev ") for task in tasks], "all"], lines)


def _mean(rows: pd.DataFrame) -> str:
    return f"{rows['auroc'].mean():.3f}{decided(rows)}"


def _of_task(task: str, protocol: str, some: pd.DataFrame) -> str:
    oods = list(dict.fromkeys(some["ood"]))
    lines = []
    for (detector, indicator), each in some.groupby(["detector", "indicator"], sort=False):
        cells = [auroc_cell(each[each["ood"] == ood]) for ood in oods]
        lines.append([detector, indicator, each["seed"].nunique(), *cells])
    counts = f"n = {some['n_id'].max()} in, {some['n_ood'].min()} to {some['n_ood'].max()} out"
    return f"**{task}**, protocol {protocol}, {counts}\n\n" + table(["detector", "score", "runs", *oods], lines)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["dev", "far", "near", "table"])
    parser.add_argument("--protocols", nargs="+", default=["native"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.what == "table":
        print(summary(pd.read_csv(given.out)))
        return
    tasks = {"dev": dev, "far": lambda: far(given.protocols, given.seeds), "near": lambda: near(given.seeds)}
    for task in tasks[given.what]():
        run(task, given.out)


if __name__ == "__main__":
    main()
