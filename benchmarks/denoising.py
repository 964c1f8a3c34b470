"""The denoising detector in three spaces beside post-hoc scores of the same classifier; presets; ablations.

    farout train classifier "fashion_mnist:train@classes=0,2-7,9" --out classifier
    farout train diffusion "fashion_mnist:train@classes=0,2-7,9" --preset classes --out diffusion
    FAROUT_DATA=… python benchmarks/denoising.py classifier diffusion --count 150 --out rows.csv
    python benchmarks/denoising.py --table rows.csv

Statistics and calibration come from training images that neither network has seen; each test set is a seeded choice of
`--count` images. Every method adds its rows to the file; what is there is left out.
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
from common import machine, table

from farout.classifiers.model import Classifier
from farout.detectors.base import Detector, Scores
from farout.detectors.denoising import Denoising
from farout.detectors.posthoc import Posthoc
from farout.diffusion.model import DiffusionModel
from farout.evaluation.intervals import paired_difference
from farout.evaluation.metrics import evaluate
from farout.images.sources import ImageSource, open_source

CLASSES, OTHERS = "0,2-7,9", "1,8"
FAST, POST_HOC = "fast", ("msp", "energy", "vim", "knn", "mahalanobis")
SHOWN = ("logit", "feature", "pixel")


def methods() -> Iterator[tuple[str, Detector]]:
    """The default first: the others are compared with it."""
    yield FAST, Denoising()
    yield "posthoc", Posthoc()
    yield "fast, r = 1", Denoising(draws=1)
    yield "fast, no condition", Denoising(condition="none")
    yield "fast, no guidance", Denoising(guidance=1.0)
    yield "paper", Denoising.from_preset("paper")


def fresh(spec: str, networks: list[Any], count: int, seed: int) -> ImageSource:
    """Training images that no network has seen."""
    source = open_source(spec)
    seen = frozenset[str]().union(*(network.trained_on for network in networks))
    order = np.random.default_rng(seed).permutation(len(source))
    chosen = [int(i) for i in order if source.content_hash(int(i)) not in seen][:count]
    return source.subset(sorted(chosen))


def run(classifier: Classifier, diffusion: DiffusionModel, count: int, seed: int, out: Path) -> None:
    """Rates what the file lacks."""
    spec = f"fashion_mnist:test@classes={CLASSES}"
    inside = open_source(spec, limit=count, seed=seed)
    outside = {
        "classes 1 and 8": open_source(f"fashion_mnist:test@classes={OTHERS}", limit=count, seed=seed),
        "mnist": open_source("mnist:test", limit=count, seed=seed),
        "vflip": _flipped("vflip", inside, spec),
        "hflip": _flipped("hflip", inside, spec),
    }
    base: dict[str, Scores] = {}
    for name, detector in methods():
        done = pd.read_csv(out)["method"].unique() if out.is_file() else ()
        if name in done and name != FAST:
            continue
        images = fresh(f"fashion_mnist:train@classes={CLASSES}", [classifier, diffusion], 1200, seed)
        if isinstance(detector, Denoising):
            detector.fit(images.subset(range(100)), diffusion, classifier, alpha=0.1, statistics=40, seed=seed)
        else:
            detector.fit(images, classifier=classifier, seed=seed)
        started = time.perf_counter()
        scores = {"id": detector.score(inside)} | {ood: detector.score(images) for ood, images in outside.items()}
        speed = (len(inside) + sum(map(len, outside.values()))) / (time.perf_counter() - started)
        base = base or scores
        rows = list(_rated(name, detector, scores, base, speed))
        if name not in done:
            pd.DataFrame(rows).to_csv(out, mode="a", header=not out.is_file(), index=False)
        print(name, *[f"{r['ood']} {r['indicator']} {r['auroc']:.3f}" for r in rows], flush=True)


def _flipped(how: str, inside: ImageSource, spec: str) -> ImageSource:
    source = open_source(f"fashion_mnist:test@{how}@classes={CLASSES}")
    places = {key: i for i, key in enumerate(source.keys)}
    return source.subset([places[key] for key in inside.keys])


def _rated(
    name: str, detector: Detector, scores: dict[str, Scores], base: dict[str, Scores], speed: float
) -> Iterator[dict[str, Any]]:
    cost = detector.cost()
    wanted = POST_HOC if isinstance(detector, Posthoc) else SHOWN
    for ood in list(scores)[1:]:
        flipped = ood.endswith("flip")
        same = np.arange(len(scores["id"]))
        groups = (same, same) if flipped else None
        for indicator in wanted:
            pair = (scores["id"].indicators[indicator], scores[ood].indicators[indicator])
            first = (base["id"].score, base[ood].score)
            rated, gap = evaluate(*pair, groups=groups), paired_difference(pair, first, groups=groups)
            yield {
                **{"method": name, "indicator": indicator, "ood": ood, "auroc": rated.auroc, "low": rated.auroc_low},
                **{"high": rated.auroc_high, "fpr95": rated.fpr95, "n_id": rated.n_id, "n_ood": rated.n_ood},
                **{"difference": gap.value, "difference_low": gap.low, "difference_high": gap.high},
                **{"nfe": cost.nfe, "gmacs": cost.gmacs, "images_per_s": speed},
            }


def summary(rows: pd.DataFrame) -> str:
    """AUROC with interval and FPR95; then costs; then the paper's preset against the default."""
    oods = list(dict.fromkeys(rows["ood"]))
    lines, costs = [], []
    for (method, indicator), each in rows.groupby(["method", "indicator"], sort=False):
        lines.append([method, indicator, *[_cell(each[each["ood"] == ood].iloc[0]) for ood in oods]])
    for method, each in rows.groupby("method", sort=False):
        first = each.iloc[0]
        costs.append([method, f"{first['nfe']:.0f}", f"{first['gmacs']:.2f}", f"{first['images_per_s']:.2f}"])
    counts = f"n = {rows['n_id'].max()} in, {rows['n_ood'].min()} to {rows['n_ood'].max()} out; {machine()}"
    return "\n\n".join(
        [
            counts,
            table(["method", "score", *oods], lines),
            table(["method", "evaluations an image", "GMACs an image", "images/s"], costs),
        ]
    )


def _cell(row: pd.Series) -> str:
    sign = "+" if row["difference_low"] > 0 else "-" if row["difference_high"] < 0 else ""
    gap = f" {sign}" if sign else ""
    return f"{row['auroc']:.3f} ({row['low']:.3f} to {row['high']:.3f}){gap}, {row['fpr95']:.2f}"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="folder of the classifier, folder of the diffusion model")
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("denoising.csv"))
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.table is not None:
        print(summary(pd.read_csv(given.table)))
        return
    classifier, diffusion = Classifier.load(given.networks[0]), DiffusionModel.load(given.networks[1])
    run(classifier, diffusion, given.count, given.seed, given.out)


if __name__ == "__main__":
    main()
