"""The ensemble: ways to combine scores, compared on changed images (dev) and on the test sets of benchmarks.

    FAROUT_DATA=… python benchmarks/ensemble.py bench sample/ fashion_mnist/ cifar10/ --out ensembles/
    FAROUT_DATA=… python benchmarks/ensemble.py fit sample_fashion:train --parts semantic mahalanobis \
        --id sample_fashion:test --ood sample_digits:test --out ensembles/

`bench` takes the folders of finished benchmarks (`farout bench … --out`), and combines their fitted detectors on images
of the training set that none of them has seen; `fit` fits the parts. Ensembles and scores are stored in `--out`: the
script continues where it was interrupted, and called again, it prints the tables without running a network. `table`
prints the tables of all ensembles in `--out` together.

Tables: AUROC of each rule, of each part, and of the sum of z of some of the parts

- `…-dev.csv`: calibration images against changed copies of statistics images (rotated, blurred, …). The weights of
  `learned` are learned without the change that they are evaluated on. Defaults are chosen on this table alone.
- `…-test.csv`: in-distribution against OOD images, and the paired difference to the best part with its 95 % interval.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from farout import Ensemble, load
from farout.benchmark.yaml_reader import read_benchmark
from farout.detectors.ensemble import CHANGES
from farout.detectors.ensemble.combination import Standardization, learn_weights
from farout.evaluation.intervals import delong, paired_difference
from farout.evaluation.scored_datasets import folder_name
from farout.scoring.folder import read_scores, score_folder

TABLES = ("dev", "test")
_PRIORS = (0.03, 0.1, 0.3, 1.0, 3.0)
_TOLERANCE = 0.01
"""In no task may a rule be significantly lower than the best part by more than this."""


@dataclass(frozen=True)
class Setting:
    """One ensemble: what it is fitted to and evaluated on."""

    name: str
    parts: list[Any]
    train: str
    id: str
    ood: tuple[str, ...]
    limit: int | None
    fit: dict[str, Any]
    networks: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench")
    bench.add_argument("folders", nargs="+", type=Path)
    bench.add_argument("--parts", nargs="+", default=["reconstruction", "semantic", "posthoc", "mahalanobis"])
    fit = commands.add_parser("fit")
    fit.add_argument("train")
    fit.add_argument("--id", required=True)
    fit.add_argument("--ood", nargs="+", required=True)
    fit.add_argument("--parts", nargs="+", default=["semantic", "reconstruction"])
    fit.add_argument("--train-limit", type=int)
    fit.add_argument("--protocol")
    fit.add_argument("--name", default="fit")
    fit.add_argument("--diffusion")
    fit.add_argument("--classifier")
    fit.add_argument("--limit", type=int)
    fit.add_argument("--seeds", nargs="+", type=int, default=[0])
    table = commands.add_parser("table")
    for each in (bench, fit, table):
        each.add_argument("--out", type=Path, required=True)
    for each in (bench, fit):
        each.add_argument("--changed-images", type=int, default=100)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.command == "table":
        tables = {name: [pd.read_csv(file) for file in sorted(arguments.out.glob(f"*-{name}.csv"))] for name in TABLES}
        print_tables(*(pd.concat(tables[name]) for name in TABLES))
        return
    settings = [*(settings_of_benches(arguments) if arguments.command == "bench" else settings_of_fit(arguments))]

    dev: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    for setting in settings:
        ensemble = fit_or_load(setting, arguments.out / "ensembles" / setting.name, arguments.changed_images)
        rows = (
            list(dev_rows(setting.name, ensemble)),
            list(test_rows(setting, ensemble, arguments.out / "scores" / setting.name)),
        )
        for name, table, found in zip(TABLES, (dev, test), rows, strict=True):
            pd.DataFrame(found).to_csv(arguments.out / f"{setting.name}-{name}.csv", index=False)
            table += found
        print_tables(pd.DataFrame(dev), pd.DataFrame(test))


def settings_of_benches(arguments: argparse.Namespace) -> Iterator[Setting]:
    """The detectors of finished benchmarks, one ensemble for each seed."""
    for folder in arguments.folders:
        spec = read_benchmark(folder / "bench.yaml")
        for seed in spec.seeds:
            parts = [folder / "detectors" / f"{name}-{seed}" for name in arguments.parts]
            fit = {"alpha": spec.alpha, "seed": seed, "limit": spec.train_limit, "runtime": spec.runtime}
            name = f"{spec.name}-{seed}"
            yield Setting(name, parts, spec.train, spec.id, spec.ood_sources, spec.limit, fit, {})


def settings_of_fit(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Parts that are fitted with the ensemble."""
    networks = {"diffusion": arguments.diffusion, "classifier": arguments.classifier}
    for seed in arguments.seeds:
        fit = {"seed": seed, "limit": arguments.train_limit, "protocol": arguments.protocol}
        name = f"{arguments.name}-{seed}"
        ood = tuple(arguments.ood)
        yield Setting(name, arguments.parts, arguments.train, arguments.id, ood, arguments.limit, fit, networks)


def fit_or_load(setting: Setting, folder: Path, changed_images: int) -> Ensemble:
    if not folder.is_dir():
        ensemble = Ensemble(setting.parts, changed_images=changed_images)
        ensemble.fit(setting.train, **setting.networks, **setting.fit).save(folder)
    loaded = load(folder)
    assert isinstance(loaded, Ensemble)
    counts = f"{len(loaded.statistics)} statistics, {len(loaded.calibration)} calibration images"
    print(f"\n{setting.name}: {counts}; learned weights {np.round(loaded.weights, 2)}", flush=True)
    return loaded


def dev_rows(name: str, ensemble: Ensemble) -> Iterator[dict[str, Any]]:
    """AUROC of every rule and part on each change, from what the fit has measured."""
    normal, statistics = part_scores(ensemble, ensemble.calibration), part_scores(ensemble, ensemble.statistics)
    standardization = Standardization.fit(statistics)
    z_normal, z_statistics = standardization.transform(normal), standardization.transform(statistics)
    id_scores = {each: score.numpy() for each, score in ensemble.compute_scores(ensemble.calibration).items()}
    for number, change in enumerate(CHANGES):
        changed = ensemble.changed_scores[number]
        keys = tuple(map(str, range(len(changed))))
        vectors = {part: torch.from_numpy(changed[:, [i]]).float() for i, part in enumerate(ensemble.parts)}
        measured = type(ensemble.calibration)(keys, vectors=vectors)
        for indicator, score in ensemble.compute_scores(measured).items():
            if indicator != "learned":
                yield dev_row(name, change, indicator, id_scores[indicator], score.numpy())
        z_changed = standardization.transform(changed)
        for subset, columns in subsets(ensemble):
            yield dev_row(name, change, subset, z_normal[:, columns].mean(1), z_changed[:, columns].mean(1))
        yield dev_row(name, change, "max_z", z_normal.max(1), z_changed.max(1))
        others = standardization.transform(
            np.delete(ensemble.changed_scores, number, axis=0).reshape(-1, len(ensemble.parts))
        )
        for prior in _PRIORS:
            weights = learn_weights(z_statistics, others, prior)
            yield dev_row(name, change, f"learned, prior {prior:g}", z_normal @ weights, z_changed @ weights)


def subsets(ensemble: Ensemble) -> Iterator[tuple[str, list[int]]]:
    """Name and columns of every choice of two or more parts, but not all, whose z are summed."""
    for size in range(2, len(ensemble.parts)):
        for chosen in combinations(enumerate(ensemble.parts), size):
            yield " + ".join(name for _, name in chosen), [i for i, _ in chosen]


def part_scores(ensemble: Ensemble, measurements: Any) -> np.ndarray:
    return np.concatenate([measurements.vectors[name].double().numpy() for name in ensemble.parts], axis=1)


def dev_row(name: str, change: str, indicator: str, id_scores: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    return {"ensemble": name, "task": change, "indicator": indicator, "auroc": delong(id_scores, scores)[0]}


def test_rows(setting: Setting, ensemble: Ensemble, out: Path) -> Iterator[dict[str, Any]]:
    """AUROC of every rule and part on each test set, and the difference to the part that is best there."""
    scores: list[dict[str, np.ndarray]] = []
    parts = [f"{name}_score" for name in ensemble.parts]
    standardization = Standardization.fit(part_scores(ensemble, ensemble.statistics))
    for images in (setting.id, *setting.ood):
        source = ensemble.open_images(images, limit=setting.limit)
        score_folder(ensemble, source, out / folder_name(source), top_images=0)
        found = dict(read_scores(out / folder_name(source)).indicators)
        z = standardization.transform(np.stack([found[part] for part in parts], axis=1))
        scores.append(found | {subset: z[:, columns].mean(1) for subset, columns in subsets(ensemble)})
    id_scores, *others = scores
    for task, ood_scores in zip(setting.ood, others, strict=True):
        aurocs = {name: delong(id_scores[name], ood_scores[name])[0] for name in id_scores}
        best = max(parts, key=lambda name: aurocs[name])
        for name, auroc in aurocs.items():
            pairs = [(id_scores[each], ood_scores[each]) for each in (name, best)]
            difference = paired_difference(pairs[0], pairs[1])
            yield {
                "ensemble": setting.name,
                "task": task,
                "indicator": name,
                "auroc": auroc,
                "best_part": best,
                "difference": difference.value,
                "low": difference.low,
                "high": difference.high,
            }


def print_tables(dev: pd.DataFrame, test: pd.DataFrame) -> None:
    """Print both tables with the mean over tasks, and where a rule is lower than the best part."""
    for name, table in zip(TABLES, (dev, test), strict=True):
        wide = table.pivot_table(index="indicator", columns=["ensemble", "task"], values="auroc", sort=False)
        wide[("mean", "")] = wide.mean(axis=1)
        print(f"\n{name}: AUROC\n{wide.round(3).to_string()}", flush=True)
    rules = test[~test["indicator"].str.endswith("_score")]
    for name, rows in rules.groupby("indicator", sort=False):
        lower = rows[(rows["high"] < 0) & (rows["difference"] < -_TOLERANCE)]
        means = test.groupby("indicator")["auroc"].mean()
        best = means[means.index.str.endswith("_score")].max()
        tasks = ", ".join(f"{row.task} ({row.difference:+.3f})" for row in lower.itertuples()) or "none"
        print(
            f"{name}: mean {means[name]:.4f}, best part's mean {best:.4f}; significantly lower than the best part by "
            f"more than {_TOLERANCE}: {tasks}"
        )


if __name__ == "__main__":
    main()
