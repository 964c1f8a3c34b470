"""Whether a classifier recognises a generator's classes: outliers of one that cannot make its classes mean little."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import known_classes
from farout.core import store
from farout.core.errors import FaroutError, TrapWarning
from farout.core.progress import task
from farout.diffusion.sampling import Sampler

__all__ = ["class_places", "recognised", "warn_of_poor_samples"]

_REMEMBERED = "recognised.json"
_TOGETHER, _IMAGES, _IMAGES_OF_A_CLASS = 64, 100, 5
_SHARE = 0.8
"""Of the generator's own samples that a classifier is to recognise."""


def recognised(sampler: Sampler, classifier: Classifier, names: Sequence[str], count: int | None = None) -> float:
    """The share of a generator's own conditional samples whose class the classifier tells.

    Args:
        sampler: of a class-conditional model; image i is of class i mod K.
        classifier: trained apart from the generator; one whose classes are bare numbers has them in the same order.
        names: of the generator's classes, by number.
        count: images; None: 100, and at least 5 of each class.

    Raises FaroutError where the classifier lacks a class of the generator.
    """
    places = class_places(classifier, names)
    count = max(_IMAGES, _IMAGES_OF_A_CLASS * len(names)) if count is None else count
    hits = 0
    with task("the generator's own samples", count) as bar:
        for start in range(0, count, _TOGETHER):
            indices = range(start, min(start + _TOGETHER, count))
            labels = [index % len(names) for index in indices]
            told = classifier.outputs(sampler.images(indices, labels), _TOGETHER).logits.argmax(1).tolist()
            hits += sum(place == places[label] for place, label in zip(told, labels, strict=True))
            bar.advance(len(indices))
    return hits / count


def class_places(classifier: Classifier, names: Sequence[str]) -> list[int]:
    """Where the classifier has each of these classes; raises FaroutError for one that it lacks.

    One whose classes are bare numbers, as many, has them in the same order.
    """
    known = list(classifier.class_names[: known_classes(classifier)])
    if known == [str(number) for number in range(len(names))]:
        return list(range(len(names)))
    lacking = [name for name in names if name not in known]
    if lacking:
        raise FaroutError(f"the classifier does not know {', '.join(lacking)}; it knows {', '.join(known)}")
    return [known.index(name) for name in names]


def warn_of_poor_samples(sampler: Sampler, classifier: Classifier, names: Sequence[str], folder: Path) -> None:
    """A TrapWarning where less than 80 % are `recognised`.

    The share is kept in `folder`, a folder of outliers, whose generator and settings are always the same: stages that
    are done one by one, and runs that go on, make no samples for it again.
    """
    path, judge = folder / _REMEMBERED, classifier.content_hash
    kept = store.read_json(path) if path.is_file() else {}
    if kept.get("classifier") != judge:
        kept = {"classifier": judge, "share": recognised(sampler, classifier, names)}
        store.write_json(path, kept)
    share = float(kept["share"])
    if share < _SHARE:
        warnings.warn(
            f"the classifier recognises {share:.0%} of the generator's own samples, expected at least {_SHARE:.0%}: "
            "its outliers are anomalous for reasons other than the method; train the diffusion model for longer",
            TrapWarning,
            stacklevel=4,
        )
