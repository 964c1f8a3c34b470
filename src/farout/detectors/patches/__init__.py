"""Where in an image the features are unlike good ones: maps by diffusion and by nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors.base import Detector, Measurements
from farout.detectors.feature_detector import FeatureDetector
from farout.detectors.fit_settings import FitSettings
from farout.detectors.patches.positions import Deviations, drawn, equal_layers, flat, nearest, rank, top
from farout.detectors.settings import checked_levels
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.losses import LevelSampling
from farout.diffusion.noise import noise_table
from farout.features import backbones
from farout.features.densities import ZScore, pack_arrays, unpack_arrays
from farout.features.encoding import FeatureEncoding
from farout.features.extractor import FeatureExtractor
from farout.features.feature_diffusion import FeatureDiffusion, paper_schedule
from farout.features.train import train_features
from farout.training.config import TrainingConfig

__all__ = ["Patches"]

Score = Literal["diffusion_top", "diffusion_mean", "knn_top", "knn_mean"]
_SCORES: tuple[str, ...] = get_args(Score)
_PARTS = ("errors", "mean", "distances")


class Patches(FeatureDetector):
    """Distance of the features at each position to those of normal images.

    Features of the backbone's middle layers are brought to one grid and standardised channel by channel. At every
    position, whose neighbours are not seen,

        error(t) = mean over draws, layers and the channels of each layer of (f(z + sigma(t) noise, t) - z)^2

    with f a small residual network that was trained to give back z at good positions, one evaluation per level and
    draw, and one noise for all positions and images. Much noise is added (sigma(99) = 1.2), so that what comes back is
    what a good position would look like. The map is the mean over levels of the standardised errors, in
    standard deviations above the positions of good images; the image's score is the mean of its highest positions, so
    that a small defect counts. The denoiser is that of the `semantic` detector (Yang et al., NeurIPS 2024, arXiv
    2411.10701, section 3.3) on positions in place of pooled features; this use of it is ours.

    Beside it stands the distance to the nearest of a sample of good positions, layers weighed the same, after Roth,
    Pemula, Zepeda, Schölkopf, Brox and Gehler, "Towards total recall in industrial anomaly detection" (PatchCore, CVPR
    2022, section 3), without its coreset, its averaging over neighbours and its reweighting.

    Args:
        side: number of grid positions along one side.
        levels: noise levels t, 0 to 99, to which features are noised.
        draws: noise samples per level; every second one is the negative of the one before (antithetic).
        score: indicator used as score and for heat maps: by reconstruction (`diffusion_…`) or nearest neighbor
            (`knn_…`), mean of the highest positions (`…_top`) or of all (`…_mean`).
        share: share of the positions that `…_top` scores average, at least one position.
        bank: number of normal positions stored for nearest neighbors, a random sample.
        positions: number of normal positions to train the denoiser on, a random sample spread evenly over the training
            images.
        most: maximum number of training images used, a random sample of more.
        hidden: width of the denoiser.
        embedding: width of the denoiser's time embedding.
        blocks: number of residual blocks of the denoiser.
        input_activation: apply SiLU to the noisy features, as in the released code of `semantic`.
        time_sampling: distribution of t in training: `uniform`, `low_noise` (more low t) or `antithetic` (mirrored
            pairs).
        epochs: passes over the training positions.
        updates: maximum number of updates.
        batch: positions per update.
        learning_rate: learning rate of AdamW.
        ema: decay of the moving average of the weights.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features", "diffusion"})
    diffusion_of = "features"
    diffusion: FeatureDiffusion | None = None
    makes_maps: ClassVar[bool] = True
    map_pictures: ClassVar[frozenset[str]] = frozenset({"diffusion", "knn"})
    statistics_minimum: ClassVar[int] = 20
    statistics_suffice: ClassVar[bool] = True
    companions: ClassVar[tuple[str, ...]] = ("mahalanobis",)
    choices: ClassVar[frozenset[str]] = frozenset({"score"})

    def __init__(
        self,
        *,
        side: int = 28,
        levels: tuple[int, ...] = (80, 99),
        draws: int = 2,
        score: Score = "diffusion_top",
        share: float = 0.01,
        bank: int = 10000,
        positions: int = 40000,
        most: int = 1500,
        hidden: int = 256,
        embedding: int = 128,
        blocks: int = 2,
        input_activation: bool = False,
        time_sampling: LevelSampling = "uniform",
        epochs: int = 60,
        updates: int = 1000,
        batch: int = 512,
        learning_rate: float = 1e-3,
        ema: float = 0.995,
        **features: Any,
    ) -> None:
        super().__init__(**features)
        names = ("side", "draws", "bank", "positions", "epochs", "updates", "batch")
        counts = {name: self.config[name] for name in names}
        if min(counts.values()) < 1 or most < 2 or not 0 < share <= 1:
            raise FaroutError(f"expected 1 or more of each of {counts}, most {most} >= 2 and 0 < share {share} <= 1")
        self._training(1)  # refuses what is out of range
        self.levels = checked_levels(levels, paper_schedule().steps)
        self.bank: Tensor | None = None
        self.bank_of: FeatureDiffusion | None = None
        self.deviations: Deviations | None = None
        self.denoiser: NetworkDenoiser | None = None

    @classmethod
    def tiny(cls, resources: Any) -> Patches:
        """A small denoiser on a small grid of small images."""
        return cls(size=32, side=4, hidden=32, embedding=16, blocks=1, positions=200, epochs=4, batch=32)

    def build_features(self) -> FeatureExtractor:
        """The backbone that the configuration names; without layers, the middle three of five."""
        taps = backbones.default_layers(self.config["backbone"])
        layers = self.config["layers"] or (taps[1:4] if len(taps) == 5 else taps)
        names = ("backbone", "weights", "size")
        return FeatureExtractor.create(layers=layers, **{name: self.config[name] for name in names})

    def batches(self, source: ImageSource) -> Iterator[Batch]:
        """Batches of images: features at positions are too many to be kept."""
        return Detector.batches(self, source)

    def _positions(self, batch: Batch) -> Tensor:
        """Features (B, positions, c)."""
        return flat(
            self.backbone.feature_grid(batch.images, self.config["side"], self.runtime.batch_size, self.precision)
        )

    # -- training ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forgets bank and deviations: another fit's bank may hold images that this one calibrates with."""
        self.bank, self.bank_of, self.deviations = None, None, None

    def train(self, images: ImageSource, settings: FitSettings) -> FeatureDiffusion:
        """A denoiser of features at drawn positions, some of which become the bank."""
        if len(images) < 2:
            hint = "give more images, fewer for the statistics, or a larger alpha"
            raise FaroutError(f"{len(images)} images are left to train the denoiser on; {hint}")
        names = [images.content_hash(i) for i in range(len(images))]
        kept = sorted(range(len(images)), key=lambda i: rank(names[i], settings.seed))[: self.config["most"]]
        some = images.subset(sorted(kept))
        table = self._sample(some, settings.seed)
        network = {name: self.config[name] for name in ("hidden", "embedding", "blocks", "input_activation")}
        model = train_features(
            table,
            [names[i] for i in kept],
            backbone=self.backbone.content_hash,
            encoding=FeatureEncoding(self.backbone.channels, "channel"),
            network={**network, "bottleneck": self.config["hidden"]},
            training=settings.resolve_training(settings.training or self._training(len(table))),
            levels=self.config["time_sampling"],
            out=settings.checkpoints,
            resume=settings.resume,
            fingerprint=f"{some.fingerprint()} {len(table)} positions of a grid of {self.config['side']}",
        )
        model.provenance["side"] = self.config["side"]
        self._keep(model, table, settings.seed)
        return model

    def _sample(self, images: ImageSource, seed: int) -> Tensor:
        """Features (n, c) at drawn positions of each image; which ones, only its content and the seed decide."""
        parts = []
        wanted = -(-int(self.config["positions"]) // len(images))
        with task("features of training images", len(images)) as bar:
            for batch in self.batches(images):
                for index, features in zip(batch.indices, self._positions(batch) if batch.keys else ()):
                    chosen = drawn(len(features), wanted, seed, images.content_hash(index))
                    parts.append(features.cpu()[chosen])
                bar.advance(len(batch.keys))
        return torch.cat(parts)

    def _training(self, count: int) -> TrainingConfig:
        passes = -(-count // self.config["batch"])
        return TrainingConfig(
            steps=min(self.config["updates"], self.config["epochs"] * passes),
            batch_size=self.config["batch"],
            learning_rate=self.config["learning_rate"],
            ema=self.config["ema"],
            clip=None,
        )

    def _keep(self, model: FeatureDiffusion, table: Tensor, seed: int) -> None:
        """Makes a sample of good positions' features (n, c) the bank of this model."""
        chosen = drawn(len(table), self.config["bank"], seed, "bank")
        weights = equal_layers(model.encoding.groups).sqrt()
        self.bank, self.bank_of = weights * model.encode(table[chosen]).cpu(), model

    # -- measuring -----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Checks the model against backbone and grid, and draws the noise."""
        model = self.diffusion
        if model is None:
            return
        self._check(model)
        if model is not self.bank_of:
            self.bank = None
        places = int(self.config["side"]) ** 2
        self.denoiser = NetworkDenoiser(model.network, model.schedule, "sample", places, self.precision)
        table = noise_table(
            "shared", ("",), (model.encoding.width,), self.seed, self.levels, self.config["draws"], antithetic=True
        )
        sigma = model.schedule.sigma_of(torch.tensor(self.levels))
        self.sigmas = sigma.float()[:, None].expand(table.shape[1:3]).to(model.device)
        self.noise = table[0].to(model.device)
        self.weights = equal_layers(model.encoding.groups).to(model.device)

    def _check(self, model: FeatureDiffusion) -> None:
        self.check_backbone(model.backbone)
        side = model.provenance.get("side")
        if side != self.config["side"] and "random_weights" not in model.provenance:
            what = "pooled features" if side is None else f"a grid of side {side}"
            raise FaroutError(f"this model was trained on {what}, not on a grid of side {self.config['side']}")

    @property
    def evaluations(self) -> int:
        """Rows, one a position, that the denoiser has evaluated."""
        return 0 if self.denoiser is None else self.denoiser.evaluations

    def measure_all(self, source: ImageSource, title: str, *, watch: bool = False) -> Measurements:
        """The measurements of all readable images; of the statistics images (`watch`), first the deviations."""
        if watch:
            self._learn(source)
        return super().measure_all(source, title)

    def _learn(self, source: ImageSource) -> None:
        """Mean and deviation over all positions of good images.

        Where a model was given and so no bank was made in training, every second image becomes the bank, and the others
        tell the deviations: a position lies at no distance from its own image.
        """
        assert self.diffusion is not None
        rest = source
        if self.bank is None:
            self._keep(self.diffusion, self._sample(source.subset(range(0, len(source), 2)), self.seed), self.seed)
            rest = source.subset(range(1, len(source), 2))
        errors, distances = [], []
        with task("deviations of normal images", len(rest)) as bar:
            for batch in self.batches(rest):
                for one, other in self._raw(batch):
                    errors.append(one.numpy())
                    distances.append(other.numpy())
                bar.advance(len(batch.keys))
        self.deviations = Deviations.fit(np.concatenate(errors), np.concatenate(distances))

    @torch.no_grad()
    def _raw(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Errors (positions, level) and nearest distances (positions,) of each image."""
        model = self.diffusion
        assert model is not None
        assert self.bank is not None
        bank = self.bank.to(model.device)
        for features in self._positions(batch) if batch.keys else ():
            # image by image: the same arithmetic whatever images are beside it
            z = model.encode(features)
            yield self._errors(z).cpu(), nearest(self.weights.sqrt() * z, bank).cpu()

    def _errors(self, z: Tensor) -> Tensor:
        """z (positions, c) -> (positions, level); one call of the network per level and draw."""
        assert self.denoiser is not None
        found = torch.empty(*self.sigmas.shape, len(z), device=z.device)
        for level, draw in np.ndindex(*self.sigmas.shape):
            sigma = self.sigmas[level, draw]
            back = self.denoiser(z + sigma * self.noise[level, draw], sigma.expand(len(z)))
            found[level, draw] = (back - z).square() @ self.weights
        return found.mean(1).T

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Scores of the maps: values (B, 1, 1, metric), in standard deviations above good images.

        With `maps`: the map of the method's own score (B, H, W), at the size of the prepared image, and the pictures
        `diffusion` and `knn` (B, 1, H, W), both maps.
        """
        deviations = self.deviations
        if self.diffusion is None or deviations is None:
            raise FaroutError("Patches requires a fit before it measures: call fit(images) or farout.load(folder)")
        raw = list(self._raw(batch))
        places = int(self.config["side"]) ** 2
        empty = torch.zeros(0, places, dtype=torch.float64)
        found = {
            "diffusion": torch.stack([deviations.of_errors(errors) for errors, _ in raw]) if raw else empty,
            "knn": torch.stack([deviations.of_distances(distances) for _, distances in raw]) if raw else empty,
        }
        share = self.config["share"]
        columns = [column for values in found.values() for column in (top(values, share), values.mean(1))]
        measured = Measurements(batch.keys, torch.stack(columns, dim=1).float()[:, None, None], (0.0,), _SCORES)
        if maps:
            pictures = {name: self._enlarged(values) for name, values in found.items()}
            own = pictures[self.score_name.partition("_")[0]][:, 0]
            measured = replace(measured, maps=own, pictures=pictures)
        return measured

    def _enlarged(self, values: Tensor) -> Tensor:
        """(B, positions) -> (B, 1, H, W), bilinear."""
        side = self.config["side"]
        grid = values.float().reshape(len(values), 1, side, side)
        if not len(values):
            return torch.zeros(0, 1, *self.preprocessing.size)
        return functional.interpolate(grid, size=self.preprocessing.size, mode="bilinear", align_corners=False)

    # -- scoring -------------------------------------------------------------------------------------------------

    def fit_statistics(self, measurements: Measurements) -> None:
        """Nothing: the deviations were learnt at positions, before anything was measured."""

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`diffusion_top`, `diffusion_mean`, `knn_top` and `knn_mean`."""
        assert measurements.values is not None
        return {name: measurements.values[:, 0, 0, column].double() for column, name in enumerate(_SCORES)}

    def describe(self) -> dict[str, Any]:
        """With the number of good positions in the bank."""
        return {**super().describe(), "bank": 0 if self.bank is None else len(self.bank)}

    def state(self) -> dict[str, np.ndarray]:
        """The bank and the deviations."""
        if self.bank is None or self.deviations is None:
            return {}
        return {"bank": self.bank.numpy(), **pack_arrays({part: getattr(self.deviations, part) for part in _PARTS})}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        self.bank, self.bank_of = torch.from_numpy(np.array(state["bank"])), self.diffusion
        self.deviations = Deviations(*(ZScore.from_arrays(unpack_arrays(state, part)) for part in _PARTS))
