"""Heat maps of features unlike normal ones at every position: by diffusion and by nearest neighbors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors.argument_checks import sort_levels
from farout.detectors.base import Detector, Measurements
from farout.detectors.declarations import HeatMaps, Requirements
from farout.detectors.feature_detector import FeatureDetector
from farout.detectors.fit_settings import FitSettings
from farout.detectors.patches.positions import (
    PositionStatistics,
    average_highest,
    equal_layer_weights,
    nearest_distances,
    rank_by_hash,
    sample_indices,
)
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
_INDICATORS: tuple[str, ...] = get_args(Score)


class Patches(FeatureDetector):
    """Distance of the features at each position to those of normal images.

    Features of the backbone's middle layers are brought to one grid and standardized channel by channel. With z the
    features at a position and f a small residual network that is trained to reconstruct z at normal positions from
    z + sigma(t) noise, without seeing other positions,

        error(t) = mean over draws, layers and the channels of each layer of (f(z + sigma(t) noise, t) - z)^2,

    one evaluation per level and draw, with the same noise for all positions and images. Much noise is added
    (sigma(99) = 1.2), so that f returns what a normal position would look like. The map is the mean over levels of the
    standardized errors, in standard deviations above the positions of normal images. The score of an image is the mean
    of its highest positions, so that a small defect counts. The denoiser is that of the `semantic` detector (Yang et
    al., NeurIPS 2024, arXiv 2411.10701, section 3.3), applied to positions instead of pooled features, which is ours.

    A second map is the distance to the nearest of a sample of normal positions, all layers with the same weight, after
    Roth, Pemula, Zepeda, Schölkopf, Brox and Gehler, "Towards total recall in industrial anomaly detection" (PatchCore,
    CVPR 2022, section 3), without its coreset, its averaging over neighbors and its reweighting.

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
        max_images: maximum number of training images used, a random sample of more.
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

    requirements: ClassVar[Requirements] = Requirements(
        diffusion="features", backbone=True, statistics=20, more_statistics=False
    )
    uses_pooled_features: ClassVar[bool] = False
    heat_maps: ClassVar[HeatMaps] = HeatMaps(pictures=frozenset({"diffusion", "knn"}))
    baselines: ClassVar[tuple[str, ...]] = ("mahalanobis",)
    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"score"})
    test_arguments: ClassVar[Mapping[str, Any]] = {
        "size": 32,
        "side": 4,
        "hidden": 32,
        "embedding": 16,
        "blocks": 1,
        "positions": 200,
        "epochs": 4,
        "batch": 32,
    }
    diffusion: FeatureDiffusion | None = None

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
        max_images: int = 1500,
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
        if min(counts.values()) < 1 or max_images < 2 or not 0 < share <= 1:
            raise FaroutError(
                f"expected 1 or more of each of {counts}, max_images {max_images} >= 2 and 0 < share {share} <= 1"
            )
        self._training_config(1)  # rejects values out of range
        self.levels = sort_levels(levels, paper_schedule().num_levels)
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Discard bank and statistics: the bank of another fit may contain images that this one calibrates with."""
        self.bank: Tensor | None = None  # features (n, c) of normal positions, encoded and weighted
        self.bank_encoder: FeatureDiffusion | None = None  # the model that has encoded the bank
        self.position_statistics: PositionStatistics | None = None

    def build_features(self) -> FeatureExtractor:
        """Build the backbone that the configuration names; without layers, the middle three of five."""
        default = backbones.default_layers(self.config["backbone"])
        layers = self.config["layers"] or (default[1:4] if len(default) == 5 else default)
        names = ("backbone", "weights", "size")
        return FeatureExtractor.create(layers=layers, **{name: self.config[name] for name in names})

    def load_batches(self, source: ImageSource) -> Iterator[Batch]:
        """Load batches of images: features at all positions are too many for the cache."""
        return Detector.load_batches(self, source)

    def run_networks(self, batch: Batch) -> None:
        """Run the backbone."""
        self._features_at_positions(batch)

    def _features_at_positions(self, batch: Batch) -> Tensor:
        """(B, position, c), row by row."""
        grid = self.backbone.feature_grid(
            batch.images, self.config["side"], self.runtime.batch_size, self.precision, self.backend
        )
        return grid.flatten(2).transpose(1, 2).contiguous()

    # Training.

    def train_feature_diffusion(self, images: ImageSource, settings: FitSettings) -> FeatureDiffusion:
        """Train the denoiser on features at sampled positions, some of which become the bank."""
        if len(images) < 2:
            hint = "give more images, fewer for the statistics, or a larger alpha"
            raise FaroutError(f"{len(images)} images are left to train the denoiser on; {hint}")
        hashes = [images.content_hash(i) for i in range(len(images))]
        ranked = sorted(range(len(images)), key=lambda i: rank_by_hash(hashes[i], settings.seed))
        sample = ranked[: self.config["max_images"]]
        sampled_images = images.subset(sorted(sample))
        features = self._sample_positions(sampled_images, settings.seed)
        network = {name: self.config[name] for name in ("hidden", "embedding", "blocks", "input_activation")}
        model = train_features(
            features,
            [hashes[i] for i in sample],
            backbone=self.backbone.content_hash,
            encoding=FeatureEncoding(self.backbone.channels, "channel"),
            network={**network, "bottleneck": self.config["hidden"]},
            training=settings.resolve_training(settings.training or self._training_config(len(features))),
            levels=self.config["time_sampling"],
            out=settings.checkpoints,
            resume=settings.resume,
            fingerprint=f"{sampled_images.fingerprint()} {len(features)} positions, side {self.config['side']}",
        )
        model.provenance["side"] = self.config["side"]
        self._fill_bank(model, features, settings.seed)
        return model

    def _sample_positions(self, images: ImageSource, seed: int) -> Tensor:
        """Features (n, c) at sampled positions of each image, which depend on its content and the seed alone."""
        parts = []
        per_image = -(-int(self.config["positions"]) // len(images))
        with task("features of training images", len(images)) as bar:
            for batch in self.load_batches(images):
                if batch.keys:
                    for index, features in zip(batch.indices, self._features_at_positions(batch), strict=True):
                        chosen = sample_indices(len(features), per_image, seed, images.content_hash(index))
                        parts.append(features.cpu()[chosen])
                bar.advance(len(batch.keys))
        return torch.cat(parts)

    def _training_config(self, positions: int) -> TrainingConfig:
        updates_per_epoch = -(-positions // self.config["batch"])
        return TrainingConfig(
            steps=min(self.config["updates"], self.config["epochs"] * updates_per_epoch),
            batch_size=self.config["batch"],
            learning_rate=self.config["learning_rate"],
            ema=self.config["ema"],
            clip=None,
        )

    def _fill_bank(self, model: FeatureDiffusion, features: Tensor, seed: int) -> None:
        """Store a sample of features (n, c) at normal positions."""
        chosen = sample_indices(len(features), self.config["bank"], seed, "bank")
        weights = equal_layer_weights(model.encoding.groups).sqrt()
        self.bank, self.bank_encoder = weights * model.encode(features[chosen]).cpu(), model

    # Measuring.

    def prepare_networks(self) -> None:
        """Check the model against backbone and grid, and draw the noise."""
        model, side = self.diffusion, int(self.config["side"])
        if model is None:
            return
        self.check_backbone(model.backbone)
        trained_side = model.provenance.get("side")
        if trained_side != side and "random_weights" not in model.provenance:
            what = "pooled features" if trained_side is None else f"a grid of side {trained_side}"
            raise FaroutError(f"this model was trained on {what}, not on a grid of side {side}")
        if model is not self.bank_encoder:
            self.bank = None
        self.denoiser = NetworkDenoiser(model.network, model.schedule, "sample", side**2, self.precision)
        shape, draws = (model.encoding.width,), self.config["draws"]
        noise = noise_table("shared", ("",), shape, self.seed, self.levels, draws, antithetic=True)
        self.noise = noise[0].to(model.device)  # (level, draw, c)
        self.sigmas = model.schedule.sigma_of(torch.tensor(self.levels)).float().to(model.device)
        self.weights = equal_layer_weights(model.encoding.groups).to(model.device)

    @property
    def evaluations(self) -> int:
        """Rows, one per position, that the denoiser has evaluated."""
        return self.denoiser.evaluations

    def prepare_statistics(self, images: ImageSource) -> None:
        """Fit mean and deviation over all positions of the statistics images.

        Where a model was given, training has filled no bank. Every second image then fills it, and the statistics come
        from the others, since a position has no distance to its own image.
        """
        assert self.diffusion is not None
        if self.bank is None:
            features = self._sample_positions(images.subset(range(0, len(images), 2)), self.seed)
            self._fill_bank(self.diffusion, features, self.seed)
            images = images.subset(range(1, len(images), 2))
        errors, distances = [], []
        with task("statistics of normal positions", len(images)) as bar:
            for batch in self.load_batches(images):
                if batch.keys:
                    for image_errors, image_distances in self._measure_positions(batch):
                        errors.append(image_errors.numpy())
                        distances.append(image_distances.numpy())
                bar.advance(len(batch.keys))
        self.position_statistics = PositionStatistics.fit(np.concatenate(errors), np.concatenate(distances))

    @torch.no_grad()
    def _measure_positions(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Errors (position, level) and nearest distances (position,) of each image."""
        model = self.diffusion
        assert model is not None
        assert self.bank is not None
        bank = self.bank.to(model.device)
        # image by image, so that the arithmetic does not depend on the batch
        for features in self._features_at_positions(batch):
            z = model.encode(features)
            yield self._reconstruction_errors(z).cpu(), nearest_distances(self.weights.sqrt() * z, bank).cpu()

    def _reconstruction_errors(self, z: Tensor) -> Tensor:
        """error(t) of encoded features z (position, c): (position, level)."""
        errors = []
        for sigma, noises in zip(self.sigmas, self.noise, strict=True):
            reconstructions = [self.denoiser(z + sigma * noise, sigma.expand(len(z))) for noise in noises]
            # mean over draws, layers and the channels of each layer
            errors.append(torch.stack([(x0 - z).square() @ self.weights for x0 in reconstructions]).mean(0))
        return torch.stack(errors, dim=1)

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """The scores of the maps: values (B, 1, 1, metric), in standard deviations above normal positions.

        With `maps`: the map of the method's score (B, H, W), at the size of the preprocessed image, and the pictures
        `diffusion` and `knn` (B, 1, H, W), both maps.
        """
        statistics = self.position_statistics
        if self.diffusion is None or statistics is None:
            raise FaroutError("Patches requires a fit before it measures: call fit(images) or farout.load(folder)")
        measured = list(self._measure_positions(batch))
        z = {
            "diffusion": torch.stack([statistics.standardize_errors(errors) for errors, _ in measured]),
            "knn": torch.stack([statistics.standardize_distances(distances) for _, distances in measured]),
        }
        columns = []
        for values in z.values():
            columns += [average_highest(values, self.config["share"]), values.mean(1)]
        scores = torch.stack(columns, dim=1).float()[:, None, None]
        measurements = Measurements(batch.keys, scores, (0.0,), _INDICATORS)
        if not maps:
            return measurements
        side = self.config["side"]
        pictures = {}
        for name, values in z.items():
            grid = values.float().reshape(-1, 1, side, side)
            pictures[name] = functional.interpolate(
                grid, size=self.preprocessing.size, mode="bilinear", align_corners=False
            )
        return replace(measurements, maps=pictures[self.score_name.partition("_")[0]][:, 0], pictures=pictures)

    # Scores.

    def fit_statistics(self, measurements: Measurements) -> None:
        """Nothing: `prepare_statistics` has fitted the statistics to positions."""

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`diffusion_top`, `diffusion_mean`, `knn_top` and `knn_mean`."""
        assert measurements.values is not None
        return {name: measurements.values[:, 0, 0, column].double() for column, name in enumerate(_INDICATORS)}

    def build_score_module(self) -> nn.Module:
        """The backbone, the denoiser or the bank, and the configured score."""
        from farout.detectors.patches.score_module import PatchScore

        assert self.diffusion is not None
        assert self.bank is not None
        assert self.position_statistics is not None
        return PatchScore(
            self.backbone,
            self.diffusion,
            self.bank,
            self.position_statistics,
            self.noise,
            self.sigmas.tolist(),
            self.score_name,
            self.config["side"],
            self.config["share"],
        )

    def get_state(self) -> dict[str, np.ndarray]:
        """The bank and the statistics of normal positions."""
        if self.bank is None or self.position_statistics is None:
            return {}
        return {"bank": self.bank.numpy(), **pack_arrays(vars(self.position_statistics))}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the arrays of `get_state`."""
        self.bank, self.bank_encoder = torch.from_numpy(np.array(state["bank"])), self.diffusion
        names = ("errors", "mean_error", "distances")
        self.position_statistics = PositionStatistics(
            *(ZScore.from_arrays(unpack_arrays(state, name)) for name in names)
        )

    def describe_statistics(self) -> dict[str, Any]:
        """The number of normal positions in the bank."""
        return {"bank": 0 if self.bank is None else len(self.bank)}
