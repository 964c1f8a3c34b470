"""Initial weights of a training, and the images that they were trained on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from farout.classifiers.model import KIND, Classifier
from farout.classifiers.weights import WEIGHTS_HINT, load_weights
from farout.core.errors import FaroutError
from farout.core.names import find_path
from farout.core.store import kind_of
from farout.features.backbones import read_weights

__all__ = ["RANDOM_WEIGHTS", "WeightsOrigin", "load_initial_weights"]


@dataclass(frozen=True)
class WeightsOrigin:
    """Where weights come from.

    Attributes:
        trained_on: content hashes of the images that they were trained on, as far as they are known.
        weights: name of the file whose training images are not known; None if `trained_on` is complete.
        classifier: content hash of the farout classifier that they were saved with.
    """

    trained_on: frozenset[str] = frozenset()
    weights: str | None = None
    classifier: str | None = None

    def may_have_seen(self, hashes: Collection[str]) -> bool:
        """Whether the weights may have been trained on one of the images with these content hashes."""
        return self.weights is not None or not self.trained_on.isdisjoint(hashes)

    def to_provenance(self) -> dict[str, str | None]:
        """The entries for the provenance of a classifier that is trained from these weights."""
        return {"weights": self.weights, "started_from": self.classifier}


RANDOM_WEIGHTS = WeightsOrigin()
"""Weights that have seen no image."""


def load_initial_weights(
    module: nn.Module, weights: str | Path, name: str, *, reduced_decoding: bool = False
) -> WeightsOrigin:
    """Load the weights of a file, or of a classifier's folder, into a network of the given name.

    The folder of a farout classifier lists its training images, unless its own initial weights came from elsewhere.
    They are listed by content hashes, which depend on `reduced_decoding`.

    Raises:
        FaroutError: for a classifier that was trained with another `reduced_decoding`.
        StoreError: for weights that are missing, damaged or do not fit.
    """
    path = find_path(weights)
    load_weights(module, read_weights(path, WEIGHTS_HINT), str(weights), name)
    folder = path if path.is_dir() else path.parent
    if (not path.is_dir() and path.name != "model.safetensors") or kind_of(folder) != KIND:
        return WeightsOrigin(weights=path.name)
    parent = Classifier.load(folder)
    if parent.trained_on and parent.preprocessing.reduced_decoding != reduced_decoding:
        how, flag = ("without", "no-") if reduced_decoding else ("with", "")
        raise FaroutError(
            f"the classifier {weights} was trained {how} reduced decoding; train this one alike "
            f"(--{flag}model.reduced-decoding)"
        )
    is_complete = bool(parent.trained_on) or "random_weights" in parent.provenance
    unknown = parent.provenance.get("weights", None if is_complete else path.name)
    return WeightsOrigin(parent.trained_on, unknown, parent.content_hash)
