"""Where in each scored image the detector sees what is unlike good images: the image with its heat map laid over."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from farout.core.chunking import blocks_with
from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.data.decoding import save_png, to_pil
from farout.data.image_source import Policy
from farout.detectors.base import Detector
from farout.report.heat_colors import MapScale, colorize

__all__ = ["FOLDER", "check_makes_maps", "overlay", "overlay_name", "write_overlays"]

FOLDER = "maps"
"""Folder of the overlays inside a scored folder."""
_DEFAULT = MapScale()
_LEAST = 224
_OPACITY = 0.75
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"\\|?*%]')
_LONGEST = 240
_NOTE = (
    "Maps show {unit}: heat begins at 0 and is at its strongest at {brightest:g} or more.\n"
    "The scale is the same for all images of all runs.\n"
)


def check_makes_maps(detector: Detector) -> None:
    """Raises FaroutError for a detector that cannot tell where in an image something is."""
    if not detector.makes_maps:
        raise FaroutError(
            f"{type(detector).__name__} gives one number an image and no maps; fit `patches`, `reconstruction` or "
            "`denoising`"
        )


def write_overlays(
    detector: Detector, images: Any, out: str | Path, *, limit: int | None = None, policy: Policy = "nan"
) -> int:
    """Writes `out/<key>.png` for every readable image; returns how many were written now.

    One batch at a time is in memory. What is there already stays: an interrupted run goes on, so `out` must be of the
    same detector and images (`score_folder` refuses others in its folder). A batch of which some images are missing is
    measured as a whole, so that maps have the bytes of a run without interruption.

    Args:
        detector: a fitted detector that makes maps.
        images: any image source.
        out: folder of the overlays.
        limit: a seeded sample of this many images, as in `score_folder`.
        policy: what becomes of an unreadable image: left out, or `raise`.

    Raises:
        FaroutError: for a detector without maps or fit.
    """
    check_makes_maps(detector)
    detector.check_fitted()
    source, out = detector.open(images, limit=limit, policy=policy), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    scale = MapScale.of(detector)
    (out / "README.txt").write_text(_NOTE.format(unit=scale.unit, brightest=scale.brightest), encoding="utf-8")
    paths = {index: out / overlay_name(key) for index, key in enumerate(source.keys)}
    missing = {index for index, path in paths.items() if not path.is_file()}
    blocks = blocks_with(missing, detector.batch_size, len(source))
    planned = [index for block in blocks for index in block]
    count = 0
    with task(f"maps of {source.name}", len(planned)) as bar:
        for batch in detector.batches(source.subset(planned)):
            indices = [planned[place] for place in batch.indices]
            if missing.intersection(indices):
                maps = detector.measure(batch, maps=True).maps
                assert maps is not None
                for index, heat in zip(indices, maps, strict=True):
                    if index in missing:
                        picture = overlay(source[index], heat, detector.preprocessing.crop, scale)
                        save_png(picture, paths[index], out / ".working")
                        count += 1
            bar.advance(len(batch.keys))
    return count


def overlay_name(key: str) -> str:
    """A relative path, with forward slashes, that no key can lead out of the folder with and no two keys share.

    `a/b.jpg` becomes `a/b.jpg.png`; characters that some file systems refuse, and names such as `..`, are written as
    %XX, and a part of more than 240 bytes is cut and ends in its hash.
    """
    return "/".join(_safe(part) for part in key.split("/")) + ".png"


def _safe(part: str) -> str:
    if part.strip(".") == "":
        return "%2E" * len(part) or "%"
    text = _UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", part)
    if len(text.encode()) <= _LONGEST:
        return text
    return text.encode()[:200].decode(errors="ignore") + "%" + hashlib.sha256(part.encode()).hexdigest()[:16]


def overlay(image: Tensor, heat: Tensor, crop: int | None = None, scale: MapScale = _DEFAULT) -> Image.Image:
    """The image (C, H, W) uint8 with its map (h, w) laid over, RGB, aspect kept.

    At native size, enlarged so that the longer side has 224 pixels at least. The hotter, the more opaque; what is not a
    number is hottest, for it is never normal. `crop`: side of the central crop that the map is of.
    """
    height, width = image.shape[-2:]
    factor = max(1.0, _LEAST / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    picture = to_pil(image).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    share = _placed(Image.fromarray(scale.share(heat).numpy()), (height, width), size, crop)
    colours = colorize(share, "inferno")
    opacity = _OPACITY * np.sqrt(share)[..., None]
    mixed = (1 - opacity) * np.asarray(picture, dtype=np.float64) / 255 + opacity * colours
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def _placed(heat: Image.Image, native: tuple[int, int], size: tuple[int, int], crop: int | None) -> np.ndarray:
    """The map where the image was seen, 0 beside a central crop: (H, W) of the picture of `size` (width, height)."""
    seen = [side if crop is None else min(side, crop) for side in native]
    tall, wide = (max(1, round(part * whole / side)) for part, whole, side in zip(seen, size[::-1], native))
    inside = np.asarray(heat.resize((wide, tall), Image.Resampling.BILINEAR))
    placed = np.zeros(size[::-1], dtype=np.float32)
    top, left = (placed.shape[0] - tall) // 2, (placed.shape[1] - wide) // 2
    placed[top : top + tall, left : left + wide] = inside
    return placed
