"""Outlier exposure: its settings, the images that it adds, and the network with what is trained next to it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from farout.classifiers.losses import ClassifierLoss, EnergyHead, mutual_information, uniform_cross_entropy
from farout.classifiers.model import Classifier
from farout.classifiers.networks import OUTLIER, capture_inputs, linear_layer
from farout.classifiers.outlier_images import (
    ExposedImages,
    OutlierImages,
    Reconstructions,
    Resize,
    check_outliers,
    find_paired_outliers,
)
from farout.classifiers.virtual_outliers import VirtualOutliers
from farout.core.errors import FaroutError, TooFewImagesWarning, check_options
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing
from farout.training.config import TrainingConfig
from farout.training.data_order import seed_of

__all__ = ["ExposedNetwork", "Exposure", "ExposureData", "Loss", "count_known_classes", "describe_classes"]

Loss = Literal["energy", "oe", "k+1", "vos", "sona", "cross_entropy"]
MutualInformation = Literal["reference", "normalized", "off"]

# Weight and start of each loss in its paper; for `energy` those of NCIS, for `k+1` our own.
_DEFAULTS: dict[Loss, tuple[float, float]] = {
    "energy": (1.0, 0.0),
    "oe": (0.5, 0.0),
    "k+1": (1.0, 0.0),
    "sona": (0.5, 0.0),
    "vos": (0.1, 0.4),
    "cross_entropy": (0.0, 0.0),
}

_WITH_OUTLIERS: tuple[Loss, ...] = ("energy", "oe", "k+1", "sona")

# The losses that use a setting; settings that are not listed are used by all.
_USED_BY: dict[str, tuple[Loss, ...]] = {
    **dict.fromkeys(("weight", "start_fraction"), (*_WITH_OUTLIERS, "vos")),
    **dict.fromkeys(("temperature", "hidden"), ("energy", "vos")),
    **dict.fromkeys(("limit", "resize"), _WITH_OUTLIERS),
    **dict.fromkeys(("mutual_information", "mutual_information_weight"), ("sona",)),
    **dict.fromkeys(("queue", "draws", "virtual_per_class"), ("vos",)),
    "reconstruction_fraction": (),
}
_USED_BY_RECONSTRUCTIONS = ("resize", "reconstruction_fraction")


@dataclass(frozen=True)
class Exposure:
    """Outlier exposure.

    A setting that the loss does not use must have its default value (see `resolve_defaults`).

    The training loss is CE(f(x), y) + weight * L_outliers. A batch has one outlier for each image; images and outliers
    go through the network together, so that batch normalization sees both.

    Args:
        loss: loss on outliers: `energy` (energy regularizer of NCIS and Dream-OOD), `oe` (uniform distribution on
            outliers), `k+1` (outliers as an additional class), `sona` (`oe` and a mutual-information penalty), `vos`
            (energy regularizer on virtual outliers, without outlier images) or `cross_entropy` (no outliers); default:
            `energy` with outliers, else `cross_entropy`.
        weight: weight of the loss on outliers; default: 1 for energy and k+1, 0.5 for oe and sona, 0.1 for vos.
        start_fraction: share of the training before the loss on outliers is added; default: 0.4 for vos, else 0.
        temperature: temperature of the energy (energy, vos).
        hidden: hidden units of the head that maps energies to logits (energy, vos); 0: linear.
        limit: use a seeded random sample of this many outliers; default: all.
        resize: interpolation for outliers and reconstructions larger than the images: `both` (`nearest` or `bilinear`,
            drawn per sample), `bilinear`, `nearest`, or `bicubic` as for images.
        reconstruction_fraction: share of the images replaced by reconstructions, if there are any.
        mutual_information: penalty of the loss sona: `reference` (as published), `normalized` (independent of the
            scale of the features) or `off`.
        mutual_information_weight: weight of the penalty of the loss sona.
        paired: pair each image with outliers edited from it, as the manifest says; default: with any outliers.
        queue: features kept per class (vos).
        draws: samples drawn per class, of which the least likely are virtual outliers (vos).
        virtual_per_class: virtual outliers per class and step (vos).
    """

    loss: Loss | None = None
    weight: float | None = None
    start_fraction: float | None = None
    temperature: float = 1.0
    hidden: int = 0
    limit: int | None = None
    resize: Resize = "both"
    reconstruction_fraction: float = 0.5
    mutual_information: MutualInformation = "reference"
    mutual_information_weight: float = 0.7
    paired: bool = False
    queue: int = 1000
    draws: int = 10000
    virtual_per_class: int = 1

    def __post_init__(self) -> None:
        rules = [
            ("loss", self.loss is None or self.loss in get_args(Loss), f"None, {', '.join(get_args(Loss))}"),
            ("resize", self.resize in get_args(Resize), ", ".join(get_args(Resize))),
            ("weight", self.weight is None or 0 <= self.weight < float("inf"), "None or 0 or more"),
            (
                "start_fraction",
                self.start_fraction is None or 0 <= self.start_fraction < 1,
                "None or a share in [0, 1)",
            ),
            ("temperature", 0 < self.temperature < float("inf"), "a positive number"),
            ("hidden", self.hidden >= 0, "0 or more"),
            ("limit", self.limit is None or self.limit >= 1, "None or 1 or more"),
            ("reconstruction_fraction", 0 <= self.reconstruction_fraction <= 1, "a share in [0, 1]"),
            (
                "mutual_information",
                self.mutual_information in get_args(MutualInformation),
                ", ".join(get_args(MutualInformation)),
            ),
            ("mutual_information_weight", 0 <= self.mutual_information_weight < float("inf"), "0 or more"),
            ("queue", self.queue >= 2, "2 or more"),
            ("draws", self.draws >= 1, "1 or more"),
            ("virtual_per_class", 1 <= self.virtual_per_class <= self.draws, f"1 to draws ({self.draws})"),
        ]
        check_options(self, "exposure option", rules)

    def warn_of_short_training(self, labels: Tensor, images: int) -> None:
        """Warn if `vos` will draw no virtual outliers, because the queue of some class will not be full.

        Args:
            labels: class of each training image (N,).
            images: number of images that training will see, over all steps.
        """
        if self.loss != "vos":
            return
        expected = images * float(labels.bincount().min()) / len(labels)
        if expected < self.queue:
            warnings.warn(
                f"the rarest class will be seen about {expected:.0f} times, and vos draws no virtual outliers before "
                f"its queue of {self.queue} features is full; train for longer, or give a shorter one "
                "(--exposure.queue)",
                TooFewImagesWarning,
                stacklevel=3,
            )

    def loss_name(self, has_outliers: bool) -> Loss:
        """The loss, with the default filled in."""
        return self.loss or ("energy" if has_outliers else "cross_entropy")

    def unused_settings(self, has_outliers: bool, has_reconstructions: bool) -> dict[str, Any]:
        """The settings that have no effect on such a training, with their default values."""
        loss, defaults = self.loss_name(has_outliers), {each.name: each.default for each in fields(self)}
        used = _USED_BY_RECONSTRUCTIONS if has_reconstructions else ()
        return {name: defaults[name] for name, users in _USED_BY.items() if loss not in users and name not in used}

    def resolve_defaults(self, has_outliers: bool, has_reconstructions: bool = False) -> Self:
        """The same settings with the defaults of loss, weight and start_fraction filled in.

        Raises:
            FaroutError: if the loss requires outliers and there are none, or does not use those that there are, and for
                a setting that has no effect and is not at its default.
        """
        loss = self.loss_name(has_outliers)
        requires_outliers = loss in _WITH_OUTLIERS
        if requires_outliers and not has_outliers:
            raise FaroutError(
                f"the loss {loss} requires outlier images; give some (farout train "
                "classifier SOURCE --outliers FOLDER), or --loss vos, which needs none"
            )
        if has_outliers and not requires_outliers:
            raise FaroutError(f"the loss {loss} does not use outliers; leave them out, or give --loss energy")
        if self.paired and not has_outliers:
            raise FaroutError(
                "paired requires outliers that were edited from the images, and there are none; give some"
            )
        weight, start = _DEFAULTS[loss]
        allowed = {"weight": weight, "start_fraction": start}  # resolving resolved settings is allowed
        for name, default in self.unused_settings(has_outliers, has_reconstructions).items():
            if getattr(self, name) not in (default, allowed.get(name, default)):
                users = [", ".join(_USED_BY[name]), "reconstructions" * (name in _USED_BY_RECONSTRUCTIONS)]
                raise FaroutError(
                    f"the exposure option {name} is {getattr(self, name)!r}, and the loss {loss} does not use it "
                    f"({' and '.join(filter(None, users))} do); leave it out (its default is {default!r})"
                )
        return replace(
            self,
            loss=loss,
            weight=weight if self.weight is None else self.weight,
            start_fraction=start if self.start_fraction is None else self.start_fraction,
        )


class ExposedNetwork(nn.Module):
    """A classifier's network with the modules and buffers that only outlier exposure needs.

    The state dict of `network` has the prefix `network.`; the rest is discarded after training.

    Args:
        network: normalized images (B, C, H, W) -> logits (B, K), or (B, K + 1) for the loss `k+1`.
        head: name of its last linear layer.
        exposure: the resolved settings.
        classifier_loss: the loss of labelled images.
        start: number of forward passes before the loss on outliers is added.
    """

    passes: Tensor

    def __init__(
        self, network: nn.Module, head: str, exposure: Exposure, classifier_loss: ClassifierLoss, start: int
    ) -> None:
        super().__init__()
        self.network, self.exposure, self.classifier_loss = network, exposure, classifier_loss
        self.head_name, self.start = head, start
        layer = linear_layer(network, head)
        has_energy = exposure.loss in ("energy", "vos")
        self.energy = EnergyHead(exposure.hidden, exposure.temperature) if has_energy else None
        self.virtual_outliers = (
            VirtualOutliers(
                layer.out_features, layer.in_features, exposure.queue, exposure.draws, exposure.virtual_per_class
            )
            if exposure.loss == "vos"
            else None
        )
        # A buffer, so that a resumed training continues to count.
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def losses(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss of a batch, and values to log.

        In training: `loss`, `accuracy` on the images and `outlier_loss` before its weight (0 until the loss is added);
        with SONA's penalty also `mutual_information`. In validation: the loss of labelled images.

        Args:
            images: normalized (B + M, C, H, W), the last M of them outliers.
            labels: (B,) int64.
            generator: source of the virtual outliers.
        """
        count, exposure = len(labels), self.exposure
        if not self.training:
            return self.classifier_loss(self.network(images[:count]), labels)
        has_started = int(self.passes) >= self.start
        self.passes += 1

        if exposure.loss == "vos":
            logits, features = self._logits_and_features(images)
            values = self.classifier_loss(logits, labels)
            outlier_loss = torch.zeros_like(values["loss"])
            assert self.virtual_outliers is not None
            self.virtual_outliers.add_features(features, labels)
            if has_started and self.virtual_outliers.is_full:
                virtual = self.virtual_outliers.sample(generator).to(features.dtype)
                outlier_loss = self._outlier_loss(logits, self.network.get_submodule(self.head_name)(virtual))
        elif not has_started:
            values = self.classifier_loss(self.network(images[:count]), labels)
            outlier_loss = torch.zeros_like(values["loss"])
        else:
            logits, features = self._logits_and_features(images)
            values = self.classifier_loss(logits[:count], labels)
            outlier_loss = self._outlier_loss(logits[:count], logits[count:])

        # L = CE(f(x), y) + weight * L_outliers [+ mutual_information_weight * I(x; outliers)]
        loss = values["loss"] + (exposure.weight or 0.0) * outlier_loss
        values = {**values, "outlier_loss": outlier_loss}
        if exposure.loss == "sona" and exposure.mutual_information != "off" and has_started:
            if bool((features[:count] < 0).any()):
                raise FaroutError(
                    "the penalty of the loss sona requires features that are not negative, and this network's are; "
                    "give --exposure.mutual-information off, or a network whose features come from a ReLU"
                )
            is_normalized = exposure.mutual_information == "normalized"
            penalty = mutual_information(features[:count], features[count:], normalized=is_normalized)
            loss = loss + exposure.mutual_information_weight * penalty
            values["mutual_information"] = penalty
        return {**values, "loss": loss}

    def _logits_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features (the input of the last layer) from one forward pass."""
        with capture_inputs(self.network, features=self.head_name) as captured:
            return self.network(images), captured["features"]

    def _outlier_loss(self, logits: Tensor, outlier_logits: Tensor) -> Tensor:
        if self.energy is not None:
            loss: Tensor = self.energy(logits, outlier_logits)
            return loss
        if self.exposure.loss in ("oe", "sona"):
            return uniform_cross_entropy(outlier_logits)
        # k+1: outliers belong to the last class
        target = torch.full((len(outlier_logits),), outlier_logits.shape[1] - 1, device=outlier_logits.device)
        return functional.cross_entropy(outlier_logits, target)


@dataclass(frozen=True)
class ExposureData:
    """The images that outlier exposure adds to a training, and its settings.

    Args:
        exposure: the settings; they are resolved by the images that there are.
        outliers: images outside the distribution, see `open_outliers`.
        reconstructions: labelled images of the classes, reconstructed by a generator.
        source_keys: for paired training, the key of each outlier -> the key of the image that it was edited from.

    Raises:
        FaroutError: if these do not go together, see `Exposure.resolve_defaults`.
    """

    exposure: Exposure = field(default_factory=Exposure)
    outliers: ImageSource | None = None
    reconstructions: ImageSource | None = None
    source_keys: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        exposure = self.exposure.resolve_defaults(self.outliers is not None, self.reconstructions is not None)
        object.__setattr__(self, "exposure", exposure)

    @property
    def added_classes(self) -> tuple[str, ...]:
        """Names of the classes that the loss adds."""
        return (OUTLIER,) if self.exposure.loss == "k+1" else ()

    def combine_with(
        self,
        images: Dataset[Any],
        class_names: Sequence[str],
        hashes: Collection[str],
        preprocessing: Preprocessing,
        seed: int,
        keys: Sequence[str] = (),
    ) -> Dataset[Any]:
        """The training images with outliers and reconstructions.

        Args:
            images: items (image, label).
            class_names: names of the classes.
            hashes: content hashes of the images; outliers must not be among them.
            preprocessing: the classifier's preprocessing.
            seed: seed of the order of outliers and reconstructions.
            keys: keys of the items, for paired training.

        Raises:
            FaroutError: for outliers that are training images, and for paired training if an image has no outlier.
            SourceError: for reconstructions of other classes.
        """
        if self.outliers is None and self.reconstructions is None:
            return images
        outliers = reconstructions = paired_outliers = None
        if self.reconstructions is not None:
            reconstructions = Reconstructions(self.reconstructions, class_names, preprocessing, self.exposure.resize)
        if self.outliers is not None:
            check_outliers(self.outliers, hashes, preprocessing)
            if self.exposure.paired:
                paired_outliers = find_paired_outliers(keys, self.outliers, self.source_keys)
            outliers = OutlierImages(self.outliers, preprocessing, self.exposure.resize)
        return ExposedImages(
            images, seed, outliers, reconstructions, self.exposure.reconstruction_fraction, paired_outliers
        )

    def wrap_network(
        self, module: nn.Module, head: str, classifier_loss: ClassifierLoss, training: TrainingConfig
    ) -> nn.Module:
        """The module to train: the network itself, or an `ExposedNetwork` whose weights are drawn by the seed."""
        if self.exposure.loss == "cross_entropy":
            return module
        start = round((self.exposure.start_fraction or 0) * training.steps) * training.accumulate
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(training.seed, "exposure"))
            return ExposedNetwork(module, head, self.exposure, classifier_loss, start)

    def reconstruction_hashes(self) -> frozenset[str]:
        """Content hashes of the reconstructions, which count as training images."""
        hashes = () if self.reconstructions is None else self.reconstructions.content_hashes()
        return frozenset(content for content in hashes if content is not None)

    def to_provenance(self) -> dict[str, Any]:
        """Settings and images for the provenance of a classifier; empty for a training without any."""
        sources = {"outliers": self.outliers, "reconstructions": self.reconstructions}
        described: dict[str, Any] = {
            name: {"source": source.name, "data_fingerprint": source.fingerprint(), "images": len(source)}
            for name, source in sources.items()
            if source is not None
        }
        if not described and self.exposure.loss == "cross_entropy":
            return {}
        return {"exposure": asdict(self.exposure), **described}


def count_known_classes(classifier: Classifier) -> int:
    """The number of classes of a classifier without the class of outliers, which the loss `k+1` adds as the last."""
    return classifier.classes - (classifier.class_names[-1] == OUTLIER)


def describe_classes(classifier: Classifier) -> str:
    """The number of classes as text, with the class of outliers if there is one."""
    known = count_known_classes(classifier)
    return f"{known} classes{' and one of outliers' * (known < classifier.classes)}"
