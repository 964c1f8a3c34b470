"""How a classifier's view of an image moves when the image is noised part-way and denoised under its class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import count_known_classes, describe_classes
from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.data.batching import Batch
from farout.data.classes import class_name
from farout.data.image_source import ImageSource
from farout.detectors.base import Detector, Measurements
from farout.detectors.denoising.differences import (
    METRICS,
    POST_HOC,
    SPACES,
    Distance,
    PostHoc,
    changes,
    post_hoc,
    views,
)
from farout.detectors.denoising.initial_noise import Neighbours, descriptors, inverted
from farout.detectors.settings import check_words, checked_levels
from farout.diffusion import noise_levels
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.denoiser import Denoiser, GuidedDenoiser, NetworkDenoiser
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import noise_table
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.registry import SOLVERS, create_solver, solver_path
from farout.features.densities import ZScore, pack_arrays, unpack_arrays

__all__ = ["Denoising"]

_SCORES = (*SPACES, *(f"{space}_local" for space in SPACES), *POST_HOC, "either")


class Denoising(Detector):
    """Change of a classifier's output when the image is noised and denoised.

    Liu, Ren, Cheng, Huang, Li and Zhao, "Diffusion denoising process for perceptron bias in out-of-distribution
    detection", arXiv 2211.11255. An image x of predicted class y is noised to level t and denoised under y by a
    deterministic solver, with classifier-free guidance e = e(null) + s (e(y) - e(null)). With f the classifier's logits
    (or penultimate features, or the pixels themselves), divided by their Euclidean norm,

        S_global(t) = mean over draws |f(x) - f(x_t)|,   S_local(t) = mean over draws |f(x_s) - f(x_t)|,

    s the level below t (the clean image below the lowest); |.| is the L1 norm, as in the released code (the paper's
    figures say L2). What lies in the distribution keeps its class and comes back; what does not is dragged elsewhere.
    Scores are means over levels. The clean image is seen once (the released code adds noise of 0.01 to it); the network
    is told the level it is at (the released code is off by one).

    Args:
        levels: noise levels t to which images are noised.
        draws: noise samples per image, the same at every level.
        noise: `shared`: the same noise for all images; `image`: noise per image; `neighbour`: inverted noise of the
            nearest statistics images, one per draw (the paper, for unconditional models).
        condition: `class`: denoise under the image's class; `none`: without condition.
        labels: class of an image: `predicted` by the classifier, or `true`, its label (for ablations; a random class if
            the label is unknown).
        guidance: scale s of classifier-free guidance; 1: no guidance; the paper's omega is s - 1.
        solver: one of `ddim`, `heun`, `dpm_solver_2m`, `unipc`, `plms`, `pndm2`, `pndm4`, `ndm1`, `ndm4` or
            `probability_flow`.
        steps: number of steps from level t to the clean image, evenly spaced in log sigma.
        grid: use steps of this many levels instead, down to level 0, as published; default: use `steps`.
        score: indicator used as score: `logit`, `feature` or `pixel` (change from the clean image), `…_local` (change
            between levels), `either` (with `cascade`), or `energy`, `max_logit`, `msp` of the clean image alone.
        use_levels: noise levels that count in the score; default: all.
        use_draws: number of draws that count in the score; default: all.
        distance: distance of outputs: `l1`, `l2`, or `argmax` (change of the largest component of the clean image).
        cascade: score of the clean image's logits for the indicator `either`, the larger of the two standardised
            scores; default: no `either`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"diffusion", "classes", "classifier"})
    diffusion: DiffusionModel | None = None
    makes_maps: ClassVar[bool] = True
    map_unit: ClassVar[str] = "mean absolute differences of pixels in [0, 1]"
    map_brightest: ClassVar[float] = 0.5
    statistics_minimum: ClassVar[int] = 100
    network_preset: ClassVar[str] = "classes"
    companions: ClassVar[tuple[str, ...]] = ("posthoc",)
    statistics_suffice: ClassVar[bool] = True
    choices: ClassVar[frozenset[str]] = frozenset({"score", "distance", "cascade", "use_levels", "use_draws"})
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"levels": (300,), "draws": 4, "guidance": 3.0, "solver": "ddim", "grid": 20},
        "released": {"levels": (120, 240, 360), "draws": 4, "guidance": 3.0, "solver": "ddim", "grid": 20},
        "fast": {},
        "unconditional": {"condition": "none", "noise": "neighbour", "draws": 1, "solver": "ddim", "grid": 20},
    }

    def __init__(
        self,
        *,
        levels: tuple[int, ...] = (300,),
        draws: int = 4,
        noise: Literal["shared", "image", "neighbour"] = "shared",
        condition: Literal["class", "none"] = "class",
        labels: Literal["predicted", "true"] = "predicted",
        guidance: float = 3.0,
        solver: str = "dpm_solver_2m",
        steps: int = 6,
        grid: int | None = None,
        score: str = "logit",
        use_levels: tuple[int, ...] | None = None,
        use_draws: int | None = None,
        distance: Distance = "l1",
        cascade: PostHoc | None = None,
    ) -> None:
        check_words(self)
        if not levels or len(set(levels)) < len(levels) or min(levels) < 0:
            raise FaroutError(f"levels must be different numbers from 0, got {list(levels)}")
        if min(draws, steps, 1 if grid is None else grid) < 1:
            raise FaroutError(f"draws, steps and grid must be at least 1, got {draws}, {steps} and {grid}")
        if solver not in SOLVERS:
            raise FaroutError(f"there is no solver {solver!r}; expected one of {', '.join(SOLVERS)}")
        if use_levels is not None and not (use_levels and set(use_levels) <= set(levels)):
            raise FaroutError(f"use_levels must be some of the levels {list(levels)}, got {list(use_levels)}")
        if use_draws is not None and not 1 <= use_draws <= draws:
            raise FaroutError(f"use_draws must be 1 to {draws}, got {use_draws}")
        self._check_score(score, levels, cascade)
        if condition == "none":
            idle = ("labels",) if guidance == 1 else ("guidance", "labels")  # a guidance of 1 is none
            self._refuse_idle("without a condition; give condition class", *idle)
        if grid is not None:
            self._refuse_idle("with grid; leave grid out", "steps")
        self.levels = tuple(sorted(levels))
        self.neighbours: Neighbours | None = None
        self.standard: dict[str, ZScore] = {}
        self.denoiser: NetworkDenoiser | None = None
        self.shared: Tensor | None = None

    @staticmethod
    def _check_score(score: str, levels: tuple[int, ...], cascade: str | None) -> None:
        if score not in _SCORES:
            raise FaroutError(f"there is no score {score!r}; expected one of {', '.join(_SCORES)}")
        if score.endswith("_local") and len(levels) < 2:
            raise FaroutError(f"with one level {score} is {score.removesuffix('_local')}; give several levels")
        if score == "either" and cascade is None:
            raise FaroutError(f"the score either requires a cascade: one of {', '.join(POST_HOC)}")

    @classmethod
    def tiny(cls, resources: Any) -> Denoising:
        """Two levels, two draws, two steps; by the brightest pixel, for untrained networks tell little else apart."""
        return cls(levels=(200, 400), draws=2, steps=2, score="pixel", distance="argmax")

    # -- networks ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Builds paths and denoiser."""
        model = self.diffusion
        if model is None or self.classifier is None:
            return
        self.denoiser = model.denoiser(self.runtime.batch_size, self.precision)
        self.solve = create_solver(self.config["solver"], model.schedule)
        self.paths = self._all_paths(model.schedule).to(model.device)
        self.shared = None

    def network_config(self, config: DiffusionConfig) -> DiffusionConfig:
        """As given; refused where it knows no classes and they are wanted."""
        if self.config["condition"] == "class" and not config.classes:
            raise FaroutError("denoising under a class requires a model of classes; leave out --no-model.classes")
        return config

    def check(self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None) -> None:
        """Refuses models that do not go together, levels and paths that the schedule or the solver cannot have."""
        assert diffusion is not None
        assert classifier is not None
        self._check_models(diffusion, classifier)
        checked_levels(self.levels, diffusion.schedule.steps)
        create_solver(self.config["solver"], diffusion.schedule).check(self._all_paths(diffusion.schedule))
        if self.config["labels"] == "true" and not set(_names(source)) & set(classifier.class_names):
            known = ", ".join(classifier.class_names[: count_known_classes(classifier)])
            raise FaroutError(f"labels=true requires images of the classes {known}; {source.name} has none of them")

    def _all_paths(self, schedule: NoiseSchedule) -> Tensor:
        return noise_levels.pad_paths([self._path(schedule, level) for level in self.levels])

    def _path(self, schedule: NoiseSchedule, level: int) -> Tensor:
        spacing = self.config["grid"]
        if spacing is None:
            path = noise_levels.geometric_path(schedule, level, self.config["steps"])
        else:
            path = noise_levels.grid_path(schedule, level, spacing)
        return solver_path(self.config["solver"], path)

    def _check_models(self, model: DiffusionModel, classifier: Classifier) -> None:
        conditioning = model.conditioning
        theirs = vars(classifier.preprocessing)
        for name, ours in vars(model.preprocessing).items():
            if name != "native" and ours != theirs[name]:
                hint = f"the diffusion model has {name} {ours}, the classifier {theirs[name]}"
                raise FaroutError(f"{hint}; train both on images prepared alike")
        if self.config["condition"] == "none":
            return
        if conditioning is None:
            hint = "give a class-conditional one (farout train diffusion --preset classes) or --condition none"
            raise FaroutError(f"this diffusion model is unconditional and cannot denoise under a class; {hint}")
        if conditioning.num_classes != classifier.classes:
            counts = f"{conditioning.num_classes} classes, the classifier {describe_classes(classifier)}"
            raise FaroutError(f"the diffusion model knows {counts}; train both on the same images and classes")
        names = {tuple(conditioning.class_names), tuple(classifier.class_names)}
        if len(names - {tuple(map(str, range(classifier.classes)))}) > 1:  # bare numbers are no names
            raise FaroutError("diffusion model and classifier name their classes differently; train both on the same")
        if self.config["guidance"] != 1 and not conditioning.has_null:
            raise FaroutError("this diffusion model has no null condition to guide away from; give --guidance 1")

    @property
    def rows_per_image(self) -> int:
        """Levels times draws, twice with guidance."""
        guided = self.config["condition"] == "class" and self.config["guidance"] != 1
        return len(self.levels) * int(self.config["draws"]) * (2 if guided else 1)

    @property
    def evaluations(self) -> int:
        """Rows that the diffusion model has evaluated; the classifier's are not counted."""
        return 0 if self.denoiser is None else self.denoiser.evaluations

    # -- labels --------------------------------------------------------------------------------------------------

    def batches(self, source: ImageSource) -> Iterator[Batch]:
        """Batches whose labels are the classifier's numbers, -1 where it does not know them."""
        assert self.classifier is not None
        known = self.classifier.class_names
        for batch in super().batches(source):
            if batch.labels is None:
                yield batch
                continue
            names = [class_name(source, label) for label in batch.labels.tolist()]
            numbers = [known.index(name) if name in known else -1 for name in names]
            yield replace(batch, labels=torch.tensor(numbers, dtype=torch.long))

    def _classes(self, batch: Batch, logits: Tensor) -> Tensor:
        """The class (B,) under which each image is denoised."""
        predicted = logits.argmax(1)
        if self.config["labels"] == "predicted":
            return predicted
        given = batch.labels if batch.labels is not None else torch.full((len(predicted),), -1)
        drawn = [_number(f"{self.seed} {key}") % logits.shape[1] for key in batch.identities]
        return torch.where(given >= 0, given, torch.tensor(drawn)).to(logits.device)

    # -- measuring -----------------------------------------------------------------------------------------------

    def measure_all(self, source: ImageSource, title: str, *, watch: bool = False) -> Measurements:
        """The measurements of all readable images; of the statistics images (`watch`), first their inverted noise."""
        if watch and self.config["noise"] == "neighbour":
            self._invert(source)
        return super().measure_all(source, title)

    def _invert(self, source: ImageSource) -> None:
        model, denoiser, seen, noise = self.diffusion, self.denoiser, [], []
        assert model is not None
        assert denoiser is not None
        with task("inverting statistics images", len(source)) as bar:
            for batch in self.batches(source):
                if batch.keys:
                    images = batch.images.to(model.device)
                    seen.append(descriptors(batch.images))
                    noise.append(inverted(model, denoiser, images, self._null(len(images))).cpu())
                bar.advance(len(batch.keys))
        self.neighbours = Neighbours(torch.cat(seen), torch.cat(noise))

    def _null(self, count: int) -> Condition | None:
        """The condition that stands for none; None for an unconditional model."""
        assert self.diffusion is not None
        return None if self.diffusion.conditioning is None else self.diffusion.conditioning.null_condition(count)

    @torch.no_grad()
    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Changes of every level and draw: values (B, level, draw, metric), of `METRICS`; and `POST_HOC` of the clean
        image, the same at all of them.

        With `maps`: the mean over levels and draws of |image - denoised| (B, H, W), and the pictures `denoised` of the
        highest level's first draw (B, C, H, W).
        """
        model, classifier, count = self.diffusion, self.classifier, len(batch.keys)
        if model is None or classifier is None:
            raise FaroutError("Denoising requires a fit before it measures: call fit(images) or farout.load(folder)")
        grid = (len(self.levels), int(self.config["draws"]))
        names, levels = (*METRICS, *POST_HOC), tuple(float(t) for t in self.levels)
        if not count:
            return Measurements((), torch.empty(0, *grid, len(names)), levels, names)
        images = batch.images.to(model.device)
        outputs = classifier.outputs(images, self.runtime.batch_size, self.precision)
        clean = views(images, outputs)
        restored = self._denoised(batch, images, self._classes(batch, outputs.logits))
        again = classifier.outputs(restored, self.runtime.batch_size, self.precision)
        moved = {name: value.reshape(count, *grid, -1) for name, value in views(restored, again).items()}
        changed = changes({name: value[:, None] for name, value in clean.items()}, moved)
        beside = post_hoc(outputs.logits)[:, None, None].expand(-1, *grid, -1)
        measured = Measurements(batch.keys, torch.cat([changed.cpu(), beside.cpu()], dim=-1).float(), levels, names)
        return (
            self._with_maps(measured, images, restored.reshape(count, *grid, *images.shape[1:])) if maps else measured
        )

    def _with_maps(self, measured: Measurements, images: Tensor, restored: Tensor) -> Measurements:
        heat = (restored - images[:, None, None]).abs().mean((1, 2, 3)).cpu()
        return replace(measured, maps=heat, pictures={"denoised": restored[:, -1, 0].cpu()})

    def _denoised(self, batch: Batch, images: Tensor, classes: Tensor) -> Tensor:
        """The images noised and denoised, (B * levels * draws, C, H, W) in [0, 1]; all in one batch."""
        model, draws = self.diffusion, int(self.config["draws"])
        assert model is not None
        per_image = len(self.levels) * draws
        sigmas = self.paths.repeat_interleave(draws, 0).repeat(len(images), 1)
        noise = self._noise(batch, images).flatten(0, 2).to(images.device)
        x0 = model.encode(images).repeat_interleave(per_image, 0)
        x = x0 + sigmas[:, 0].reshape(-1, *[1] * (x0.ndim - 1)) * noise
        denoiser, condition = self._guided(classes.repeat_interleave(per_image))
        return model.decode(self.solve(denoiser, x, sigmas, condition))

    def _guided(self, classes: Tensor) -> tuple[Denoiser, Condition | None]:
        assert self.denoiser is not None
        assert self.diffusion is not None
        conditioning, scale = self.diffusion.conditioning, float(self.config["guidance"])
        if self.config["condition"] == "none" or conditioning is None:
            return self.denoiser, self._null(len(classes))
        if scale == 1:
            return self.denoiser, conditioning(classes)
        return GuidedDenoiser(self.denoiser, scale, conditioning.null_condition), conditioning(classes)

    def _noise(self, batch: Batch, images: Tensor) -> Tensor:
        """(B, levels, draws, C, H, W), the same noises at every level."""
        assert self.diffusion is not None
        draws, kind, shape = int(self.config["draws"]), self.config["noise"], self.diffusion.shape
        if kind == "neighbour":
            if self.neighbours is None:
                raise FaroutError("neighbours' noise requires a fit with noise='neighbour'; fit again")
            table = self.neighbours.nearest(images, draws)[:, None]
        elif kind == "image":
            table = noise_table("image", batch.identities, shape, self.seed, (0,), draws)
        else:
            if self.shared is None:
                self.shared = noise_table("shared", ("",), shape, self.seed, (0,), draws)
            table = self.shared
        return table.expand(len(images), len(self.levels), *table.shape[2:])

    # -- scoring -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forgets neighbours and statistics of an earlier fit."""
        self.neighbours, self.standard = None, {}

    def fit_statistics(self, measurements: Measurements) -> None:
        """Mean and deviation of the logit change and of the post-hoc scores, for `either`."""
        parts = {"change": self._mean(measurements, "logit", "global"), **self._post_hoc(measurements)}
        self.standard = {name: ZScore.fit(value.numpy()[:, None]) for name, value in parts.items()}

    def _post_hoc(self, measurements: Measurements) -> dict[str, Tensor]:
        assert measurements.values is not None
        first = measurements.values[:, 0, 0].double()
        found = {name: first[:, measurements.metrics.index(name)] for name in POST_HOC}
        return {**found, "msp": torch.expm1(found["msp"])}

    def _mean(self, measurements: Measurements, space: str, reach: str) -> Tensor:
        assert measurements.values is not None
        column = measurements.metrics.index(f"{space}_{reach}_{self.config['distance']}")
        used = self.config["use_levels"] or self.levels
        rows = [place for place, level in enumerate(measurements.levels) if level in used]
        return measurements.values[:, rows, : self.config["use_draws"], column].double().mean((1, 2))

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """S_global and, with several levels, S_local in the three spaces; the three post-hoc scores; `either`."""
        found = {space: self._mean(measurements, space, "global") for space in SPACES}
        if len(self.levels) > 1:
            found |= {f"{space}_local": self._mean(measurements, space, "local") for space in SPACES}
        beside, cascade = self._post_hoc(measurements), self.config["cascade"]
        if cascade is not None:
            pair = {"change": found["logit"], cascade: beside[cascade]}
            scores = [self.standard[name].score(value.numpy()[:, None]) for name, value in pair.items()]
            found["either"] = torch.from_numpy(np.maximum(*scores))
        return found | beside

    def state(self) -> dict[str, np.ndarray]:
        """Neighbours and statistics."""
        near = {} if self.neighbours is None else self.neighbours.to_arrays()
        return {**near, **pack_arrays(self.standard)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        if "neighbours" in state:
            self.neighbours = Neighbours.from_arrays(state)
        if "change.mean" in state:
            self.standard = {name: ZScore.from_arrays(unpack_arrays(state, name)) for name in ("change", *POST_HOC)}


def _names(source: ImageSource) -> list[str]:
    return [class_name(source, label) for label in source.labels or ()]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
