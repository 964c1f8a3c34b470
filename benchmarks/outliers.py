"""Classifiers that learn from made outliers beside the same classifier without: held-out classes, other sets.

    FAROUT_DATA=… python benchmarks/outliers.py make work/ --networks networks/ --images 800 --count 1000
    FAROUT_DATA=… python benchmarks/outliers.py train work/ --networks networks/ --seeds 0 1 2 3 4 --out rows.csv
    python benchmarks/outliers.py table --out rows.csv

Two classes of FashionMNIST are out (the first split of denoising.py, whose diffusion model is the generator); the
others train the classifiers. The score is the energy. `round trip` is the artefact probe: in-distribution test images
against the generator's reconstructions of them, where 0.5 means that being generated gives nothing away. What is in
`work/` or in the file of rows is not made again.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import known
from denoising import Split, spec
from exposed import NONE, PROBE, arguments, outward, rated, read, summary

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import Exposure, Loss
from farout.classifiers.train import PRESETS, ClassifierConfig, measure_accuracy, train_classifier
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.synthesis.base import SynthesisContext, Synthesizer
from farout.synthesis.class_noise import ClassNoise
from farout.synthesis.dream_ood import DreamOOD
from farout.synthesis.ncis import NCIS
from farout.synthesis.ncis.manifold import ManifoldConfig
from farout.synthesis.reconstruct import reconstruct
from farout.training.loop import TrainingConfig

DECODING: dict[str, Any] = {"steps": 10}


@dataclass(frozen=True)
class Case:
    """What a classifier learns from beside its images: outliers of a synthesizer, by folder; reconstructions."""

    loss: Loss = "energy"
    outliers: str | None = None
    reconstructions: bool = False


CASES = {
    NONE: Case("cross_entropy"),
    "ncis": Case(outliers="ncis"),
    "dream_ood": Case(outliers="dream_ood"),
    "class_noise": Case(outliers="class_noise"),
    "vos": Case("vos"),
    "ncis + reconstructions": Case(outliers="ncis", reconstructions=True),
    "ncis, temperature 4": Case(outliers="hot"),
    "ncis, linear": Case(outliers="linear"),
}


class Variant(NCIS):
    """NCIS with the embeddings of a sibling folder, which all variants share."""

    def _embed(self, work: SynthesisContext) -> None:
        there, here = work.folder.parent / "embeddings", work.folder / "embeddings"
        if not there.is_dir():
            super()._embed(work)
            shutil.copytree(here, there)
        elif not here.is_dir():
            shutil.copytree(there, here)
        super()._embed(work)


def ncis(**manifold: Any) -> NCIS:
    """Held-out vectors choose the shrinkage: there are fewer of a class than dimensions."""
    how = ManifoldConfig(regularization="held_out", held_out=0.2, **manifold)
    return Variant(manifold=how, **DECODING)


def synthesizers() -> dict[str, Synthesizer]:
    """By folder."""
    return {
        "ncis": ncis(),
        "class_noise": ClassNoise(**DECODING),
        "dream_ood": DreamOOD(**DECODING),
        "hot": ncis(temperature=4.0),
        "linear": ncis(map="linear"),
    }


def make(split: Split, work: Path, images: int, count: int, test: int) -> None:
    """The outliers of every method, and the reconstructions of training and of test images."""
    for name, method in synthesizers().items():
        started = time.perf_counter()
        limit = images if isinstance(method, NCIS) else None
        done = method.synthesize(
            split.train, work / name, count=count, diffusion=split.diffusion, limit=limit, resume=True
        )
        told = measure_accuracy(split.classifier, done.source())
        seconds = time.perf_counter() - started
        print(f"{name}: {done.generated} made in {seconds:.0f} s, {told:.2f} taken for their class", flush=True)
    for name, source in {"train": open_source(split.train, limit=count), "test": inside(split, test)}.items():
        again = reconstruct(source, split.diffusion, work / f"again-{name}", resume=True)
        told = measure_accuracy(split.classifier, again.source())
        print(f"reconstructions of {len(source)} {name} images, {told:.2f} taken for their class", flush=True)


def inside(split: Split, count: int) -> ImageSource:
    """In-distribution test images."""
    return open_source(spec("test", split.inside), limit=count)


def sets(split: Split, work: Path, count: int) -> dict[str, ImageSource]:
    """Test images: `id` first."""
    return {
        "id": inside(split, count),
        "other classes": open_source(spec("test", split.out), limit=count),
        "mnist": open_source("mnist:test", limit=count),
        "cifar10": open_source("cifar10:test", limit=count),
        PROBE: open_source(work / "again-test"),
    }


def place(work: Path, seed: int, case: Case) -> Path:
    """The folder of a case's classifier."""
    return work / "classifiers" / f"{case.outliers or case.loss}{'-again' * case.reconstructions}-{seed}"


def train(split: Split, work: Path, seed: int, case: Case, steps: int) -> Classifier:
    """A classifier with what it learns from, trained from scratch."""
    recipe = PRESETS["ncis_tiny"]
    return train_classifier(
        split.train,
        place(work, seed, case),
        model=ClassifierConfig(**recipe["model"]),
        training=TrainingConfig(**{**recipe["training"], "steps": steps, "batch_size": 64}),
        exposure=Exposure(loss=case.loss),
        outliers=str(work / case.outliers) if case.outliers else None,
        reconstructions=str(work / "again-train") if case.reconstructions else None,
        seed=seed,
    )


def run(split: Split, work: Path, seeds: list[int], steps: int, count: int, out: Path) -> None:
    """Trains and rates what the file lacks, seed by seed."""
    for seed in seeds:
        base: dict[str, np.ndarray] = {}
        for name, case in CASES.items():
            if known(out, seed=seed, case=name) and name != NONE:
                continue
            folder = place(work, seed, case)
            started = time.perf_counter()
            classifier = Classifier.load(folder) if folder.is_dir() else train(split, work, seed, case, steps)
            seconds = time.perf_counter() - started
            scores = {each: outward(classifier, source)["energy"] for each, source in sets(split, work, count).items()}
            base = base or scores
            rows = pd.DataFrame(rated(scores, base)).assign(case=name, seed=seed, steps=steps, seconds=seconds)
            rows["accuracy"] = measure_accuracy(classifier, open_source(spec("test", split.inside)))
            if not known(out, seed=seed, case=name):
                rows.to_csv(out, mode="a", header=not out.is_file(), index=False)
            areas = [f"{ood} {area:.3f}" for ood, area in zip(rows.ood, rows.auroc)]
            print(seed, name, f"{seconds:.0f} s", f"accuracy {rows.accuracy[0]:.3f}", *areas, flush=True)


def main() -> None:
    """Reads the command line."""
    parser = arguments(__doc__, ["make", "train", "table"], count=1000, steps=400)
    parser.add_argument("--images", type=int, default=800, help="images that NCIS embeds, all classes together")
    parser.add_argument("--diffusion-steps", type=int, default=1500, help="updates of the diffusion model")
    given = read(parser)
    if given.what == "table":
        print(summary(pd.read_csv(given.out)))
        return
    split = Split(0, given.networks, given.diffusion_steps)
    if given.what == "make":
        make(split, given.work, given.images, given.count, given.test)
    else:
        run(split, given.work, given.seeds, given.steps, given.test, given.out)


if __name__ == "__main__":
    main()
