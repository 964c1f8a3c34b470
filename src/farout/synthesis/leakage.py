"""Warnings about leakage: networks that were trained on classes that an evaluation may hold out."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import count_known_classes
from farout.core.errors import MisleadingResultWarning, UnreadableImageError
from farout.data.classes import class_name, present_class_names
from farout.data.image_source import ImageSource
from farout.diffusion.model import DiffusionModel

__all__ = ["warn_about_extra_classes"]

_MAX_LISTED = 12


def warn_about_extra_classes(
    source: ImageSource, diffusion: DiffusionModel | None = None, classifier: Classifier | None = None
) -> None:
    """Warn (MisleadingResultWarning) about each network that knows classes of which `source` has no images.

    A network knows a class if it has a class of that name, or if images of the class are among its training images.
    The second check needs the other images of the set that `source` is a part of, for instance the held-out classes of
    `fashion_mnist:train@classes=0-7`. An outlier generated with a network that has seen the held-out classes may be an
    image of one of them.
    """
    present = set(present_class_names(source))
    if diffusion is not None:
        names = () if diffusion.conditioning is None else diffusion.conditioning.class_names
        images = source.with_reduced_decoding(diffusion.preprocessing.reduced_decoding)
        _warn_about_network("diffusion model", names, diffusion.trained_on, images, present)
    if classifier is not None:
        names = classifier.class_names[: count_known_classes(classifier)]
        # class names 0, 1, … that the images do not use say nothing about which classes these are
        only_numbers = list(names) == [str(number) for number in range(len(names))]
        names = () if only_numbers and present.isdisjoint(names) else names
        images = source.with_reduced_decoding(classifier.preprocessing.reduced_decoding)
        _warn_about_network("classifier", names, classifier.trained_on, images, present)


def _warn_about_network(
    network: str, names: Sequence[str], trained_on: Collection[str], source: ImageSource, present: Collection[str]
) -> None:
    extra_by_name = [name for name in names if name not in present]
    extra_by_image = _trained_classes(trained_on, source, {*present, *extra_by_name}) if trained_on else []
    reasons = [f"knows {_format_classes(extra_by_name)}"] if extra_by_name else []
    reasons += [f"was trained on images of {_format_classes(extra_by_image)}"] if extra_by_image else []
    if reasons:
        warnings.warn(
            f"the {network} {' and '.join(reasons)}, of which {source.name} has no images: if they are held out for an "
            "evaluation, outliers generated with it leak those classes, and results that use them are too good; use "
            "one that was trained on the other classes alone",
            MisleadingResultWarning,
            stacklevel=4,
        )


def _format_classes(names: Sequence[str]) -> str:
    """The number of classes and the first names."""
    more = ", …" * (len(names) > _MAX_LISTED)
    return f"{len(names)} class{'es' * (len(names) > 1)} ({', '.join(names[:_MAX_LISTED])}{more})"


def _trained_classes(trained_on: Collection[str], source: ImageSource, ignored: Collection[str]) -> list[str]:
    """Classes of the set that `source` is a part of with images among the training images, without those `ignored`."""
    full_set = source.full_source().with_policy("skip")
    indices: dict[str, list[int]] = {}
    for index, label in enumerate(full_set.labels or ()):
        name = class_name(full_set, label)
        if name not in ignored:
            indices.setdefault(name, []).append(index)
    return [name for name, some in indices.items() if _contains_any(full_set.subset(some), trained_on)]


def _contains_any(images: ImageSource, hashes: Collection[str]) -> bool:
    for index in range(len(images)):
        try:
            if images.content_hash(index) in hashes:
                return True
        except UnreadableImageError:
            continue  # no network was trained on it
    return False
