"""What is known of weights that a training starts from: the images that they have seen."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from farout.classifiers.model import KIND, Classifier
from farout.classifiers.weights import HOW, load_weights
from farout.core.store import kind_of
from farout.features.backbones import read_weights

__all__ = ["FRESH", "Origin", "start_from"]


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    Attributes:
        seen: content hashes of the images that they were trained on, as far as that is known.
        weights: name of the file of which it is not known; None where `seen` is complete.
        classifier: content hash of the farout classifier that they were saved with.
    """

    seen: frozenset[str] = frozenset()
    weights: str | None = None
    classifier: str | None = None

    def may_have_seen(self, hashes: Collection[str]) -> bool:
        """Whether the weights may have been trained on one of the images."""
        return self.weights is not None or not self.seen.isdisjoint(hashes)

    def told(self) -> dict[str, str | None]:
        """For the provenance of what is trained from them."""
        return {"weights": self.weights, "started_from": self.classifier}


FRESH = Origin()
"""Weights that have seen nothing."""


def start_from(module: nn.Module, weights: str | Path, name: str) -> Origin:
    """Puts weights into a network of that name: those of a file, or of a classifier's folder; says what they have seen.

    The `model.safetensors` of a farout classifier has its list of training images beside it, unless that classifier
    itself came from elsewhere. Raises StoreError for weights that are missing, damaged or do not fit.
    """
    path = Path(weights)
    load_weights(module, read_weights(path, HOW), str(weights), name)
    folder = path if path.is_dir() else path.parent
    if (not path.is_dir() and path.name != "model.safetensors") or kind_of(folder) != KIND:
        return Origin(weights=path.name)
    parent = Classifier.load(folder)
    known = bool(parent.trained_on) or "random_weights" in parent.provenance
    return Origin(
        parent.trained_on, parent.provenance.get("weights", None if known else path.name), parent.content_hash
    )
