"""`farout train classifier`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import Exposure, describe_classes
from farout.cli.terminal import print_text

__all__ = ["check_settings", "print_classifier"]


def check_settings(*, exposure: Exposure, outliers: str | None, reconstructions: str | None, **others: Any) -> None:
    """Raises FaroutError for outliers without a loss that uses them, and the reverse."""
    exposure.resolve_defaults(outliers is not None, reconstructions is not None)


def print_classifier(classifier: Classifier, arguments: Mapping[str, Any]) -> None:
    """Prints numbers of training images, classes and parameters, the folder, and the accuracy on held-out images."""
    about = classifier.provenance
    images = f"trained on {about['images']} images" if "images" in about else "with the given weights, not trained"
    size = f"{describe_classes(classifier)} ({classifier.parameters:,} parameters)"
    print_text(f"Classifier {images}, {size}; written to {arguments['out']}")
    for kind in ("outliers", "reconstructions"):
        if kind in about:
            print_text(f"{about[kind]['images']} {kind} from {about[kind]['source']}, loss {about['exposure']['loss']}")
    # only the first of several processes measures the accuracy
    if "held_out_accuracy" in about:
        print_text(f"accuracy {about['held_out_accuracy']:.3f} on {about['held_out_images']} held-out images")
    elif "possibly_seen_accuracy" in about:
        count = f"{about['possibly_seen_images']} images (which the given weights may have seen)"
        print_text(f"accuracy {about['possibly_seen_accuracy']:.3f} on {count}")
