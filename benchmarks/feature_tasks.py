"""Compare `semantic` with the detectors on the same features: all tasks, several seeds, paired 95 % intervals.

    FAROUT_DATA=… python benchmarks/feature_tasks.py dev --images 3000 --out dev/     # choose settings by these only
    FAROUT_DATA=… python benchmarks/feature_tasks.py test --images 5000 --seeds 0 1 2 3 4 --out test/
    python benchmarks/feature_tasks.py table --out test/
    python benchmarks/feature_tasks.py weights --out dev/     # mean AUROC of `combined` by its weights

Features of EfficientNet-lite0 at 224 px. Every fit of a task and a seed gets the same images (a seeded sample of
`--images` of them, or all if there are fewer), and every detector the same test images: 2,000 of each set, 5,000 of
Tiny-ImageNet, 480 of Textures. The flips are those of other test images than the in-distribution ones. Scores of all
indicators are kept in OUT, one file per task and seed, so that an interrupted run continues.

Dev tasks: training images that are not used for the fit, and the same images rotated by 90° and 180°, blurred, with
half the contrast, with noise or with a pasted patch; a quarter of the clusters of training images, which k-means finds
in 30 principal components of their features, held out; and digits of held-out classes of MNIST, which is not an
in-distribution set of any test task. The interval of a mean over seeds adds the variance of the test images (DeLong,
components averaged over seeds) and that of the seeds.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn import decomposition
from sklearn.cluster import KMeans

from farout import GMM, KNN, PCA, AutoEncoder, Mahalanobis, Semantic
from farout.data.preprocessing import Preprocessing, Protocol
from farout.data.sources import open_source
from farout.detectors.feature_detector import PooledFeatureDetector
from farout.evaluation.intervals import delong
from farout.features.encoding import FeatureEncoding
from farout.features.extraction import CachedFeatures
from farout.features.extractor import FeatureExtractor

TINY_IMAGENET = (
    "tiny_imagenet:test@classes=0,2-9,17-25,27-34,36-46,48-53,55-57,59-81,84-99"  # none that names a class of CIFAR-10
)
CHANGES = ("rot90", "rot180", "blur", "contrast", "noise", "patch")
METHODS: dict[str, Callable[[], PooledFeatureDetector]] = {
    "semantic": Semantic,
    "mahalanobis": Mahalanobis,
    "pca": PCA,
    "knn": KNN,
    "gmm": GMM,
    "autoencoder": AutoEncoder,
}


@dataclass
class Table:
    """Features of the images of a source, their labels and keys."""

    features: np.ndarray
    labels: np.ndarray
    keys: np.ndarray

    def select(self, rows: np.ndarray) -> Table:
        return Table(self.features[rows], self.labels[rows], self.keys[rows])


@dataclass
class Task:
    """A fit and the sets that are scored with it."""

    name: str
    train: Table
    id: Table
    ood: dict[str, Table]


class Features:
    """Features of sources, preprocessed as images of a training set."""

    def __init__(self) -> None:
        self.extractor = FeatureExtractor.create("lite0")

    def __call__(
        self, spec: str, train: str, protocol: Protocol = "native", limit: int | None = 2000, seed: int = 0
    ) -> Table:
        size = self.extractor.size
        preprocessing = Preprocessing.for_source(open_source(train), size=size, channels=3, protocol=protocol)
        source = open_source(spec, limit=limit, seed=seed, policy="skip")
        precision = Mahalanobis().runtime.resolve_auto().precision
        assert precision != "auto"
        reader = CachedFeatures(self.extractor, preprocessing, "auto", precision)
        batches = list(reader.batches(source, 64, 1))
        labels = [np.full(len(b.keys), -1) if b.labels is None else b.labels.numpy() for b in batches]
        features = [b.features.numpy() for b in batches if b.features is not None]
        keys = np.array([key for b in batches for key in b.keys])
        return Table(np.concatenate(features), np.concatenate(labels), keys)


def dev_tasks(features: Features, limit: int | None) -> Iterator[Task]:
    """Changed training images of three sets, and held-out digits."""
    for name in ("fashion_mnist", "cifar10", "tiny_imagenet"):
        source = f"{name}:train"
        train = features(source, source, limit=limit)
        held_out = features(source, source, limit=600, seed=1)
        changed = {c: features(f"{source}@{c}", source, limit=600, seed=1) for c in CHANGES}
        train = train.select(~np.isin(train.keys, held_out.keys))
        yield Task(name, train, held_out, changed)
        yield from hold_out_clusters(name, train, 40 if name == "tiny_imagenet" else 20, features.extractor.channels)
    digits = features("mnist:train", "mnist:train", limit=6000)
    for classes in ((0, 1), (2, 7), (3, 8), (4, 9), (5, 6)):
        rows = np.random.default_rng(sum(classes)).permutation(len(digits.keys))
        train, test = digits.select(rows[:4500]), digits.select(rows[4500:])
        out = np.isin(test.labels, classes)
        inside = train.select(~np.isin(train.labels, classes))
        yield Task(
            f"mnist without {classes[0]} and {classes[1]}", inside, test.select(~out), {"held out": test.select(out)}
        )


def hold_out_clusters(name: str, table: Table, count: int, channels: tuple[int, ...]) -> Iterator[Task]:
    """Three times: 1,500 images of a quarter of the clusters of at most 5,000 images, against 900 others."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        chosen = table.select(rng.permutation(len(table.keys))[:5000])
        vectors = FeatureEncoding(channels).fit(features := torch.from_numpy(chosen.features))(features).numpy()
        components = decomposition.PCA(30, svd_solver="full").fit_transform(vectors)
        labels = KMeans(count, n_init=3, random_state=seed).fit_predict(components)
        is_out = np.isin(labels, rng.permutation(count)[: count // 4])
        inside, outside = rng.permutation(np.flatnonzero(~is_out)), np.flatnonzero(is_out)[:1500]
        sets = {"held out": chosen.select(outside)}
        yield Task(f"{name}_clusters {seed}", chosen.select(inside[900:]), chosen.select(inside[:900]), sets)


def test_tasks(features: Features, limit: int | None) -> Iterator[Task]:
    """Other sets in two protocols, flips, and held-out classes."""
    protocols: tuple[Protocol, Protocol] = ("native", "common")
    for protocol in protocols:
        source = "cifar10:train"
        train = features(source, source, protocol, limit)
        test = features("cifar10:test", source, protocol)
        others = {
            "tiny_imagenet": features(TINY_IMAGENET, source, protocol),
            "textures": features("textures:test", source, protocol, None),
        }
        yield Task(f"cifar10, {protocol}", train, test, others)
        if protocol == "native":
            for name, inside in (("animals", np.arange(2, 8)), ("vehicles", np.array([0, 1, 8, 9]))):
                yield _hold_out(f"cifar10 {name}", train, test, inside)
        source = "fashion_mnist:train"
        train = features(source, source, protocol, limit)
        test = features("fashion_mnist:test", source, protocol)
        flipped = features("fashion_mnist:test@vflip", source, protocol)
        digits = features("mnist:test", source, protocol)
        half = _in_first_half(test.keys)
        flips = flipped.select(~_in_first_half(flipped.keys))
        yield Task(f"fashion_mnist, {protocol}", train, test.select(half), {"mnist": digits, "vflip": flips})
        if protocol == "native":
            for out in ((0, 1), (2, 3), (4, 5), (6, 7), (1, 8)):
                inside = np.setdiff1d(np.arange(10), out)
                yield _hold_out(f"fashion_mnist without {out[0]} and {out[1]}", train, test, inside)
    source = "tiny_imagenet:train"
    train = features(source, source, limit=None)
    test = features("tiny_imagenet:test", source, limit=None)
    classes = np.unique(train.labels)
    for split in range(5):
        inside = np.random.default_rng(split).permutation(classes)[: len(classes) // 2]
        yield _hold_out(f"tiny_imagenet split {split}", train, test, inside)


def _in_first_half(keys: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(str(key).encode()) % 2 == 0 for key in keys])


def _hold_out(name: str, train: Table, test: Table, inside: np.ndarray) -> Task:
    is_inside = np.isin(test.labels, inside)
    normal = train.select(np.isin(train.labels, inside))
    return Task(name, normal, test.select(is_inside), {"held out": test.select(~is_inside)})


def score_task(task: Task, images: int, seed: int, file: Path, channels: tuple[int, ...], methods: list[str]) -> None:
    """Fit every method to the same rows, and store all scores and the seconds of the fit."""
    rows = np.random.default_rng(seed).permutation(len(task.train.keys))[:images]
    arrays: dict[str, np.ndarray] = {"images": np.array(len(rows))}
    for method in methods:
        detector, started = METHODS[method](), time.perf_counter()
        detector.fit_features(task.train.features[rows], channels=channels, seed=seed)
        arrays[f"{method}|seconds"] = np.array(time.perf_counter() - started)
        arrays[f"{method}|default"] = np.array(detector.score_name)
        for name, table in {"id": task.id, **task.ood}.items():
            for indicator, scores in detector.score_features(table.features).indicators.items():
                arrays[f"{method}|{indicator}|{name}"] = scores.astype(np.float32)
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's own type of **kwds is too narrow


def mean_with_interval(seeds: list[tuple[float, np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Mean over seeds of an area, or of a difference of areas, and half its 95 % interval.

    Args:
        seeds: by seed the area and its structural components of the in-distribution and the OOD images (`delong`).
    """
    areas = [area for area, _, _ in seeds]
    parts = ([part for _, part, _ in seeds], [part for _, _, part in seeds])
    variance = sum(np.var(np.mean(part, axis=0), ddof=1) / len(part[0]) for part in parts)
    if len(areas) > 1:
        variance += np.var(areas, ddof=1) / len(areas)
    return float(np.mean(areas)), 1.96 * float(np.sqrt(variance))


def print_table(folder: Path) -> None:
    """AUROC by task and method, mean over seeds; differences of `semantic` with intervals; means over tasks."""
    runs: dict[str, list[dict[str, np.ndarray]]] = {}
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as content:
            runs.setdefault(file.stem.rsplit(" seed ", 1)[0], []).append(dict(content))
    first = next(iter(runs.values()))[0]
    methods = [name.split("|")[0] for name in first if name.endswith("|default")]
    others = [m for m in methods if m != "semantic"]
    columns = [(m, str(first[f"{m}|default"])) for m in methods]
    columns += [("semantic", i) for i in ("empirical_norm", "residual_norm", "residual_error", "distance")]
    heads = [m if (m, i) in columns[: len(methods)] else i for m, i in columns]
    print(f"| task | n | {' | '.join(heads)} | {' | '.join(f'vs {m}' for m in others)} | vs best |")
    print("| --- " * (len(heads) + len(others) + 3) + "|")
    means, lower, higher = np.zeros(len(columns)), dict.fromkeys(others, 0), dict.fromkeys(others, 0)
    lower_than_best = tasks = 0
    for task, seeds in runs.items():
        for ood in [name.split("|")[2] for name in seeds[0] if name.startswith("semantic|combined|")]:
            if ood == "id":
                continue
            found = {(m, i): [delong(s[f"{m}|{i}|id"], s[f"{m}|{i}|{ood}"]) for s in seeds] for m, i in columns}
            areas = [mean_with_interval(found[column]) for column in columns]
            cells, worst = [], 0.0
            for m in others:
                pairs = zip(found[columns[0]], found[m, str(first[f"{m}|default"])], strict=True)
                difference, half = mean_with_interval([(a[0] - b[0], a[1] - b[1], a[2] - b[2]) for a, b in pairs])
                mark = "+" if difference > half else "-" if difference < -half else "="
                lower[m] += mark == "-"
                higher[m] += mark == "+"
                cells.append(f"{difference:+.3f} ± {half:.3f} {mark}")
                if difference + half < worst:
                    worst = difference
            lower_than_best += worst < 0
            tasks += 1
            means += np.array([area for area, _ in areas])
            n = f"{int(seeds[0]['images'])} x {len(seeds)}"
            row = [f"{task}: {ood}", n, *(f"{area:.3f} ± {half:.3f}" for area, half in areas), *cells, f"{worst:+.3f}"]
            print(f"| {' | '.join(row)} |")
    row = [f"mean of {tasks}", "", *(f"{area / tasks:.4f}" for area in means)]
    row += [*(f"+{higher[m]} -{lower[m]}" for m in others), f"-{lower_than_best}"]
    print(f"| {' | '.join(row)} |")
    seconds = [np.mean([float(s[f"{m}|seconds"]) for seeds in runs.values() for s in seeds]) for m in methods]
    print("seconds of a fit from features:", ", ".join(f"{m} {s:.1f}" for m, s in zip(methods, seconds, strict=True)))


WEIGHTS = ((1, 0), (4, 1), (3, 1), (2, 1), (3, 2), (1, 1), (2, 3), (1, 2), (0, 1))


def print_weights(folder: Path) -> None:
    """Mean AUROC over the sets of a data set by the weights of the empirical and the residual denoiser.

    `combined` is linear in the logarithms of both norms, and equal weights were used: a linear fit to the scores gives
    the deviations that they were divided by.
    """
    groups: dict[str, list[list[float]]] = {}
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as content:
            sets = [name.split("|")[2] for name in content if name.startswith("semantic|combined|")]
            parts = {
                s: np.stack([content[f"semantic|{i}_norm|{s}"] for i in ("empirical", "residual")], axis=1).astype(
                    float
                )
                for s in sets
            }
            combined = np.concatenate([content[f"semantic|combined|{s}"] for s in sets])
        table = np.concatenate([parts[s] for s in sets])
        scales = np.linalg.lstsq(np.column_stack([table, np.ones(len(table))]), combined, rcond=None)[0][:2]
        areas = [
            [delong(parts["id"] @ (scales * weights), parts[s] @ (scales * weights))[0] for s in sets if s != "id"]
            for weights in WEIGHTS
        ]
        groups.setdefault(file.stem.split()[0].strip(","), []).append(np.mean(areas, axis=1).tolist())
    heads = [f"{a}:{b}" for a, b in WEIGHTS]
    print(f"| empirical : residual | {' | '.join(heads)} |")
    print("| --- " * (len(heads) + 1) + "|")
    means = {group: np.mean(rows, axis=0) for group, rows in groups.items()}
    for group, row in {**means, "mean": np.mean(list(means.values()), axis=0)}.items():
        print(f"| {group} | {' | '.join(f'{area:.4f}' for area in row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["dev", "test", "table", "weights"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=5000, help="images of a fit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, default=10000, help="training images whose features are computed; 0: all")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--only", default="", help="only tasks whose name contains this")
    arguments = parser.parse_args()
    if arguments.action == "weights":
        print_weights(arguments.out)
        return
    if arguments.action != "table":
        arguments.out.mkdir(parents=True, exist_ok=True)
        features = Features()
        tasks = dev_tasks if arguments.action == "dev" else test_tasks
        for task in tasks(features, arguments.limit or None):
            for seed in arguments.seeds:
                file = arguments.out / f"{task.name} seed {seed}.npz"
                if arguments.only in task.name and not file.exists():
                    score_task(task, arguments.images, seed, file, features.extractor.channels, arguments.methods)
                    print(time.strftime("%H:%M:%S"), file.stem, flush=True)
    print_table(arguments.out)


if __name__ == "__main__":
    main()
