"""Which images of a source can be worked with."""

from __future__ import annotations

from farout.core.errors import SourceError
from farout.data.image_source import ImageSource

__all__ = ["readable_indices", "require_readable_indices"]


def readable_indices(source: ImageSource) -> list[int]:
    """Places of the images that can be read; others raise UnreadableImageError where the policy is `raise`."""
    return [place for place, content in enumerate(source.content_hashes()) if content is not None]


def require_readable_indices(source: ImageSource) -> list[int]:
    """`readable`; raises SourceError where there is none."""
    places = readable_indices(source)
    if not places:
        raise SourceError(f"none of the {len(source)} images of {source.name} is readable; give others")
    return places
