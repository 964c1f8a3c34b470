"""Checks whether a classifier recognizes a generator's own samples.

Outliers of a generator that cannot generate its own classes are anomalous for reasons other than the method.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import count_known_classes
from farout.core import store
from farout.core.errors import FaroutError, MisleadingResultWarning
from farout.core.progress import task
from farout.core.schema import Schema, check_content
from farout.diffusion.sampling import Sampler

__all__ = ["classifier_indices", "recognition_rate", "warn_about_poor_samples"]

_RESULT_FILE = "generator_check.json"
_BATCH_SIZE, _MIN_SAMPLES, _MIN_SAMPLES_PER_CLASS = 64, 100, 5
_MIN_RATE = 0.8


class _ResultContent(Schema):
    """The file that stores the rate."""

    classifier: str
    recognition_rate: Annotated[float, Field(ge=0, le=1)]


def recognition_rate(sampler: Sampler, classifier: Classifier, names: Sequence[str], count: int | None = None) -> float:
    """The share of a generator's class-conditional samples that the classifier assigns to their class.

    Args:
        sampler: samples of a class-conditional model; sample i is of class i mod K.
        classifier: trained independently of the generator; see `classifier_indices` for its class names.
        names: class names of the generator, in the order of its labels.
        count: number of samples; None: 100, and at least 5 of each class.

    Raises FaroutError if the classifier lacks a class of the generator.
    """
    indices = classifier_indices(classifier, names)
    count = max(_MIN_SAMPLES, _MIN_SAMPLES_PER_CLASS * len(names)) if count is None else count
    correct = 0
    with task("the generator's own samples", count) as bar:
        for start in range(0, count, _BATCH_SIZE):
            numbers = range(start, min(start + _BATCH_SIZE, count))
            labels = [number % len(names) for number in numbers]
            logits = classifier.outputs(sampler.sample_images(numbers, labels), _BATCH_SIZE).logits
            predicted = logits.argmax(1).tolist()
            correct += sum(index == indices[label] for index, label in zip(predicted, labels, strict=True))
            bar.advance(len(numbers))
    return correct / count


def classifier_indices(classifier: Classifier, names: Sequence[str]) -> list[int]:
    """The classifier's index of each of these classes; raises FaroutError for a class that it lacks.

    A classifier whose class names are the numbers 0 to K - 1 is assumed to have the classes in the same order.
    """
    known = list(classifier.class_names[: count_known_classes(classifier)])
    if known == [str(number) for number in range(len(names))]:
        return list(range(len(names)))
    missing = [name for name in names if name not in known]
    if missing:
        raise FaroutError(f"the classifier does not know {', '.join(missing)}; it knows {', '.join(known)}")
    return [known.index(name) for name in names]


def warn_about_poor_samples(sampler: Sampler, classifier: Classifier, names: Sequence[str], folder: Path) -> None:
    """Warn (MisleadingResultWarning) if `recognition_rate` is below 80 %.

    The rate is stored in `folder`, a folder of outliers, whose generator and settings never change: later stages and
    resumed runs do not generate the samples again.
    """
    path, classifier_hash = folder / _RESULT_FILE, classifier.content_hash
    result: dict[str, Any] = {}
    if path.is_file():
        result = store.read_json(path)
        check_content(result, _ResultContent, str(path))
    if result.get("classifier") != classifier_hash:
        result = {"classifier": classifier_hash, "recognition_rate": recognition_rate(sampler, classifier, names)}
        store.write_json(path, result)
    rate = float(result["recognition_rate"])
    if rate < _MIN_RATE:
        warnings.warn(
            f"the classifier recognizes {rate:.0%} of the generator's own samples, expected at least {_MIN_RATE:.0%}: "
            "its outliers are anomalous for reasons other than the method; train the diffusion model for longer",
            MisleadingResultWarning,
            stacklevel=4,
        )
