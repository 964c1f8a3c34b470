"""Near-copies are found, and distinct images of simple sets are not taken for near-copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from copied_scenes import KINDS, as_tensor, copy_scenes, synthetic_scenes
from farout.data.near_copies import NearCopies, find_near_copies
from farout.data.sources import open_source
from farout.data.splits import group_images
from farout.data.thumbnails import THUMBNAIL_BYTES, make_thumbnail


def find(images: list[torch.Tensor]) -> NearCopies:
    thumbnails = b"".join(map(make_thumbnail, images))
    return find_near_copies(np.frombuffer(thumbnails, np.uint8).reshape(len(images), THUMBNAIL_BYTES))


def shuffle(images: list[torch.Tensor], seed: int = 0) -> tuple[list[torch.Tensor], np.ndarray]:
    """Images in a random order, as that of their hashes is."""
    order = np.random.default_rng(seed).permutation(len(images))
    return [images[i] for i in order], order


@pytest.mark.parametrize("kind", KINDS)
def test_near_copies_of_every_kind_are_found_and_scenes_are_not_joined(kind: str) -> None:
    images, order = shuffle(copy_scenes(synthetic_scenes(30, 96), kind, 5))
    labels = find(images).labels
    scenes = order // 5
    assert labels.max() + 1 == 30
    assert all(len(set(labels[scenes == scene])) == 1 for scene in range(30))


@pytest.mark.parametrize(("scenes", "copies"), [(12, 5), (6, 40), (100, 1)])
def test_sizes_of_bursts_do_not_matter(scenes: int, copies: int) -> None:
    images, _ = shuffle(copy_scenes(synthetic_scenes(scenes), "noise", copies))
    found = find(images)
    assert found.labels.max() + 1 == scenes
    assert not found.is_restricted


def test_a_burst_of_more_than_half_of_the_images_is_one_scene() -> None:
    scenes = synthetic_scenes(13)
    images, order = shuffle([*map(as_tensor, scenes[1:]), *copy_scenes(scenes[:1], "noise", 20)])
    labels = find(images).labels
    assert labels.max() + 1 == 13
    assert len(set(labels[order >= 12])) == 1


def shapes(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    images = []
    for _ in range(count):
        image = Image.new("RGB", (64, 64), tuple(rng.integers(0, 80, 3).tolist()))
        radius, color = int(rng.integers(5, 18)), tuple(rng.integers(120, 255, 3).tolist())
        x, y = rng.integers(radius, 64 - radius, 2).tolist()
        draw = ImageDraw.Draw(image)
        outline = draw.ellipse if rng.integers(2) else draw.rectangle
        outline([x - radius, y - radius, x + radius, y + radius], fill=color)
        images.append(np.asarray(image))
    return images


def variations_of_one(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Objects that look alike, as products in front of one camera do."""
    (base,) = synthetic_scenes(1)
    small = rng.normal(0, 6, (count, 8, 8)).astype(np.float32)
    layers = [
        np.asarray(Image.fromarray(part).resize((64, 64), Image.Resampling.BICUBIC))[:, :, None] for part in small
    ]
    return [np.clip(base + layer, 0, 255).astype(np.uint8) for layer in layers]


DISTINCT = {
    "photographs": lambda rng: synthetic_scenes(200),
    "shapes": lambda rng: shapes(200, rng),
    "one object": lambda rng: variations_of_one(200, rng),
    "plain colors": lambda rng: [np.full((16, 16, 3), color, np.uint8) for color in rng.integers(0, 256, (200, 3))],
    "plain gray": lambda rng: [np.full((16, 16), level, np.uint8) for level in range(0, 256, 2)],
    "nearly black": lambda rng: list(rng.integers(0, 4, (200, 64, 64)).astype(np.uint8)),
    "noise of 4 x 4": lambda rng: list(rng.integers(0, 256, (200, 4, 4)).astype(np.uint8)),
    "noise of 256 x 256": lambda rng: list(rng.integers(0, 256, (60, 256, 256)).astype(np.uint8)),
}


@pytest.mark.parametrize("name", DISTINCT)
def test_distinct_images_of_simple_sets_are_not_joined(name: str) -> None:
    images = [as_tensor(image) for image in DISTINCT[name](np.random.default_rng(0))]
    assert find(images).labels.max() + 1 == len(images)


def test_a_dark_group_in_a_set_of_photographs_is_not_one_image() -> None:
    rng = np.random.default_rng(0)
    dark = list(rng.integers(0, 4, (60, 64, 64, 3)).astype(np.uint8))
    images, _ = shuffle([as_tensor(image) for image in [*synthetic_scenes(60), *dark]])
    assert find(images).labels.max() + 1 == 120


def test_more_than_half_are_not_joined_by_a_chain_of_shifted_images() -> None:
    """One shape at random places is no video of it."""
    images = []
    for x, y in np.random.default_rng(0).integers(10, 54, (400, 2)).tolist():
        image = Image.new("L", (64, 64))
        ImageDraw.Draw(image).ellipse([x - 10, y - 10, x + 10, y + 10], fill=255)
        images.append(np.asarray(image))
    distinct = np.unique(np.stack(images), axis=0)
    images = shuffle([as_tensor(image) for image in distinct])[0]
    found = find(images)
    assert found.is_restricted
    assert np.bincount(found.labels).max() < len(images) / 4


def test_groups_depend_on_neither_names_nor_order() -> None:
    images = copy_scenes(synthetic_scenes(20), "mixed", 4)
    order = np.random.default_rng(1).permutation(len(images)).tolist()
    first = group_images(open_source(torch.stack(images)))
    second = group_images(open_source(torch.stack([images[i] for i in order])))
    assert {frozenset(group) for group in first.groups} == {frozenset(order[i] for i in g) for g in second.groups}
    assert first.describe_copies() == "60 of 80 images are copies or near-copies of others: 20 distinct images"


def test_size_and_format_of_a_copy_do_not_matter() -> None:
    scenes = synthetic_scenes(20, 128)
    smaller = [np.asarray(Image.fromarray(scene).resize((100, 100), Image.Resampling.BICUBIC)) for scene in scenes]
    images, order = shuffle([as_tensor(image) for image in [*scenes, *smaller]])
    labels = find(images).labels
    assert labels.max() + 1 == 20
    assert all(len(set(labels[order % 20 == scene])) == 1 for scene in range(20))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_very_small_sets(count: int) -> None:
    assert len(find([as_tensor(image) for image in synthetic_scenes(count)]).labels) == count


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion_mnist", "mnist", "cifar10", "tiny_imagenet"])
def test_few_images_of_real_sets_are_joined(name: str) -> None:
    grouped = group_images(open_source(f"{name}:train", limit=3000))
    assert grouped.copies <= 0.005 * 3000
