"""Scenes, and near-copies of them as bursts, recompression, augmentation and video make them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

KINDS = ("noise", "jpeg", "brightness", "mirrored", "mixed", "pan")


def synthetic_scenes(count: int, size: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Color images (size, size, 3) with structure at all scales, as photographs have."""
    rng = np.random.default_rng(seed)
    scenes = []
    for _ in range(count):
        image = np.full((size, size, 3), 128.0)
        for cells, strength in ((2, 40), (4, 30), (8, 20), (16, 10), (32, 6)):
            shades = rng.normal(0, strength, (cells, cells)).astype(np.float32)
            colors = rng.normal(0, strength / 3, (cells, cells, 3)).astype(np.float32)
            for channel in range(3):
                layer = Image.fromarray(shades + colors[:, :, channel]).resize((size, size), Image.Resampling.BICUBIC)
                image[:, :, channel] += np.asarray(layer)
        scenes.append(np.clip(image, 0, 255).astype(np.uint8))
    return scenes


def copy_scene(scene: np.ndarray, kind: str, number: int, rng: np.random.Generator) -> np.ndarray:
    """Near-copy `number` of a scene (H, W) or (H, W, 3); of a pan, a window of three quarters of the side."""
    if kind == "pan":
        side, step = scene.shape[0] * 3 // 4, max(1, scene.shape[0] // 48)
        return np.ascontiguousarray(scene[:side, number * step : number * step + side])
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "noise": lambda image: np.clip(image + rng.integers(-1, 2, image.shape), 0, 255),
        "jpeg": lambda image: _compress(image, int(rng.integers(50, 96))),
        "brightness": lambda image: np.clip(image * rng.uniform(0.85, 1.15) + rng.uniform(-10, 10), 0, 255),
        "mirrored": lambda image: image[:, ::-1] if number % 2 else image,
    }
    chosen: Sequence[str] = ("brightness", "mirrored", "jpeg", "noise") if kind == "mixed" else (kind,)
    image = scene
    for change in chosen:
        image = np.rint(changes[change](image.astype(np.int64))).astype(np.uint8)
    return image


def copy_scenes(scenes: list[np.ndarray], kind: str, copies: int, seed: int = 0) -> list[Tensor]:
    """Near-copies of every scene, those of a scene one after the other, as tensors (C, H, W)."""
    rng = np.random.default_rng(seed)
    return [as_tensor(copy_scene(scene, kind, number, rng)) for scene in scenes for number in range(copies)]


def as_tensor(image: np.ndarray) -> Tensor:
    """(H, W) or (H, W, 3) as a tensor (C, H, W)."""
    array = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(array))


def _compress(image: np.ndarray, quality: int) -> np.ndarray:
    encoded = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(encoded, "JPEG", quality=quality)
    return np.asarray(Image.open(encoded)).astype(np.int64)
