"""Which images of a source can be worked with."""

from __future__ import annotations

from farout.images.sources import ImageSource

__all__ = ["readable"]


def readable(source: ImageSource) -> list[int]:
    """Places of the images that can be read; others raise UnreadableImageError where the policy is `raise`."""
    return [place for place, content in enumerate(source.content_hashes()) if content is not None]
