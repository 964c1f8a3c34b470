"""Readers of files of numpy arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from farout.core.errors import SourceError
from farout.data.file_listing import Listing
from farout.data.in_memory import list_array
from farout.data.read_settings import DEFAULT_READING, ReadSettings

__all__ = ["list_npz"]


def list_npz(path: Path, reading: ReadSettings = DEFAULT_READING) -> Listing:
    """List the array `images` (or the first with three or four axes) with `labels`, or `x_images` with `x_labels`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            name = _image_array(arrays, path)
            images = arrays[name]
            label_name = next(
                (n for n in ("labels", name.replace("images", "labels")) if n != name and n in arrays), None
            )
            labels = arrays[label_name].reshape(-1).tolist() if label_name else None
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path} cannot be read as npz without pickle ({error})") from error
    return list_array(_channels_first(images, path), labels, str(path))


def _image_array(arrays: Mapping[str, np.ndarray], path: Path) -> str:
    if "images" in arrays:
        return "images"
    name = next((name for name in arrays if arrays[name].ndim in (3, 4)), None)
    if name is None:
        raise SourceError(f"{path} has arrays {', '.join(arrays) or 'none'}; expected images of shape (N, H, W[, C])")
    return name


def _channels_first(images: np.ndarray, path: Path) -> np.ndarray:
    """Convert (N, H, W), (N, C, H, W) or (N, H, W, C) to (N, C, H, W); if both of the last fit, channels are first."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise SourceError(
        f"{path} contains images of shape {images.shape}; expected (N, H, W), (N, C, H, W) or (N, H, W, C)"
    )
