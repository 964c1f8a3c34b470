"""Learning what lies outside: settings, and the network with what is trained beside it and then thrown away."""

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
from farout.classifiers.networks import OUTLIER, watched
from farout.classifiers.outlier_images import (
    ExposedImages,
    OutlierImages,
    Reconstructions,
    Resize,
    check_outliers,
    partners_of,
)
from farout.classifiers.virtual_outliers import VirtualOutliers
from farout.core.errors import FaroutError, ShortfallWarning, check_options
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing
from farout.training.config import TrainingConfig
from farout.training.data_order import seed_of

__all__ = ["Exposed", "Exposure", "Loss", "Outside", "counted_classes", "known_classes"]

Loss = Literal["energy", "oe", "k+1", "vos", "sona", "cross_entropy"]
Mutual = Literal["reference", "normalised", "off"]

_OWN: dict[Loss, tuple[float, float]] = {
    "energy": (1.0, 0.0), "oe": (0.5, 0.0), "k+1": (1.0, 0.0), "sona": (0.5, 0.0), "vos": (0.1, 0.4),
    "cross_entropy": (0.0, 0.0),
}  # fmt: skip
"""The weight and the start of each loss in its paper; NCIS's for `energy`, ours for `k+1`."""

_WITH_OUTLIERS: tuple[Loss, ...] = ("energy", "oe", "k+1", "sona")
_LOOKED_AT: dict[str, tuple[Loss, ...]] = {
    **dict.fromkeys(("weight", "start"), (*_WITH_OUTLIERS, "vos")),
    **dict.fromkeys(("temperature", "hidden"), ("energy", "vos")),
    **dict.fromkeys(("limit", "resize"), _WITH_OUTLIERS),
    **dict.fromkeys(("mutual", "mutual_weight"), ("sona",)),
    **dict.fromkeys(("queue", "draws", "select"), ("vos",)),
    "reconstructed": (),
}
"""Settings that not every loss looks at: which do."""
_OF_RECONSTRUCTIONS = ("resize", "reconstructed")
"""Settings that reconstructions look at, whatever the loss."""


@dataclass(frozen=True)
class Exposure:
    """Outlier exposure.

    A setting that the chosen loss does not look at stays at its default: another value is refused (see `resolved`).

    The loss is CE(f(x), y) + weight x L_outside. Images and outliers, one of these for each image, go through the
    network as one batch, so that batch normalisation sees both.

    Args:
        loss: loss on outliers: `energy` (energy regulariser of NCIS and Dream-OOD), `oe` (uniform distribution on
            outliers), `k+1` (outliers as an additional class), `sona` (`oe` and a mutual-information penalty), `vos`
            (energy regulariser on virtual outliers, without outlier images) or `cross_entropy` (no outliers); default:
            `energy` with outliers, else `cross_entropy`.
        weight: weight of the loss on outliers; default: 1 for energy and k+1, 0.5 for oe and sona, 0.1 for vos.
        start: share of the training before the loss on outliers is added; default: 0.4 for vos, else 0.
        temperature: temperature of the energy (energy, vos).
        hidden: hidden units of the head that maps energies to logits (energy, vos); 0: linear.
        limit: use a seeded random sample of this many outliers; default: all.
        resize: interpolation for outliers and reconstructions larger than the images: `both` (`nearest` or `bilinear`,
            drawn per sample), `bilinear`, `nearest`, or `bicubic` as for images.
        reconstructed: share of the images replaced by reconstructions, if there are any.
        mutual: penalty of the loss sona: `reference` (as published), `normalised` (independent of the scale of the
            features) or `off`.
        mutual_weight: weight of the penalty of the loss sona.
        paired: pair each image with outliers edited from it, as the manifest says; default: with any outliers.
        queue: features kept per class (vos).
        draws: samples drawn per class, of which the least likely are virtual outliers (vos).
        select: virtual outliers per class and step (vos).
    """

    loss: Loss | None = None
    weight: float | None = None
    start: float | None = None
    temperature: float = 1.0
    hidden: int = 0
    limit: int | None = None
    resize: Resize = "both"
    reconstructed: float = 0.5
    mutual: Mutual = "reference"
    mutual_weight: float = 0.7
    paired: bool = False
    queue: int = 1000
    draws: int = 10000
    select: int = 1

    def __post_init__(self) -> None:
        check_options(self, "exposure option", self._rules())

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("loss", self.loss is None or self.loss in get_args(Loss), f"None, {', '.join(get_args(Loss))}"),
            ("resize", self.resize in get_args(Resize), ", ".join(get_args(Resize))),
            ("weight", self.weight is None or 0 <= self.weight < float("inf"), "None or 0 or more"),
            ("start", self.start is None or 0 <= self.start < 1, "None or a share in [0, 1)"),
            ("temperature", 0 < self.temperature < float("inf"), "a positive number"),
            ("hidden", self.hidden >= 0, "0 or more"),
            ("limit", self.limit is None or self.limit >= 1, "None or 1 or more"),
            ("reconstructed", 0 <= self.reconstructed <= 1, "a share in [0, 1]"),
            ("mutual", self.mutual in get_args(Mutual), ", ".join(get_args(Mutual))),
            ("mutual_weight", 0 <= self.mutual_weight < float("inf"), "0 or more"),
            ("queue", self.queue >= 2, "2 or more"),
            ("draws", self.draws >= 1, "1 or more"),
            ("select", 1 <= self.select <= self.draws, f"1 to draws ({self.draws})"),
        ]

    def warn_of_short(self, numbers: Tensor, images: int) -> None:
        """Warns where `vos` will draw nothing: it waits until each class has filled its queue.

        Args:
            numbers: the class of each image (N,).
            images: that training will see, all steps together.
        """
        if self.loss != "vos":
            return
        expected = images * float(numbers.bincount().min()) / len(numbers)
        if expected < self.queue:
            warnings.warn(
                f"the rarest class will be seen about {expected:.0f} times, and vos draws no virtual outliers before "
                "its "
                f"queue of {self.queue} features is full; train for longer, or give a shorter one (--exposure.queue)",
                ShortfallWarning,
                stacklevel=3,
            )

    def chosen(self, outliers: bool) -> Loss:
        """The loss that this is, with `outliers` or without."""
        return self.loss or ("energy" if outliers else "cross_entropy")

    def idle(self, outliers: bool, reconstructions: bool) -> dict[str, Any]:
        """The settings that nothing looks at, with `outliers` and `reconstructions` or without, and their defaults."""
        looked_at = _OF_RECONSTRUCTIONS if reconstructions else ()
        loss, known = self.chosen(outliers), {each.name: each.default for each in fields(self)}
        return {n: known[n] for n, losses in _LOOKED_AT.items() if loss not in losses and n not in looked_at}

    def _check_idle(self, outliers: bool, reconstructions: bool) -> None:
        loss = self.chosen(outliers)
        own = dict(zip(("weight", "start"), _OWN[loss]))  # what resolving fills in, so that it may be done twice
        for name, default in self.idle(outliers, reconstructions).items():
            if getattr(self, name) not in (default, own.get(name, default)):
                users = ", ".join(_LOOKED_AT[name])
                others = "reconstructions" * (name in _OF_RECONSTRUCTIONS)
                raise FaroutError(
                    f"the exposure option {name} is {getattr(self, name)!r}, and the loss {loss} does not use it "
                    f"({' and '.join(filter(None, [users, others]))} do); leave it out (its default is {default!r})"
                )

    def resolved(self, outliers: bool, reconstructions: bool = False) -> Self:
        """With loss, weight and start filled in.

        Args:
            outliers: whether there are any.
            reconstructions: likewise.

        Raises FaroutError where the loss wants outliers and there are none, or has no use for those that there are, and
        for a setting that nothing looks at and that is not at its default.
        """
        loss = self.chosen(outliers)
        wanted = loss in _WITH_OUTLIERS
        if wanted and not outliers:
            raise FaroutError(
                f"the loss {loss} requires outlier images; give some (farout train "
                "classifier SOURCE --outliers FOLDER), or --loss vos, which needs none"
            )
        if outliers and not wanted:
            raise FaroutError(f"the loss {loss} does not use outliers; leave them out, or give --loss energy")
        if self.paired and not outliers:
            raise FaroutError(
                "paired requires outliers that were edited from the images, and there are none; give some"
            )
        self._check_idle(outliers, reconstructions)
        weight, start = _OWN[loss]
        return replace(
            self,
            loss=loss,
            weight=weight if self.weight is None else self.weight,
            start=start if self.start is None else self.start,
        )


class Exposed(nn.Module):
    """A classifier's network and what the loss trains or remembers beside it.

    Args:
        network: images (B, C, H, W), normalised -> logits (B, K), or (B, K + 1) for `k+1`.
        head: name of its last linear layer.
        exposure: resolved.
        inside: the loss of labelled images.
        start: forward passes before the loss outside counts.

    The state dict of `network` stands under `network.`; all else is thrown away after training.
    """

    passes: Tensor

    def __init__(self, network: nn.Module, head: str, exposure: Exposure, inside: ClassifierLoss, start: int) -> None:
        super().__init__()
        self.network, self.exposure, self.inside = network, exposure, inside
        self.head_name, self.start = head, start
        last: Any = network.get_submodule(head)
        energetic = exposure.loss in ("energy", "vos")
        self.energy = EnergyHead(exposure.hidden, exposure.temperature) if energetic else None
        self.virtual = (
            VirtualOutliers(last.out_features, last.in_features, exposure.queue, exposure.draws, exposure.select)
            if exposure.loss == "vos"
            else None
        )
        # a buffer, so that a resumed training knows where it stands
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def losses(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """In training `loss`, `accuracy` of the images and `outside`, the loss outside before its weight (0 where it
        does not count yet), with sona's penalty also `mutual`; in validation those of the images.

        Args:
            images: normalised (B + M, C, H, W), the last M of them outliers.
            labels: (B,) int64.
            generator: of virtual outliers.
        """
        count = len(labels)
        if not self.training:
            return self.inside(self.network(images[:count]), labels)
        begun = int(self.passes) >= self.start
        self.passes += 1
        if self.virtual is not None:
            found, outside = self._with_virtual(self.virtual, images, labels, generator, begun)
        elif begun:
            logits, features = self._passed(images)
            found = self.inside(logits[:count], labels)
            outside = self._outside(logits[:count], logits[count:])
            if self.exposure.loss == "sona" and self.exposure.mutual != "off":
                return self._with_mutual(found, outside, features[:count], features[count:])
        else:
            found = self.inside(self.network(images[:count]), labels)
            outside = torch.zeros_like(found["loss"])
        return {**found, "loss": found["loss"] + self.exposure.weight * outside, "outside": outside}

    def _passed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features (the input of the last layer), from one pass."""
        with watched(self.network, features=self.head_name) as seen:
            return self.network(images), seen["features"]

    def _with_mutual(
        self, found: dict[str, Tensor], outside: Tensor, inner: Tensor, outer: Tensor
    ) -> dict[str, Tensor]:
        if bool((inner < 0).any()):
            raise FaroutError(
                "the penalty of the loss sona requires features that are not negative, and this network's are; give "
                "--exposure.mutual off, or a network whose features come from a ReLU"
            )
        mutual = mutual_information(inner, outer, normalised=self.exposure.mutual == "normalised")
        loss = found["loss"] + self.exposure.weight * outside + self.exposure.mutual_weight * mutual
        return {**found, "loss": loss, "outside": outside, "mutual": mutual}

    def _outside(self, inner: Tensor, outer: Tensor) -> Tensor:
        if self.energy is not None:
            return self.energy(inner, outer)
        if self.exposure.loss in ("oe", "sona"):
            return uniform_cross_entropy(outer)
        last = torch.full((len(outer),), outer.shape[1] - 1, device=outer.device)
        return functional.cross_entropy(outer, last)

    def _with_virtual(
        self, virtual: VirtualOutliers, images: Tensor, labels: Tensor, generator: torch.Generator, begun: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        logits, features = self._passed(images)
        found = self.inside(logits, labels)
        virtual.remember(features, labels)
        if not (begun and virtual.full):
            return found, torch.zeros_like(found["loss"])
        head = self.network.get_submodule(self.head_name)
        outer = head(virtual.draw(generator).to(features.dtype))
        return found, self._outside(logits, outer)


@dataclass(frozen=True)
class Outside:
    """All that a classifier learns from beside its images.

    Args:
        exposure: how; it is resolved by what is given.
        outliers: images that lie outside the distribution, see `open_outliers`.
        reconstructions: images of the classes that a generator has made again, with labels.
        made_of: key of each outlier -> key of the image that it was made of, where they are to be paired.

    Raises FaroutError where these do not go together, see `Exposure.resolved`.
    """

    exposure: Exposure = field(default_factory=Exposure)
    outliers: ImageSource | None = None
    reconstructions: ImageSource | None = None
    made_of: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        exposure = self.exposure.resolved(self.outliers is not None, self.reconstructions is not None)
        object.__setattr__(self, "exposure", exposure)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that it adds."""
        return (OUTLIER,) if self.exposure.loss == "k+1" else ()

    def beside(
        self,
        images: Dataset[Any],
        names: Sequence[str],
        hashes: Collection[str],
        how: Preprocessing,
        seed: int,
        keys: Sequence[str] = (),
    ) -> Dataset[Any]:
        """Items (image, class number) with the outliers and reconstructions that go with them.

        Args:
            images: the items.
            names: of the classes.
            hashes: content hashes of the images, which outliers must not be among.
            how: the classifier's preprocessing.
            seed: of their order.
            keys: of the items, where outliers are to be paired with them.

        Raises FaroutError for outliers that are such images, and where an image is to be paired and no outlier was made
        of it; SourceError for reconstructions of other classes.
        """
        if self.outliers is None and self.reconstructions is None:
            return images
        again = outliers = partners = None
        if self.reconstructions is not None:
            again = Reconstructions(self.reconstructions, names, how, self.exposure.resize)
        if self.outliers is not None:
            check_outliers(self.outliers, hashes, how)
            partners = partners_of(keys, self.outliers, self.made_of) if self.exposure.paired else None
            outliers = OutlierImages(self.outliers, how, self.exposure.resize)
        return ExposedImages(images, seed, outliers, again, self.exposure.reconstructed, partners)

    def learner(self, module: nn.Module, head: str, inside: ClassifierLoss, training: TrainingConfig) -> nn.Module:
        """What is trained: the network itself, or with it what the loss wants; its weights are drawn by the seed."""
        if self.exposure.loss == "cross_entropy":
            return module
        passes = round((self.exposure.start or 0) * training.steps) * training.accumulate
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(training.seed, "exposure"))
            return Exposed(module, head, self.exposure, inside, passes)

    def seen(self) -> frozenset[str]:
        """Content hashes of the images of the classes among them, the reconstructions."""
        found = () if self.reconstructions is None else self.reconstructions.content_hashes()
        return frozenset(content for content in found if content is not None)

    def told(self) -> dict[str, Any]:
        """For the provenance: the settings, and name, fingerprint and number of the images; empty for nothing."""
        sources = {"outliers": self.outliers, "reconstructions": self.reconstructions}
        told: dict[str, Any] = {
            name: {"source": given.name, "data_fingerprint": given.fingerprint(), "images": len(given)}
            for name, given in sources.items()
            if given is not None
        }
        return {"exposure": asdict(self.exposure), **told} if told or self.exposure.loss != "cross_entropy" else {}


def known_classes(classifier: Classifier) -> int:
    """How many of the classifier's classes are classes of images: its last one may stand for outliers."""
    return classifier.classes - (classifier.class_names[-1] == OUTLIER)


def counted_classes(classifier: Classifier) -> str:
    """`K classes`, and that there is one of outliers, in words."""
    known = known_classes(classifier)
    return f"{known} classes{' and one of outliers' * (known < classifier.classes)}"
