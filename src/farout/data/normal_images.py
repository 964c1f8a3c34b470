"""Checks of the images that a detector or a network is fitted to: that they are one set, and of normal images."""

from __future__ import annotations

import warnings

from farout.core.errors import MisleadingResultWarning, SourceError
from farout.data.folder_layout import normal_class_of
from farout.data.image_source import ImageSource

__all__ = ["check_normal_images", "check_one_set"]


def check_one_set(source: ImageSource) -> None:
    """Raise SourceError if the source is a data set with its splits, whose test images and masks would be learned."""
    if source.splits is not None:
        raise SourceError(source.splits)


def check_normal_images(source: ImageSource) -> None:
    """Check images that a detector takes for normal; as `check_one_set`, and for class folders such as `good`.

    Warns:
        MisleadingResultWarning: one of the classes is named as if the others were not normal.
    """
    check_one_set(source)
    if source.class_names is None or source.labels is None:
        return
    present = [source.class_names[label] for label in sorted(set(source.labels)) if label < len(source.class_names)]
    normal = normal_class_of(present)
    if normal is not None:
        others = [name for name in present if name != normal]
        shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
        warnings.warn(
            f"{source.name} has the class {normal} next to {shown}, and images of all classes count as normal; add "
            f"@classes={normal} if the others are not",
            MisleadingResultWarning,
            stacklevel=3,
        )
