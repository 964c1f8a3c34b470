"""Outliers made of images, with classes split three ways: in the distribution, known to the generator alone, unseen.

    FAROUT_DATA=… python benchmarks/three_way.py make work/ --networks networks/ --count 600
    FAROUT_DATA=… python benchmarks/three_way.py train work/ --networks networks/ --seeds 0 1 2 3 4 --out rows.csv
    FAROUT_DATA=… python benchmarks/three_way.py ablate work/ --networks networks/ --seeds 0 1 --out rows.csv
    python benchmarks/three_way.py table --out rows.csv

Of the eight classes of FashionMNIST that the generator knows (the first split of denoising.py) six have images here,
and two, Dress and Ankle boot, are what outliers are to show. Trouser and Bag nobody has seen: they are the near
outliers. Every classifier with outliers learns by the same loss, SONA's, so that images alone differ. `round trip` is
the artifact probe (see outliers.py). `ablate` makes and rates variants of SONA. What is in `work/` or in the file of
rows is not made again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import known
from denoising import Split, spec
from exposed import NONE, PROBE, arguments, outward, rated, read, summary

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import Exposure, Mutual
from farout.classifiers.train import PRESETS, ClassifierConfig, measure_accuracy, train_classifier
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.synthesis.base import OutlierFolder, Synthesizer
from farout.synthesis.editing.sdedit import SDEdit
from farout.synthesis.editing.sona import SONA
from farout.synthesis.editing.sona_guidance import SonaConfig
from farout.synthesis.ncis import NCIS
from farout.synthesis.ncis.manifold import ManifoldConfig
from farout.synthesis.quality import measure_quality, summarize_quality
from farout.synthesis.reconstruct import reconstruct
from farout.training.loop import TrainingConfig

TARGETS = (3, 9)
"""Dress and Ankle boot: known to the generator, without images here."""


@dataclass(frozen=True)
class Case:
    """What a classifier learns from beside its images; without outliers by cross-entropy alone."""

    outliers: str | None = None
    reconstructions: bool = False
    mutual: Mutual = "reference"


CASES = {
    NONE: Case(),
    "SDEdit": Case("sdedit"),
    "SDEdit + reconstructions": Case("sdedit", reconstructions=True),
    "SONA": Case("sona"),
    "SONA + reconstructions": Case("sona", reconstructions=True),
    "NCIS": Case("ncis"),
    "NCIS + reconstructions": Case("ncis", reconstructions=True),
}
ABLATIONS = {
    NONE: Case(),
    "SONA": Case("sona"),
    "class not taken out": Case("no-class"),
    "target not put in": Case("no-target"),
    "nuisance not kept": Case("no-nuisance"),
    "target put in anywhere": Case("anywhere"),
    "K from 5": Case("from-5"),
    "K from 10": Case("from-10"),
    "mutual information off": Case("sona", mutual="off"),
    "mutual information normalized": Case("sona", mutual="normalized"),
}


def sona(guidance: Mapping[str, Any] | None = None, **how: Any) -> SONA:
    """With the published constants but for these."""
    return SONA(guidance=SonaConfig(**(guidance or {})), pictures=0, **how)


SYNTHESISERS: dict[str, Synthesizer] = {
    "sona": sona(),
    "sdedit": SDEdit(),
    "ncis": NCIS(manifold=ManifoldConfig(regularization="held_out", held_out=0.2), steps=10),
}
VARIANTS: dict[str, Synthesizer] = {
    "no-class": sona({"class_weight": 0.0}),
    "no-target": sona(targets="none"),
    "no-nuisance": sona({"nuisance_weight": 0.0}),
    "anywhere": sona({"exclude": False}),
    "from-5": sona(k_min=5),
    "from-10": sona(k_min=10),
}
"""By folder."""


class ThreeWay:
    """A split of denoising.py with two of the generator's classes left out."""

    def __init__(self, networks: Path) -> None:
        self.base = Split(0, networks, steps=1500)
        self.inside = [each for each in self.base.inside if each not in TARGETS]
        self.train = spec("train", self.inside)

    def test(self, work: Path, count: int) -> dict[str, ImageSource]:
        """Test images: `id` first."""
        return {
            "id": open_source(spec("test", self.inside), limit=count),
            "unseen classes": open_source(spec("test", self.base.out), limit=count),
            "target classes": open_source(spec("test", list(TARGETS)), limit=count),
            "mnist": open_source("mnist:test", limit=count),
            "cifar10": open_source("cifar10:test", limit=count),
            PROBE: open_source(work / "again-test"),
        }


def make(split: ThreeWay, work: Path, methods: dict[str, Synthesizer], count: int, test: int) -> None:
    """Outliers of each method, one of each of `count` images, and reconstructions of these and of test images."""
    source = open_source(split.train, limit=count)
    for name, method in methods.items():
        started = time.perf_counter()
        done = method.synthesize(source, work / name, count=count, diffusion=split.base.diffusion, resume=True)
        seconds = time.perf_counter() - started
        print(f"{name}: {done.generated} made in {seconds:.0f} s", flush=True)
        if name != "ncis":
            print(quality(done, source, split.base.classifier), flush=True)
    for name, images in {"train": source, "test": open_source(spec("test", split.inside), limit=test)}.items():
        again = reconstruct(images, split.base.diffusion, work / f"again-{name}", resume=True)
        told = measure_accuracy(split.base.classifier, again.source())
        print(f"reconstructions of {len(images)} {name} images, {told:.2f} taken for their class", flush=True)


def quality(made: OutlierFolder, source: ImageSource, classifier: Classifier) -> str:
    """By quarters of the levels: the share still of its image's class, and how much of its colours are left."""
    parts = summarize_quality(measure_quality(made, source, classifier))
    return "; ".join(
        f"{part['levels']} ({part['outliers']}) {part['is_source_class']:.2f} {part['color_similarity']:.2f}"
        for part in parts
    )


def train(split: ThreeWay, work: Path, seed: int, case: Case, steps: int) -> Classifier:
    """A classifier with what it learns from, trained from scratch, or as it lies in its folder."""
    name = f"{case.outliers or NONE}{'-again' * case.reconstructions}-{case.mutual}-{seed}"
    folder = work / "classifiers" / name
    if folder.is_dir():
        return Classifier.load(folder)
    recipe = PRESETS["sona_tiny"]
    return train_classifier(
        split.train,
        folder,
        model=ClassifierConfig(**recipe["model"]),
        training=TrainingConfig(**{**recipe["training"], "steps": steps, "batch_size": 64}),
        exposure=Exposure("sona" if case.outliers else "cross_entropy", mutual=case.mutual),
        outliers=str(work / case.outliers) if case.outliers else None,
        reconstructions=str(work / "again-train") if case.reconstructions else None,
        seed=seed,
    )


def run(split: ThreeWay, work: Path, cases: dict[str, Case], given: argparse.Namespace) -> None:
    """Trains and rates what the file lacks, seed by seed."""
    for seed in given.seeds:
        base: dict[str, dict[str, np.ndarray]] = {}
        for name, case in cases.items():
            if known(given.out, seed=seed, case=name) and name != NONE:
                continue
            started = time.perf_counter()
            classifier = train(split, work, seed, case, given.steps)
            seconds = time.perf_counter() - started
            found = {each: outward(classifier, source) for each, source in split.test(work, given.test).items()}
            scores = {which: {each: of[which] for each, of in found.items()} for which in found["id"]}
            base = base or scores
            rows = pd.concat(
                pd.DataFrame(rated(scores[which], base[which])).assign(indicator=which) for which in scores
            ).assign(case=name, seed=seed, steps=given.steps, seconds=seconds)
            rows["accuracy"] = measure_accuracy(classifier, open_source(spec("test", split.inside)))
            if not known(given.out, seed=seed, case=name):
                rows.to_csv(given.out, mode="a", header=not given.out.is_file(), index=False)
            msp = rows[rows["indicator"] == "msp"]
            areas = [f"{ood} {area:.3f}" for ood, area in zip(msp.ood, msp.auroc)]
            print(seed, name, f"{seconds:.0f} s", f"accuracy {rows.accuracy.iloc[0]:.3f}", *areas, flush=True)


def main() -> None:
    """Reads the command line."""
    given = read(arguments(__doc__, ["make", "train", "ablate", "table"], count=600, steps=300))
    if given.what == "table":
        rows = pd.read_csv(given.out)
        for indicator, some in rows.groupby("indicator", sort=False):
            print(f"{indicator}\n\n{summary(some)}\n")
        return
    split = ThreeWay(given.networks)
    if given.what == "make":
        make(split, given.work, SYNTHESISERS, given.count, given.test)
        return
    if given.what == "ablate":
        make(split, given.work, VARIANTS, given.count, given.test)
    run(split, given.work, CASES if given.what == "train" else ABLATIONS, given)


if __name__ == "__main__":
    main()
