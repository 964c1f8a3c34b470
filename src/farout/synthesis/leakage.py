"""Networks that know more than the classes of the images: what they help to make may hold what a figure holds out."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import known_classes
from farout.core.errors import TrapWarning, UnreadableImageError
from farout.data.classes import class_name, names_of
from farout.data.image_source import ImageSource
from farout.diffusion.model import DiffusionModel

__all__ = ["warn_of_other_classes"]

_NAMED = 12


def warn_of_other_classes(
    source: ImageSource, diffusion: DiffusionModel | None = None, classifier: Classifier | None = None
) -> None:
    """A TrapWarning for each network that knows classes of which `source` has no images: by its class names, or because
    images of them are among those that it was trained on, as far as these are in the set that `source` is a part of
    (the rest of `fashion_mnist:train@classes=0-7`, for instance).

    An outlier made with a network that has seen the held-out classes may be an image of one.
    """
    present = set(names_of(source))
    if diffusion is not None:
        names = () if diffusion.conditioning is None else diffusion.conditioning.class_names
        _warn("diffusion model", names, diffusion.trained_on, source, present)
    if classifier is not None:
        names = classifier.class_names[: known_classes(classifier)]
        numbered = list(names) == [str(number) for number in range(len(names))]
        # numbers that are nobody's names stand for classes that cannot be told
        told = () if numbered and present.isdisjoint(names) else names
        _warn("classifier", told, classifier.trained_on, source, present)


def _warn(
    what: str, names: Sequence[str], trained_on: Collection[str], source: ImageSource, present: Collection[str]
) -> None:
    by_name = [name for name in names if name not in present]
    seen = _seen(trained_on, source, {*present, *by_name}) if trained_on else []
    parts = [f"knows {_listed(by_name)}"] if by_name else []
    parts += [f"was trained on images of {_listed(seen)}"] if seen else []
    if parts:
        warnings.warn(
            f"the {what} {' and '.join(parts)}, of which {source.name} has no images: if they are held out for an "
            "evaluation, outliers generated with it leak those classes, and results that use them are too good; use "
            "one that was trained on the other classes alone",
            TrapWarning,
            stacklevel=4,
        )


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many there are."""
    more = ", …" * (len(names) > _NAMED)
    return f"{len(names)} class{'es' * (len(names) > 1)} ({', '.join(names[:_NAMED])}{more})"


def _seen(trained_on: Collection[str], source: ImageSource, known: Collection[str]) -> list[str]:
    """Other classes of the set that `source` is a part of with images among those trained on."""
    whole = source.whole().with_policy("skip")
    groups: dict[str, list[int]] = {}
    for place, label in enumerate(whole.labels or ()):
        name = class_name(whole, label)
        if name not in known:
            groups.setdefault(name, []).append(place)
    return [name for name, places in groups.items() if _any_of(whole.subset(places), trained_on)]


def _any_of(images: ImageSource, trained_on: Collection[str]) -> bool:
    for index in range(len(images)):
        try:
            if images.content_hash(index) in trained_on:
                return True
        except UnreadableImageError:
            continue  # nobody was trained on it
    return False
