"""Which post-hoc score is the default: judged on dev sources only.

    FAROUT_DATA=… python benchmarks/choose_posthoc.py networks/split-*/classifier --count 400

The classifiers are those of `benchmarks/denoising.py`. In-distribution: training images that the classifier has not
seen. Out-of-distribution: other such images, rotated, blurred, with less contrast, noisy, with a pasted patch. No test
image and no test set is read.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import pandas as pd
from common import VARIANTS, machine, table

from farout.classifiers.model import Classifier
from farout.data.sources import open_source
from farout.detectors.posthoc import Posthoc
from farout.evaluation.metrics import auroc


def rows_of(folder: str, count: int) -> list[dict[str, object]]:
    """AUROC of every score on every variant."""
    classifier = Classifier.load(folder)
    plain = open_source("fashion_mnist:train")
    names, labels = plain.class_names or (), plain.labels or ()
    known = [i for i, label in enumerate(labels) if names[label] in classifier.class_names]
    unseen = [i for i in known if plain.content_hash(i) not in classifier.trained_on]
    order = np.random.default_rng(0).permutation(unseen)
    fitted, inside, outside = order[: -2 * count], order[-2 * count : -count], order[-count:]
    detector = Posthoc().fit(plain.subset(sorted(fitted)), classifier=classifier)
    base = detector.score(plain.subset(sorted(inside))).indicators

    changed = {name: open_source(f"fashion_mnist:train@{name}").subset(sorted(outside)) for name in VARIANTS}
    return [
        {"score": name, "variant": variant, "auroc": auroc(base[name], scores)}
        for variant, images in changed.items()
        for name, scores in detector.score(images).indicators.items()
    ]


def main() -> None:
    """Prints the mean AUROC over classifiers by variant, best score first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifiers", nargs="+")
    parser.add_argument("--count", type=int, default=400)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found = pd.DataFrame([row for folder in given.classifiers for row in rows_of(folder, given.count)])
    means = found.pivot_table(index="score", columns="variant", values="auroc")[list(VARIANTS)]
    means["mean"] = means.mean(axis=1)
    means = means.sort_values("mean", ascending=False)
    print(f"{len(given.classifiers)} classifiers, n = {given.count} in and out each; {machine()}\n")
    print(table(["score", *means.columns], [[name, *map(float, row)] for name, row in zip(means.index, means.values)]))


if __name__ == "__main__":
    main()
