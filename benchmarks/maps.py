"""Pasted squares found and outlined: pixel and image AUROC of the maps of `patches`, by diffusion and by neighbours.

    FAROUT_DATA=… python benchmarks/maps.py [SPEC ...] [--seed 0] [--fit 70 140] [--overlays DIR]

Each SPEC is one kind of images. A seeded part is fitted on, the rest held out; a square of 2, 5 and 10 % of the image's
side is pasted into every held-out image, at a random place, from a random place of another held-out image: its pixels
are ordinary, only their place is wrong. Pixel AUROC: pixels of pasted squares against all others of the same images,
maps enlarged to native size. Image AUROC: pasted against untouched images, by the mean of the highest 1 % of positions,
and by the `mahalanobis` detector on pooled features of the same layers. Intervals: bootstrap over images (a pasted and
its untouched image drawn together).

Defaults of `patches` were chosen on other classes: `textures:test` blotchy and braided, `tiny_imagenet:train` computer
keyboard and brain coral.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from common import interval, machine, table
from torch import Tensor
from torch.nn import functional

from farout.core.errors import FaroutWarning
from farout.data.decoding import from_pil, to_pil
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.detectors.base import Detector
from farout.detectors.mahalanobis import Mahalanobis
from farout.detectors.patches import Patches
from farout.evaluation.intervals import paired_difference
from farout.evaluation.metrics import detection_metrics
from farout.report.overlays import overlay

SPECS = ("textures:test@classes=banded", "textures:test@classes=bubbly", "tiny_imagenet:train@classes=monarch")
SHARES = (0.02, 0.05, 0.10)
MAPS = ("diffusion", "knn")
_BINS, _DRAWS = 512, 1000


@dataclass
class Found:
    """What was measured of one set: image scores by name, maps by name (B, H, W)."""

    scores: dict[str, np.ndarray] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)


def main() -> None:
    """Prints, for each kind of images, the table of areas and that of paired differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=list(SPECS))
    parser.add_argument(
        "--fit", type=int, nargs=2, default=(70, 140), help="images fitted on, of up to 120 and of more"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overlays", type=Path, help="folder for overlays of the first held-out images")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FaroutWarning)
    print(f"seed {arguments.seed}; {machine()}\n")
    for spec in arguments.specs:
        compare(spec, arguments.fit, arguments.seed, arguments.overlays)


def compare(spec: str, counts: tuple[int, int], seed: int, overlays: Path | None) -> None:
    """Fits, pastes, measures and prints one kind of images."""
    fitted_on, held_out = parts(spec, counts, seed)
    started = time.perf_counter()
    detector = Patches().fit(fitted_on, alpha=0.1, seed=seed)
    took = time.perf_counter() - started
    pooled = Mahalanobis(layers=detector.backbone.layers).fit(fitted_on, alpha=0.1, seed=seed)
    clean = measured(detector, pooled, held_out)
    count, about = len(held_out), detector.provenance["images"]
    print(f"{spec}: {about['training']} images trained on, {len(held_out)} held out, fit {took:.0f} s\n")
    areas, differences = [], []
    for share in SHARES:
        images, masks = pasted(held_out, share, seed)
        found = measured(detector, pooled, images)
        areas.append([f"{share:.0%}", *line(clean, found, masks)])
        differences.append([f"{share:.0%}", *difference(clean, found, masks)])
        if overlays is not None:
            draw(images, found, masks, overlays, f"{spec.rpartition('=')[2]}-{share:.0%}")
    heads = [f"pixel AUROC, {name}" for name in MAPS] + [
        f"image AUROC, {name}" for name in (*MAPS, "pooled mahalanobis")
    ]
    print(table([f"square, n = {count} + {count}", *heads], areas), "\n")
    pairs = ["pixel: diffusion - knn", "image: diffusion - knn", "image: diffusion - mahalanobis"]
    print(table(["difference", *pairs], differences), "\n", flush=True)


def parts(spec: str, counts: tuple[int, int], seed: int) -> tuple[ImageSource, list[Tensor]]:
    """The source that is fitted on, and the held-out images (3, H, W) uint8."""
    source = open_source(spec)
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    count = counts[0] if len(source) <= 120 else counts[1]
    held_out = [from_pil(to_pil(source[i]).convert("RGB")) for i in order[count:]]
    return source.subset(sorted(order[:count])), held_out


def pasted(images: list[Tensor], share: float, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Every image with a square out of another, and masks (H, W) of the squares."""
    changed, masks = [], []
    for index, image in enumerate(images):
        draws = np.random.default_rng([seed, index, round(1000 * share)])
        donor = images[(index + int(draws.integers(1, len(images)))) % len(images)]
        side = max(1, round(share * min(*image.shape[1:], *donor.shape[1:])))
        here, there = square(image, side, draws), square(donor, side, draws)
        new, mask = image.clone(), torch.zeros(image.shape[1:], dtype=torch.bool)
        new[:, *here], mask[here] = donor[:, *there], True
        changed.append(new)
        masks.append(mask)
    return changed, masks


def square(image: Tensor, side: int, draws: np.random.Generator) -> tuple[slice, slice]:
    """A square of the image, anywhere."""
    top, left = (int(draws.integers(length - side + 1)) for length in image.shape[1:])
    return slice(top, top + side), slice(left, left + side)


def measured(detector: Patches, pooled: Detector, images: list[Tensor]) -> Found:
    """Scores and maps; maps at the size that the backbone sees."""
    source, found = detector.open([to_pil(image) for image in images]), Found()
    parts = []
    for batch in detector.batches(source):
        parts.append(detector.measure(batch, maps=True))
    for name in MAPS:
        found.maps[name] = torch.cat([part.pictures[name][:, 0] for part in parts])
        found.scores[name] = torch.cat([detector.compute_scores(part)[f"{name}_top"] for part in parts]).numpy()
    found.scores["mahalanobis"] = pooled.score(source).score
    return found


def line(clean: Found, found: Found, masks: list[Tensor]) -> list[str]:
    """Pixel and image areas with their intervals."""
    cells = []
    for name in MAPS:
        area, draws = pixel_areas(found.maps[name], masks)
        cells.append(interval(area, *np.quantile(draws, [0.025, 0.975])))
    same = np.arange(len(masks))
    for name in (*MAPS, "mahalanobis"):
        rated = detection_metrics(clean.scores[name], found.scores[name], groups=(same, same))
        cells.append(interval(rated.auroc, rated.auroc_low, rated.auroc_high))
    return cells


def difference(clean: Found, found: Found, masks: list[Tensor]) -> list[str]:
    """Paired differences with their intervals."""
    (area, draws), (other, others) = (pixel_areas(found.maps[name], masks) for name in MAPS)
    ends = np.quantile(draws - others, [0.025, 0.975])
    cells, same = [interval(area - other, *ends, "+.3f")], np.arange(len(masks))
    for rival in ("knn", "mahalanobis"):
        sides = [(clean.scores[name], found.scores[name]) for name in ("diffusion", rival)]
        pair = paired_difference(*sides, groups=(same, same))
        cells.append(interval(pair.value, pair.low, pair.high, "+.3f"))
    return cells


def pixel_areas(maps: Tensor, masks: list[Tensor]) -> tuple[float, np.ndarray]:
    """AUROC over pixels of all images, and of `_DRAWS` resamples of the images, the same ones for every map.

    Values are counted in 512 bins of equal size, ties within a bin count half: the area is exact to about 0.001.
    """
    values = [at_native(one, mask).numpy() for one, mask in zip(maps, masks)]
    edges = np.quantile(np.concatenate([value.ravel() for value in values]), np.linspace(0, 1, _BINS + 1)[1:-1])
    # what is wanted are the highest values: the last bin is split again by the squares' own
    edges = np.unique(np.r_[edges, np.quantile(inside(values, masks), np.linspace(0, 1, _BINS + 1)[1:-1])])
    good, bad = (histograms(values, masks, edges, wanted) for wanted in (False, True))
    draws = np.random.default_rng(0).integers(0, len(masks), (_DRAWS, len(masks)))
    return area(good.sum(0), bad.sum(0)), np.array([area(good[chosen].sum(0), bad[chosen].sum(0)) for chosen in draws])


def at_native(heat: Tensor, mask: Tensor) -> Tensor:
    """The map (h, w) at the size of the mask (H, W)."""
    return functional.interpolate(heat[None, None], size=tuple(mask.shape), mode="bilinear", antialias=True)[0, 0]


def inside(values: list[np.ndarray], masks: list[Tensor]) -> np.ndarray:
    """Values in the squares."""
    return np.concatenate([value[mask.numpy()] for value, mask in zip(values, masks)])


def histograms(values: list[np.ndarray], masks: list[Tensor], edges: np.ndarray, wanted: bool) -> np.ndarray:
    """Counts (n, bins) of the pixels in, or outside, the squares."""
    chosen = [value[mask.numpy() == wanted] for value, mask in zip(values, masks)]
    return np.stack([np.bincount(np.searchsorted(edges, one), minlength=len(edges) + 1) for one in chosen])


def area(good: np.ndarray, bad: np.ndarray) -> float:
    """AUROC from counts per bin."""
    below = np.cumsum(good) - 0.5 * good
    return float((bad * below).sum() / (bad.sum() * good.sum()))


def draw(images: list[Tensor], found: Found, masks: list[Tensor], folder: Path, name: str) -> None:
    """The first images with the map by diffusion, beside their masks."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(4):
        mask = overlay(masks[index].to(torch.uint8)[None] * 255, torch.zeros(1, 1))
        pair = [overlay(images[index], torch.zeros(1, 1)), mask]
        pair += [overlay(images[index], found.maps[each][index]) for each in MAPS]
        from_left = np.concatenate([np.asarray(picture) for picture in pair], axis=1)
        to_pil(torch.from_numpy(from_left).permute(2, 0, 1)).save(folder / f"{name}-{index}.png")


if __name__ == "__main__":
    main()
