"""Train a generator of CIFAR-10 of the size of DDPM on one GPU in minutes, and evaluate detectors on it; see README.md.

python recipes/gpu/cifar10.py run OUT              trains, packs the weights, evaluates; the same command continues
python recipes/gpu/cifar10.py run OUT --toy        the same steps at a tiny size on the built-in sample, on a CPU
python recipes/gpu/cifar10.py join OUT/parts DIR   checks the parts of the weights and unpacks them
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import lzma
import os
import platform
import sys
import tarfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import farout
from farout.classifiers.presets import PRESETS as CLASSIFIER_PRESETS
from farout.core import store
from farout.core.errors import FaroutError
from farout.core.interruption import handle_signals
from farout.detectors import DETECTORS
from farout.diffusion.config import PRESETS
from farout.diffusion.train import build_model, train_model

PART_BYTES = 15 * 2**20
"""Size of a part of the packed weights: many services refuse files of 16 MiB and more."""
BLOCK_BYTES = 4 * 2**20
"""The archive is compressed in blocks of this size, all cores at once; the blocks together are one valid .xz file."""
MEASURED_STEPS = (10, 60)
"""The duration of a step is measured as the difference between trainings of so many steps, without start and end."""
NAMES = ("reconstruction", "msma", "diffpath", "denoising")


@dataclass(frozen=True)
class Recipe:
    """What is trained and evaluated.

    Attributes:
        train, id: in-distribution images to train and to evaluate on.
        ood: out-of-distribution sources.
        generator, training: the diffusion model and its training; the steps are those that fit in the time.
        classifier, classifier_training: the classifier, which `denoising` requires.
        fitted: number of training images that detectors are fitted on; those that no network has seen are used.
        statistics: number of images, besides a fifth for calibration, that no network is trained on.
        scored: number of images of each set that are scored.
        random_weights: also evaluate each detector with networks of random weights.
        arguments: settings of single detectors; default: the defaults of each.
    """

    train: str
    id: str
    ood: tuple[str, ...]
    generator: farout.DiffusionConfig
    training: farout.TrainingConfig
    classifier: farout.ClassifierConfig
    classifier_training: farout.TrainingConfig
    fitted: int
    statistics: int
    scored: int
    random_weights: bool
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)


def cifar10_recipe() -> Recipe:
    """The network of Ho et al. 2020, as the denoising paper trains it with classes, with a training of minutes.

    Its published training is 160,000 updates of 128 at a constant rate. Here there is time for about 6,000 of 256, so
    the rate is higher and decays, the weights are averaged over fewer updates, and dropout, which is for hundreds of
    epochs, is off.
    """
    fast: dict[str, Any] = {"precision": "bf16", "channels_last": True, "compile": True, "workers": _workers()}
    generator, training = PRESETS["cifar"]["model"], PRESETS["cifar"]["training"]
    sgd = CLASSIFIER_PRESETS["openood"]["training"]
    return Recipe(
        train="cifar10:train",
        id="cifar10:test",
        ood=("tiny_imagenet:test", "textures:test"),
        generator=farout.DiffusionConfig(**{**generator, "dropout": 0.0, "protocol": "common"}),
        training=farout.TrainingConfig(
            **{**training, "batch_size": 256, "learning_rate": 4e-4, "warmup": 300, "decay": "cosine", "ema": 0.999},
            **fast,
        ),
        classifier=farout.ClassifierConfig(network="wrn40_2", protocol="common"),
        classifier_training=farout.TrainingConfig(**{**sgd, "steps": 3000, "batch_size": 256, "warmup": 200}, **fast),
        fitted=4000,
        statistics=5000,
        scored=300,
        random_weights=True,
    )


def toy_recipe() -> Recipe:
    """Everything at a size for a test on a CPU; its results mean nothing."""
    sgd = CLASSIFIER_PRESETS["tiny"]["training"]
    return Recipe(
        train="sample_fashion:train",
        id="sample_fashion:test",
        ood=("sample_digits:test",),
        generator=farout.DiffusionConfig(network="tiny", classes=True, size=16, protocol="common"),
        training=farout.TrainingConfig(steps=5, batch_size=16, warmup=2, learning_rate=1e-3, ema=0.9),
        classifier=farout.ClassifierConfig(network="wrn16_1", size=16, protocol="common"),
        classifier_training=farout.TrainingConfig(**{**sgd, "steps": 5, "batch_size": 32, "warmup": 2}),
        fitted=120,
        statistics=400,
        scored=8,
        random_weights=False,
        arguments={"denoising": {"draws": 1, "steps": 2}},
    )


def _workers() -> int:
    """Processes that decode images: one of them yields about 2,000 images per second."""
    return max(0, min(12, (os.cpu_count() or 1) - 2))


class Run:
    """The folder of a run, with the seconds that each stage took.

    Every stage is skipped if its result exists, so that a second run of the command continues an interrupted one.
    """

    def __init__(self, out: Path, recipe: Recipe) -> None:
        self.out, self.recipe = out, recipe
        out.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = self._read("seconds.json", {})

    def _read(self, name: str, default: Any) -> Any:
        path = self.out / name
        return store.read_json(path) if path.is_file() else default

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of what runs inside to that of a stage, also if it is interrupted."""
        logging.info("%s", name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 1)
            store.write_json(self.out / "seconds.json", self.seconds)

    def plan(self, minutes: float, steps: int | None) -> dict[str, Any]:
        """The number of training steps: given, or as many as fit in the time; decided once, for a resumed training."""
        plan: dict[str, Any] = self._read("plan.json", {})
        requested = {"train": self.recipe.train, "network": self.recipe.generator.network, "minutes": minutes}
        requested["requested_steps"] = steps
        if plan:
            different = [f"{name} {plan.get(name)}" for name, value in requested.items() if plan.get(name) != value]
            if different:
                raise FaroutError(
                    f"{self.out} contains a run with {', '.join(different)}; give these or another folder"
                )
            return plan
        plan = {**requested, "steps": steps, "machine": machine()}
        if steps is None:
            with self.stage("measure the speed of the training"):
                per_step = self._measure_step()
            plan["seconds_per_step"] = round(per_step, 5)
            plan["images_per_s"] = round(self.recipe.training.batch_size / per_step, 1)
            plan["steps"] = max(1, int(60 * minutes / per_step))
        store.write_json(self.out / "plan.json", plan)
        return plan

    def _measure_step(self) -> float:
        recipe = self.recipe
        images = farout.open_source(recipe.train, limit=2000)

        def train_for(steps: int) -> float:
            model = build_model(
                recipe.generator, recipe.generator.preprocess(images), class_names=recipe.generator.class_names(images)
            )
            settings = replace(recipe.training, steps=steps)
            started = time.perf_counter()
            train_model(images, model, settings, objective=recipe.generator.objective)
            return time.perf_counter() - started

        few, many = MEASURED_STEPS
        train_for(2)  # compiles; the next trainings find the code
        first = train_for(few)
        return max(1e-4, (train_for(many) - first) / (many - few))

    def train_networks(self, steps: int) -> None:
        """Train the generator and the classifier on the same images, with the same images held out."""
        recipe = self.recipe
        # CIFAR-10 is split as published, image by image; the search for near-copies would take longer than a stage
        settings: dict[str, Any] = {"statistics": recipe.statistics, "groups": "none", "resume": True}
        if not (self.out / "generator" / "config.json").is_file():
            with self.stage("train the generator"):
                training = replace(recipe.training, steps=steps)
                farout.train_diffusion(
                    recipe.train, self.out / "generator", model=recipe.generator, training=training, **settings
                )
        if not (self.out / "classifier" / "config.json").is_file():
            with self.stage("train the classifier"):
                farout.train_classifier(
                    recipe.train,
                    self.out / "classifier",
                    model=recipe.classifier,
                    training=recipe.classifier_training,
                    **settings,
                )

    def pack_weights(self) -> None:
        """Write both networks, with weights rounded to bf16, as parts of a compressed archive with their checksums.

        The networks compute in bf16, so that rounded weights give the same results; they take half the space.
        """
        if (self.out / "parts" / "SHA256SUMS").is_file():
            return
        with self.stage("pack the weights"):
            rounded = self.out / "rounded"
            for name, kind in (("generator", farout.DiffusionModel), ("classifier", farout.Classifier)):
                model: Any = kind.load(self.out / name)
                network = model.network if name == "generator" else model.module
                with torch.no_grad():
                    for parameter in network.parameters():
                        parameter.copy_(parameter.bfloat16().float())
                model.save(rounded / name)
            split_folder(rounded, self.out / "parts")

    def evaluate_detectors(self) -> list[dict[str, Any]]:
        """Fit and evaluate each detector; returns its rows of the table."""
        recipe, rows = self.recipe, []
        runtime = farout.Runtime(workers=max(2, _workers()))
        for name in NAMES:
            folder = self.out / "detectors" / name
            with self.stage(f"fit {name}"):
                if (folder / "config.json").is_file():
                    detector = farout.load(folder)
                else:
                    detector = (
                        DETECTORS[name]
                        .load()()
                        .fit(
                            recipe.train,
                            self.out / "generator",
                            self.out / "classifier" if name == "denoising" else None,
                            limit=recipe.fitted,
                            groups="none",
                            protocol="common",
                            runtime=runtime,
                        )
                    )
                    detector.save(folder, link=self.out / "generator")
            with self.stage(f"evaluate {name}"):
                evaluation = farout.evaluate(
                    detector,
                    recipe.id,
                    list(recipe.ood),
                    self.out / "evaluations" / name,
                    limit=recipe.scored,
                    standard_baselines=False,
                    trivial_baselines=name == NAMES[0],
                    random_weights_baseline=recipe.random_weights,
                    baseline_limit=min(1000, recipe.fitted),
                )
            columns = ["detector", "ood", "auroc", "auroc_low", "auroc_high", "fpr95", "false_alarm"]
            columns += ["nfe", "gmacs", "images_per_s", "n_id", "n_ood"]
            rows += json.loads(evaluation.method_scores[columns].to_json(orient="records"))
        return rows

    def write_results(self, plan: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Write results.json and results.md, and print the latter."""
        classifier = farout.Classifier.load(self.out / "classifier")
        results = {
            "machine": machine(),
            "plan": plan,
            "generator_images": plan["steps"] * self.recipe.training.batch_size,
            "classifier_accuracy": classifier.provenance.get("held_out_accuracy"),
            "seconds": self.seconds,
            "recipe": asdict(self.recipe),
            "results": rows,
        }
        store.write_json(self.out / "results.json", results)
        text = describe_results(results)
        with store.atomic_file(self.out / "results.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        sys.stdout.write(text)


def machine() -> dict[str, str]:
    """The device, its driver's CUDA version, and the versions of the libraries."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "cuda": str(torch.version.cuda), "cores": str(os.cpu_count()), **store.versions()}


def describe_results(results: dict[str, Any]) -> str:
    """A page in Markdown: the training, the table, the times."""
    plan, recipe = results["plan"], results["recipe"]
    speed = f", {plan['images_per_s']:g} images/s" if "images_per_s" in plan else ""
    lines = [
        f"# {recipe['train']}: network `{plan['network']}`, {results['machine']['device']}",
        "",
        f"Generator: {plan['steps']} steps of {recipe['training']['batch_size']} ({results['generator_images']:,} "
        f"images{speed}). Accuracy of the classifier on held-out images: {results['classifier_accuracy']}.",
        f"In-distribution: {recipe['id']}; at most {recipe['scored']} images per set; protocol `common`; one seed.",
        "",
        "| detector | OOD images | AUROC (95 % interval) | FPR95 | false alarms | network evaluations | images/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["results"]:
        speed = "–" if row["images_per_s"] is None else f"{row['images_per_s']:.1f}"
        interval = f"{row['auroc']:.3f} ({row['auroc_low']:.3f} to {row['auroc_high']:.3f})"
        lines.append(
            f"| {row['detector']} | {row['ood']} | {interval} | {row['fpr95']:.3f} | {row['false_alarm']:.3f} "
            f"| {row['nfe']:g} | {speed} |"
        )
    lines += ["", "| stage | seconds |", "| --- | --- |"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in results["seconds"].items()]
    return "\n".join([*lines, f"| all | {sum(results['seconds'].values()):.1f} |", ""])


def split_folder(folder: Path, parts: Path) -> None:
    """Write a folder as a compressed archive in parts, and SHA256SUMS, in the format of `sha256sum`, last."""
    parts.mkdir(parents=True, exist_ok=True)
    archive = parts / "weights.tar"
    with tarfile.open(archive, "w") as tar:
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            tar.add(path, path.relative_to(folder))
    # rounded to bf16, a weight is two zero bytes, one of mantissa and one of sign and exponent: literals by position
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "lc": 0, "lp": 2, "pb": 2}]
    content = archive.read_bytes()
    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        packed = b"".join(pool.map(lambda block: lzma.compress(block, filters=filters), blocks))
    sums = []
    for number, start in enumerate(range(0, len(packed), PART_BYTES)):
        part = packed[start : start + PART_BYTES]
        name = f"weights.tar.xz.{number:02d}"
        (parts / name).write_bytes(part)
        sums.append(f"{hashlib.sha256(part).hexdigest()}  {name}\n")
    archive.unlink()
    with store.atomic_file(parts / "SHA256SUMS") as temporary:
        temporary.write_text("".join(sums), encoding="utf-8")


def join_parts(parts: Path, out: Path) -> None:
    """Check the parts against SHA256SUMS and unpack them; raises FaroutError for a missing or damaged part."""
    sums = parts / "SHA256SUMS"
    if not sums.is_file():
        raise FaroutError(f"{sums} is missing; give the folder of the parts")
    packed = []
    for line in sums.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        path = parts / Path(name).name
        if not path.is_file():
            raise FaroutError(f"{path} is missing; copy it again")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != expected:
            raise FaroutError(f"{path} is damaged (its SHA-256 differs from that in SHA256SUMS); copy it again")
        packed.append(content)
    out.mkdir(parents=True, exist_ok=True)
    archive = out / "weights.tar"
    archive.write_bytes(lzma.decompress(b"".join(packed)))
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    archive.unlink()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, pack the weights, evaluate")
    run.add_argument("out", type=Path, help="folder of all results")
    run.add_argument("--minutes", type=float, default=5.0, help="time for the updates of the generator (default: 5)")
    run.add_argument("--steps", type=int, help="number of updates of the generator, instead of a time")
    run.add_argument("--images", type=int, help="images scored of each set (default: 300)")
    run.add_argument("--toy", action="store_true", help="a tiny size on the built-in sample, on a CPU")
    join = commands.add_parser("join", help="check the parts of the weights and unpack them")
    join.add_argument("parts", type=Path)
    join.add_argument("out", type=Path)
    given = parser.parse_args(arguments)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if given.command == "join":
        join_parts(given.parts, given.out)
        return
    recipe = toy_recipe() if given.toy else cifar10_recipe()
    if given.images is not None:
        recipe = replace(recipe, scored=given.images)
    torch.backends.cudnn.benchmark = True  # all batches of a training have one shape
    work = Run(given.out, recipe)
    steps = recipe.training.steps if given.toy and given.steps is None else given.steps
    with handle_signals():  # a training that a time limit ends writes a checkpoint
        plan = work.plan(given.minutes, steps)
        work.train_networks(plan["steps"])
        work.pack_weights()
        work.write_results(plan, work.evaluate_detectors())


if __name__ == "__main__":
    try:
        main()
    except FaroutError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
