"""Indices of the readable images of a source."""

from __future__ import annotations

from farout.core.errors import SourceError
from farout.data.image_source import ImageSource

__all__ = ["readable_indices", "require_readable_indices"]


def readable_indices(source: ImageSource) -> list[int]:
    """Return the indices of the readable images; raises UnreadableImageError for others if the policy is `raise`."""
    return [index for index, content in enumerate(source.content_hashes()) if content is not None]


def require_readable_indices(source: ImageSource) -> list[int]:
    """Return `readable_indices`; raises SourceError if no image is readable."""
    indices = readable_indices(source)
    if not indices:
        raise SourceError(f"none of the {len(source)} images of {source.name} is readable; give other images")
    return indices
