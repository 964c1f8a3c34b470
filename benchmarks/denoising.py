"""The denoising detector in three spaces beside post-hoc scores of the same classifier; presets; ablations.

    FAROUT_DATA=… python benchmarks/denoising.py run networks/ --splits 0 1 2 3 4 --count 150 --out rows.csv
    FAROUT_DATA=… python benchmarks/denoising.py ablate networks/ --splits 0 --count 150 --out rows.csv
    python benchmarks/denoising.py table --out rows.csv

A split takes two classes of FashionMNIST out; classifier and diffusion model are trained on the other eight and kept in
`networks/`. Statistics and calibration come from training images that neither network has seen; each test set is a
seeded choice of `--count` images. Every method adds its rows to the file; what is there is left out.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import auroc_cell, compared, interval, known, machine, table

from farout.classifiers.model import Classifier
from farout.classifiers.train import PRESETS as CLASSIFIERS
from farout.classifiers.train import ClassifierConfig, measure_accuracy, train_classifier
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.detectors.base import Detector, Scores
from farout.detectors.denoising import Denoising
from farout.detectors.posthoc import Posthoc
from farout.diffusion.config import PRESETS as MODELS
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.model import DiffusionModel
from farout.diffusion.train import train_diffusion
from farout.training.loop import TrainingConfig

SPLITS = ((1, 8), (0, 9), (2, 7), (3, 6), (4, 5))
"""The classes of FashionMNIST that are out; each class once."""

FAST = "fast"
POST_HOC = ("msp", "energy", "vim", "knn", "mahalanobis")
SPACES = ("logit", "feature", "pixel")


def methods(ablate: bool) -> Iterator[tuple[str, Detector]]:
    """The default first: the others are compared with it."""
    yield FAST, Denoising()
    yield "posthoc", Posthoc()
    if ablate:
        yield "fast, r = 1", Denoising(draws=1)
        yield "fast, t = 120", Denoising(levels=(120,))
        yield "fast, no guidance", Denoising(guidance=1.0)
        yield "fast, no condition", Denoising(condition="none")
        yield "fast, true labels", Denoising(labels="true")
        yield "paper", Denoising.from_preset("paper")


def spec(part: str, classes: list[int], variant: str = "") -> str:
    """Of FashionMNIST these classes only."""
    modifiers = [*([variant] if variant else []), f"classes={','.join(map(str, classes))}"]
    return f"fashion_mnist:{part}@{','.join(modifiers)}"


class Split:
    """The networks of a split, and what they are asked to tell apart."""

    def __init__(self, number: int, networks: Path, steps: int) -> None:
        self.number = number
        self.out = list(SPLITS[number])
        self.inside = [each for each in range(10) if each not in self.out]
        self.train = spec("train", self.inside)
        folder = networks / f"split-{number}"
        if not (folder / "classifier").is_dir():
            train_classifier(
                self.train,
                folder / "classifier",
                model=ClassifierConfig(**CLASSIFIERS["tiny"]["model"]),
                training=TrainingConfig(**CLASSIFIERS["tiny"]["training"]),
                seed=number,
            )
        if not (folder / "diffusion").is_dir():
            train_diffusion(
                self.train,
                folder / "diffusion",
                model=DiffusionConfig(**MODELS["classes"]["model"]),
                training=TrainingConfig(**{**MODELS["classes"]["training"], "steps": steps}),
                seed=number,
            )
        self.classifier = Classifier.load(folder / "classifier")
        self.diffusion = DiffusionModel.load(folder / "diffusion")

    def unseen(self, count: int) -> ImageSource:
        """Training images that no network has seen."""
        source = open_source(self.train)
        seen = self.classifier.trained_on | self.diffusion.trained_on
        order = np.random.default_rng(self.number).permutation(len(source))
        chosen = [int(i) for i in order if source.content_hash(int(i)) not in seen][:count]
        return source.subset(sorted(chosen))

    def test(self, count: int, flips: bool) -> dict[str, ImageSource]:
        """The images inside, as `id`, and by name those outside; flips are of the images inside."""
        seed = self.number
        found = {
            "id": open_source(spec("test", self.inside), limit=count, seed=seed),
            "other classes": open_source(spec("test", self.out), limit=count, seed=seed),
            "mnist": open_source("mnist:test", limit=count, seed=seed),
        }
        for flip in ("vflip", "hflip") if flips else ():
            source = open_source(spec("test", self.inside, flip))
            places = {key: i for i, key in enumerate(source.keys)}
            found[flip] = source.subset([places[key] for key in found["id"].keys])
        return found


def run(split: Split, count: int, ablate: bool, out: Path) -> None:
    """Rates what the file lacks, which wants the scores of the default beside it."""
    there = {name: known(out, split=split.number, method=name) for name, _ in methods(ablate)}
    if all(there.values()):
        return
    accuracy = measure_accuracy(split.classifier, open_source(spec("test", split.inside)))
    print(f"split {split.number}: accuracy {accuracy:.4f}", flush=True)
    base: dict[str, Scores] = {}
    for name, detector in methods(ablate):
        if there[name] and name != FAST:
            continue
        if isinstance(detector, Denoising):
            detector.fit(split.unseen(100), split.diffusion, split.classifier, alpha=0.1, statistics=40)
        else:
            detector.fit(split.unseen(1200), classifier=split.classifier)
        sets = split.test(count, flips=name in (FAST, "posthoc"))
        started = time.perf_counter()
        scores = {each: detector.score(images) for each, images in sets.items()}
        speed = sum(map(len, sets.values())) / (time.perf_counter() - started)
        base = base or scores
        rows = pd.DataFrame(_rated(name, detector, scores, base))
        rows = rows.assign(split=split.number, accuracy=accuracy, images_per_s=speed)
        if not there[name]:
            rows.to_csv(out, mode="a", header=not out.is_file(), index=False)
        areas = [f"{ood} {which} {area:.3f}" for which, ood, area in zip(rows.indicator, rows.ood, rows.auroc)]
        print(split.number, name, f"{speed:.2f} images/s", *areas, flush=True)


def _rated(
    name: str, detector: Detector, scores: dict[str, Scores], base: dict[str, Scores]
) -> Iterator[dict[str, Any]]:
    cost = detector.cost()
    for ood in list(scores)[1:]:
        same = np.arange(len(scores["id"]))
        groups = (same, same) if ood.endswith("flip") else None
        for indicator in POST_HOC if isinstance(detector, Posthoc) else SPACES:
            pair = (scores["id"].indicators[indicator], scores[ood].indicators[indicator])
            # of the default's score to this one
            found = compared(pair, (base["id"].score, base[ood].score), pair, groups)
            told = {"method": name, "indicator": indicator, "ood": ood}
            yield {**told, **found, "nfe": cost.nfe, "gmacs": cost.gmacs}


def summary(rows: pd.DataFrame) -> str:
    """All splits: AUROC and FPR95. The ablations' splits: AUROC, and the default's lead. Costs."""
    ablated = rows[rows["method"] == "paper"]["split"].unique()
    plain = rows[rows["method"].isin([FAST, "posthoc"])]
    accuracy = rows.groupby("split")["accuracy"].first()
    counts = f"n = {rows['n_id'].max()} in, {rows['n_ood'].min()} to {rows['n_ood'].max()} out; {machine()}"
    parts = [
        f"{counts}; accuracy by split " + ", ".join(f"{each:.3f}" for each in accuracy),
        _by_ood(plain, auroc_cell),
        _by_ood(plain, lambda some: f"{some['fpr95'].mean():.2f}"),
    ]
    some = rows[rows["split"].isin(ablated) & (rows["method"] != "posthoc") & ~rows["ood"].str.endswith("flip")]
    if len(some):
        parts += [_by_ood(some, auroc_cell), _by_ood(some[some["indicator"] == "logit"], _lead), _costs(some)]
    return "\n\n".join(parts)


def _by_ood(rows: pd.DataFrame, cell: Any) -> str:
    oods = list(dict.fromkeys(rows["ood"]))
    lines = []
    for (method, indicator), each in rows.groupby(["method", "indicator"], sort=False):
        cells = [cell(each[each["ood"] == ood]) for ood in oods]
        lines.append([method, indicator, each["split"].nunique(), *cells])
    return table(["method", "score", "splits", *oods], lines)


def _lead(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return interval(first["difference"], first["difference_low"], first["difference_high"], "+.3f")


def _costs(rows: pd.DataFrame) -> str:
    lines = []
    for method, each in rows.groupby("method", sort=False):
        first = each.iloc[0]
        lines.append([method, f"{first['nfe']:.0f}", f"{first['gmacs']:.2f}", f"{first['images_per_s']:.2f}"])
    return table(["method", "evaluations an image", "GMACs an image", "images/s"], lines)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "ablate", "table"])
    parser.add_argument("networks", type=Path, nargs="?", help="folder of the networks, trained where they are missing")
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=1500, help="training updates of the diffusion model")
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.what == "table":
        print(summary(pd.read_csv(given.out)))
        return
    if given.networks is None:
        parser.error("give the folder of the networks")
    for number in given.splits:
        run(Split(number, given.networks, given.steps), given.count, given.what == "ablate", given.out)


if __name__ == "__main__":
    main()
