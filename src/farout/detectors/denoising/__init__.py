"""Change of a classifier's output when an image is noised and denoised under its class (Liu et al. 2022)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
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
from farout.detectors.argument_checks import check_literals, sort_levels
from farout.detectors.base import Detector, Measurements
from farout.detectors.declarations import HeatMaps, Requirements
from farout.detectors.denoising.changes import (
    METRICS,
    POSTHOC,
    SPACES,
    Distance,
    PosthocScore,
    compute_changes,
    compute_posthoc_scores,
    normalize_outputs,
)
from farout.detectors.denoising.neighbor_noise import NeighborNoise, compute_descriptors, invert_images
from farout.diffusion import noise_levels
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.denoiser import Denoiser, GuidedDenoiser, NetworkDenoiser, expand_dims
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import noise_table
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.registry import SOLVERS, create_solver, solver_path
from farout.features.densities import ZScore, pack_arrays, unpack_arrays

__all__ = ["Denoising"]

_INDICATORS = (*SPACES, *(f"{space}_local" for space in SPACES), *POSTHOC, "either")


class Denoising(Detector):
    """Change of a classifier's output when an image is noised and denoised.

    Liu, Ren, Cheng, Huang, Li and Zhao, "Diffusion denoising process for perceptron bias in out-of-distribution
    detection", arXiv 2211.11255. An image x of predicted class y is noised to level t and denoised to x_t under y by a
    deterministic solver, with classifier-free guidance e = e(null) + s (e(y) - e(null)). With f the classifier's logits
    (or penultimate features, or the pixels themselves), divided by their Euclidean norm,

        S_global(t) = mean over draws ||f(x) - f(x_t)||,   S_local(t) = mean over draws ||f(x_s) - f(x_t)||,

    s the level below t (the clean image below the lowest level), with the L1 norm as in the released code (the paper's
    figures say L2). An in-distribution image keeps its class and is reconstructed; another image is changed towards the
    class. Scores are means over levels. The classifier sees the clean image without noise (the released code adds noise
    of 0.01), and the network is given the level of its input (the released code is off by one).

    Args:
        levels: noise levels t to which images are noised.
        draws: noise samples per image, the same at every level.
        noise: `shared`: the same noise for all images; `image`: noise per image; `neighbor`: inverted noise of the
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

    requirements: ClassVar[Requirements] = Requirements(
        diffusion="images",
        class_conditional=True,
        classifier=True,
        diffusion_preset="classes",
        statistics=100,
        more_statistics=False,
    )
    heat_maps: ClassVar[HeatMaps] = HeatMaps(unit="mean absolute differences of pixels in [0, 1]", maximum=0.5)
    baselines: ClassVar[tuple[str, ...]] = ("posthoc",)
    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"score", "distance", "cascade", "use_levels", "use_draws"})
    # the brightest pixel: untrained networks distinguish images by little else
    test_arguments: ClassVar[Mapping[str, Any]] = {
        "levels": (200, 400),
        "draws": 2,
        "steps": 2,
        "score": "pixel",
        "distance": "argmax",
    }
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"levels": (300,), "draws": 4, "guidance": 3.0, "solver": "ddim", "grid": 20},
        "released": {"levels": (120, 240, 360), "draws": 4, "guidance": 3.0, "solver": "ddim", "grid": 20},
        "fast": {},
        "unconditional": {"condition": "none", "noise": "neighbor", "draws": 1, "solver": "ddim", "grid": 20},
    }

    diffusion: DiffusionModel | None = None

    def __init__(
        self,
        *,
        levels: tuple[int, ...] = (300,),
        draws: int = 4,
        noise: Literal["shared", "image", "neighbor"] = "shared",
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
        cascade: PosthocScore | None = None,
    ) -> None:
        check_literals(self)
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
        if score not in _INDICATORS:
            raise FaroutError(f"there is no score {score!r}; expected one of {', '.join(_INDICATORS)}")
        if score.endswith("_local") and len(levels) < 2:
            raise FaroutError(f"with one level {score} is {score.removesuffix('_local')}; give several levels")
        if score == "either" and cascade is None:
            raise FaroutError(f"the score either requires a cascade: one of {', '.join(POSTHOC)}")
        if condition == "none":
            unused = ("labels",) if guidance == 1 else ("guidance", "labels")  # a guidance of 1 means none
            self._check_unused("with condition class", *unused)
        if grid is not None:
            self._check_unused("without grid", "steps")
        self.levels, self.draws = tuple(sorted(levels)), draws
        self.is_guided = condition == "class" and guidance != 1
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Discard the statistics of an earlier fit."""
        self.neighbors: NeighborNoise | None = None
        self.z: dict[str, ZScore] = {}

    # Networks.

    def configure_diffusion(self, config: DiffusionConfig) -> DiffusionConfig:
        """Reject an unconditional model where a class condition is required."""
        if self.config["condition"] == "class" and not config.classes:
            raise FaroutError("denoising under a class requires a model of classes; leave out --no-model.classes")
        return config

    def check_networks(
        self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None
    ) -> None:
        """Reject networks that do not match, and levels and paths that the schedule or the solver does not allow."""
        assert diffusion is not None
        assert classifier is not None
        _check_same_preprocessing(diffusion, classifier)
        if self.config["condition"] == "class":
            _check_same_classes(diffusion, classifier, guided=self.is_guided)
        sort_levels(self.levels, diffusion.schedule.num_levels)
        create_solver(self.config["solver"], diffusion.schedule).check(self._build_paths(diffusion.schedule))
        if self.config["labels"] == "true":
            names = {class_name(source, label) for label in source.labels or ()}
            if not names & set(classifier.class_names):
                known = ", ".join(classifier.class_names[: count_known_classes(classifier)])
                raise FaroutError(f"labels=true requires images of the classes {known}; {source.name} has none of them")

    def _build_paths(self, schedule: NoiseSchedule) -> Tensor:
        """Sigmas (level, steps + 1) from each level to the clean image."""
        spacing, steps = self.config["grid"], self.config["steps"]
        paths = [
            noise_levels.geometric_path(schedule, t, steps)
            if spacing is None
            else noise_levels.strided_path(schedule, t, spacing)
            for t in self.levels
        ]
        return noise_levels.pad_paths([solver_path(self.config["solver"], path) for path in paths])

    def prepare_networks(self) -> None:
        """Build paths, solver and denoiser."""
        model = self.diffusion
        if model is None or self.classifier is None:
            return
        self.denoiser: NetworkDenoiser = model.denoiser(self.runtime.batch_size, self.precision, self.backend)
        self.solver = create_solver(self.config["solver"], model.schedule)
        self.paths = self._build_paths(model.schedule).to(model.device)
        self.shared_noise: Tensor | None = None

    @property
    def rows_per_image(self) -> int:
        """Levels times draws, twice with guidance."""
        return len(self.levels) * self.draws * (2 if self.is_guided else 1)

    @property
    def evaluations(self) -> int:
        """Rows that the diffusion model has evaluated; the classifier's are not counted."""
        return self.denoiser.evaluations

    def load_batches(self, source: ImageSource) -> Iterator[Batch]:
        """Load batches with the classifier's class numbers as labels, -1 for classes that it does not know."""
        assert self.classifier is not None
        known = self.classifier.class_names
        for batch in super().load_batches(source):
            if batch.labels is None:
                yield batch
            else:
                names = [class_name(source, label) for label in batch.labels.tolist()]
                numbers = [known.index(name) if name in known else -1 for name in names]
                yield replace(batch, labels=torch.tensor(numbers, dtype=torch.long))

    # Measuring.

    def prepare_statistics(self, images: ImageSource) -> None:
        """Invert the statistics images to noise where the neighbors' noise is used."""
        if self.config["noise"] != "neighbor":
            return
        model = self.diffusion
        assert model is not None
        descriptors, noise = [], []
        with task("inverting statistics images", len(images)) as bar:
            for batch in self.load_batches(images):
                if batch.keys:
                    null = None if model.conditioning is None else model.conditioning.null_condition(len(batch.keys))
                    descriptors.append(compute_descriptors(batch.images))
                    noise.append(invert_images(model, self.denoiser, batch.images.to(model.device), null).cpu())
                bar.advance(len(batch.keys))
        self.neighbors = NeighborNoise(torch.cat(descriptors), torch.cat(noise))

    @torch.no_grad()
    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Values (B, level, draw, metric): METRICS, and POSTHOC of the clean image, the same at every level and draw.

        With `maps`: the mean over levels and draws of |image - denoised| (B, H, W), and the picture `denoised`
        (B, C, H, W) of the highest level's first draw.
        """
        model, classifier = self.diffusion, self.classifier
        if model is None or classifier is None:
            raise FaroutError("Denoising requires a fit before it measures: call fit(images) or farout.load(folder)")
        grid = (len(batch.keys), len(self.levels), self.draws)
        images = batch.images.to(model.device)
        outputs = classifier.outputs(images, self.runtime.batch_size, self.precision, backend=self.backend)

        # Every image, level and draw is one row of the batch: x + sigma_t noise, denoised under y.
        rows_per_image = len(self.levels) * self.draws
        y = self._choose_classes(batch, outputs.logits).repeat_interleave(rows_per_image)
        sigmas = self.paths.repeat_interleave(self.draws, 0).repeat(len(images), 1)
        x = model.encode(images).repeat_interleave(rows_per_image, 0)
        noised = x + expand_dims(sigmas[:, 0], x) * self._noise(batch).flatten(0, 2).to(model.device)
        denoiser, condition = self._guide(y)
        denoised = model.decode(self.solver(denoiser, noised, sigmas, condition))

        denoised_outputs = classifier.outputs(denoised, self.runtime.batch_size, self.precision, backend=self.backend)
        f_x = normalize_outputs(images, outputs)
        f_t = {name: f.reshape(*grid, -1) for name, f in normalize_outputs(denoised, denoised_outputs).items()}
        changes = compute_changes(f_x, f_t).cpu()
        posthoc = compute_posthoc_scores(outputs.logits)[:, None, None].expand(*grid, -1).cpu()
        values = torch.cat([changes, posthoc], dim=-1).float()
        measurements = Measurements(batch.keys, values, tuple(map(float, self.levels)), (*METRICS, *POSTHOC))
        if not maps:
            return measurements
        denoised = denoised.reshape(*grid, *images.shape[1:])
        heat = (denoised - images[:, None, None]).abs().mean((1, 2, 3)).cpu()
        return replace(measurements, maps=heat, pictures={"denoised": denoised[:, -1, 0].cpu()})

    def _choose_classes(self, batch: Batch, logits: Tensor) -> Tensor:
        """The class (B,) under which each image is denoised."""
        predicted = logits.argmax(1)
        if self.config["labels"] == "predicted":
            return predicted
        labels = batch.labels if batch.labels is not None else torch.full((len(predicted),), -1)
        # an unknown class is replaced by a random one, which depends on the seed and the image alone
        digests = [hashlib.sha256(f"{self.seed} {identity}".encode()).digest() for identity in batch.identities]
        random = torch.tensor([int.from_bytes(digest[:4], "big") % logits.shape[1] for digest in digests])
        return torch.where(labels >= 0, labels, random).to(logits.device)

    def _guide(self, classes: Tensor) -> tuple[Denoiser, Condition | None]:
        """The denoiser with guidance, and the condition of each row."""
        assert self.diffusion is not None
        conditioning = self.diffusion.conditioning
        if conditioning is None:
            return self.denoiser, None
        if self.config["condition"] == "none":
            return self.denoiser, conditioning.null_condition(len(classes))
        if self.is_guided:
            # e = e(null) + s (e(y) - e(null))
            return GuidedDenoiser(
                self.denoiser, float(self.config["guidance"]), conditioning.null_condition
            ), conditioning(classes)
        return self.denoiser, conditioning(classes)

    def _noise(self, batch: Batch) -> Tensor:
        """(B, level, draw, C, H, W), the same noise at every level."""
        assert self.diffusion is not None
        shape = self.diffusion.shape
        if self.config["noise"] == "neighbor":
            if self.neighbors is None:
                raise FaroutError("neighbors' noise requires a fit with noise='neighbor'; fit again")
            noise = self.neighbors.find(batch.images, self.draws)[:, None]
        elif self.config["noise"] == "image":
            noise = noise_table("image", batch.identities, shape, self.seed, (0,), self.draws)
        else:
            if self.shared_noise is None:
                self.shared_noise = noise_table("shared", ("",), shape, self.seed, (0,), self.draws)
            noise = self.shared_noise
        return noise.expand(len(batch.keys), len(self.levels), *noise.shape[2:])

    # Scores.

    def _mean_change(self, measurements: Measurements, space: str, reference: str) -> Tensor:
        """S_global or S_local, mean over the levels and draws that count, (B,) float64."""
        assert measurements.values is not None
        column = measurements.metrics.index(f"{space}_{reference}_{self.config['distance']}")
        used = self.config["use_levels"] or self.levels
        levels = [index for index, level in enumerate(measurements.levels) if level in used]
        return measurements.values[:, levels, : self.config["use_draws"], column].double().mean((1, 2))

    @staticmethod
    def _posthoc_scores(measurements: Measurements) -> dict[str, Tensor]:
        assert measurements.values is not None
        first = measurements.values[:, 0, 0].double()
        scores = {name: first[:, measurements.metrics.index(name)] for name in POSTHOC}
        return {**scores, "msp": torch.expm1(scores["msp"])}  # -max softmax from log(1 - max softmax)

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit mean and deviation of the logit change and of the post-hoc scores, for `either`."""
        scores = {"change": self._mean_change(measurements, "logit", "global"), **self._posthoc_scores(measurements)}
        self.z = {name: ZScore.fit(score.numpy()[:, None]) for name, score in scores.items()}

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """S_global and, with several levels, S_local in the three spaces; the three post-hoc scores; `either`."""
        scores = {space: self._mean_change(measurements, space, "global") for space in SPACES}
        if len(self.levels) > 1:
            scores |= {f"{space}_local": self._mean_change(measurements, space, "local") for space in SPACES}
        posthoc, cascade = self._posthoc_scores(measurements), self.config["cascade"]
        if cascade is not None:
            change = self.z["change"].score(scores["logit"].numpy()[:, None])
            clean = self.z[cascade].score(posthoc[cascade].numpy()[:, None])
            scores["either"] = torch.from_numpy(np.maximum(change, clean))
        return scores | posthoc

    def get_state(self) -> dict[str, np.ndarray]:
        """The neighbors' noise and the statistics."""
        neighbors = {} if self.neighbors is None else self.neighbors.to_arrays()
        return {**neighbors, **pack_arrays(self.z)}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the arrays of `get_state`."""
        if "neighbor_noise" in state:
            self.neighbors = NeighborNoise.from_arrays(state)
        if "change.mean" in state:
            self.z = {name: ZScore.from_arrays(unpack_arrays(state, name)) for name in ("change", *POSTHOC)}


def _check_same_preprocessing(model: DiffusionModel, classifier: Classifier) -> None:
    of_classifier = vars(classifier.preprocessing)
    for name, value in vars(model.preprocessing).items():
        if name not in ("native", "reduced_decoding") and value != of_classifier[name]:
            difference = f"the diffusion model has {name} {value}, the classifier {of_classifier[name]}"
            raise FaroutError(f"{difference}; train both on images prepared alike")


def _check_same_classes(model: DiffusionModel, classifier: Classifier, guided: bool) -> None:
    conditioning = model.conditioning
    if conditioning is None:
        hint = "give a class-conditional one (farout train diffusion --preset classes) or --condition none"
        raise FaroutError(f"this diffusion model is unconditional and cannot denoise under a class; {hint}")
    if conditioning.num_classes != classifier.classes:
        counts = f"{conditioning.num_classes} classes, the classifier {describe_classes(classifier)}"
        raise FaroutError(f"the diffusion model knows {counts}; train both on the same images and classes")
    names = {tuple(conditioning.class_names), tuple(classifier.class_names)}
    numbers = tuple(map(str, range(classifier.classes)))  # a model without class names has numbers
    if len(names - {numbers}) > 1:
        raise FaroutError("diffusion model and classifier name their classes differently; train both on the same")
    if guided and not conditioning.has_null:
        raise FaroutError("this diffusion model has no null condition to guide away from; give --guidance 1")
