"""Heat maps of `patches` on pasted squares: AUROC over pixels and over images, for its two kinds of maps.

    FAROUT_DATA=… python benchmarks/maps.py [SPEC ...] [--seed 0] [--fit 140] [--overlays DIR]

Each SPEC is one kind of images; a seeded part is fitted on, the rest is held out. Into every held-out image a square of
2, 5 and 10 % of the image's side is pasted at a random position from a random position of another held-out image: its
pixels are ordinary, only their position is wrong. Pixel AUROC compares the pixels of the squares with all others of the
same images, with maps resized to native size. Image AUROC compares pasted with untouched images by the mean of the
highest 1 % of the map, and by the `mahalanobis` detector on pooled features of the same layers. Intervals: 95 %, by
bootstrap over images.

The defaults of `patches` were chosen on other classes: `textures:test` blotchy and braided, `tiny_imagenet:train`
computer keyboard and brain coral.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from farout.core.errors import FaroutWarning
from farout.data.decoding import from_pil, to_pil
from farout.data.sources import open_source
from farout.detectors.base import Detector
from farout.detectors.mahalanobis import Mahalanobis
from farout.detectors.patches import Patches
from farout.evaluation.metrics import detection_metrics
from farout.report.overlays import draw_overlay

SPECS = ("textures:test@classes=banded", "textures:test@classes=bubbly", "tiny_imagenet:train@classes=monarch")
SQUARE_SIDES = (0.02, 0.05, 0.10)
MAPS = ("diffusion", "knn")
BINS, RESAMPLES = 512, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=list(SPECS))
    parser.add_argument("--fit", type=int, default=140, help="number of images fitted on; half of it for small sets")
    parser.add_argument("--held-out", type=int, help="maximum number of held-out images; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overlays", type=Path, help="folder for overlays of the first held-out images")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FaroutWarning)
    for spec in arguments.specs:
        source = open_source(spec)
        order = np.random.default_rng(arguments.seed).permutation(len(source)).tolist()
        count = arguments.fit // 2 if len(source) <= 120 else arguments.fit
        fitted_on = source.subset(sorted(order[:count]))
        held_out = [from_pil(to_pil(source[i]).convert("RGB")) for i in order[count:]][: arguments.held_out]
        detector = Patches().fit(fitted_on, alpha=0.1, seed=arguments.seed)
        pooled = Mahalanobis(layers=detector.backbone.layers).fit(fitted_on, alpha=0.1, seed=arguments.seed)
        clean, _ = measure(detector, pooled, held_out)
        print(f"\n{spec}: fitted on {count} images, {len(held_out)} held out")
        for side in SQUARE_SIDES:
            images, masks = paste_squares(held_out, side, arguments.seed)
            scores, maps = measure(detector, pooled, images)
            for name in MAPS:
                area, low, high = pixel_auroc(maps[name], masks)
                print(f"square {side:.0%}, pixel AUROC, {name}: {area:.3f} ({low:.3f} to {high:.3f})", flush=True)
            pairs = np.arange(len(images))  # a pasted and its untouched image are resampled together
            for name in scores:
                metrics = detection_metrics(clean[name], scores[name], image_ids=(pairs, pairs))
                interval = f"({metrics.auroc_low:.3f} to {metrics.auroc_high:.3f})"
                print(f"square {side:.0%}, image AUROC, {name}: {metrics.auroc:.3f} {interval}", flush=True)
            if arguments.overlays is not None:
                arguments.overlays.mkdir(parents=True, exist_ok=True)
                for index, image in enumerate(images[:4]):
                    pictures = [draw_overlay(image, torch.zeros(1, 1))]
                    pictures += [draw_overlay(image, maps[name][index]) for name in MAPS]
                    row = np.concatenate([np.asarray(picture) for picture in pictures], axis=1)
                    name = f"{spec.rpartition('=')[2]}-{side:.0%}-{index}.png"
                    to_pil(torch.from_numpy(row).permute(2, 0, 1)).save(arguments.overlays / name)


def paste_squares(images: list[Tensor], side: float, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Every image (3, H, W) with a square of another one, and the masks (H, W) of the squares."""
    pasted, masks = [], []
    for index, image in enumerate(images):
        generator = np.random.default_rng([seed, index, round(1000 * side)])
        donor = images[(index + int(generator.integers(1, len(images)))) % len(images)]
        pixels = max(1, round(side * min(*image.shape[1:], *donor.shape[1:])))
        corners = [generator.integers(np.array(each.shape[1:]) - pixels + 1) for each in (image, donor)]
        target, origin = (tuple(slice(int(start), int(start) + pixels) for start in corner) for corner in corners)
        result, mask = image.clone(), torch.zeros(image.shape[1:], dtype=torch.bool)
        result[:, *target], mask[target] = donor[:, *origin], True
        pasted.append(result)
        masks.append(mask)
    return pasted, masks


def measure(
    detector: Patches, pooled: Detector, images: list[Tensor]
) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """Image scores by name, and maps (B, h, w) at the size that the backbone sees."""
    source = open_source([to_pil(image) for image in images])
    measured = [detector.measure(batch, maps=True) for batch in detector.load_batches(source)]
    maps = {name: torch.cat([part.pictures[name][:, 0] for part in measured]) for name in MAPS}
    scores = {
        name: torch.cat([detector.compute_scores(part)[f"{name}_top"] for part in measured]).numpy() for name in MAPS
    }
    return {**scores, "pooled mahalanobis": pooled.score(source).score}, maps


def pixel_auroc(maps: Tensor, masks: list[Tensor]) -> tuple[float, float, float]:
    """AUROC over the pixels of all images with its interval.

    Values are counted in bins of equal size, ties within a bin count half: exact to about 0.001, and cheap to resample.
    """
    values = [
        functional.interpolate(heat[None, None], size=tuple(mask.shape), mode="bilinear", antialias=True)[0, 0].numpy()
        for heat, mask in zip(maps, masks)
    ]
    in_square = [value[mask.numpy()] for value, mask in zip(values, masks)]
    outside = [value[~mask.numpy()] for value, mask in zip(values, masks)]
    quantiles = np.linspace(0, 1, BINS + 1)[1:-1]
    # the highest values decide: the last bin is split by the quantiles of the squares
    pooled = [np.concatenate([value.ravel() for value in values]), np.concatenate(in_square)]
    edges = np.unique(np.concatenate([np.quantile(each, quantiles) for each in pooled]))
    positive, negative = (
        np.stack([np.bincount(np.searchsorted(edges, each), minlength=len(edges) + 1) for each in part])
        for part in (in_square, outside)
    )

    def auroc(chosen: np.ndarray) -> float:
        above, below = positive[chosen].sum(0), negative[chosen].sum(0)
        return float((above * (np.cumsum(below) - 0.5 * below)).sum() / (above.sum() * below.sum()))

    resamples = np.random.default_rng(0).integers(0, len(masks), (RESAMPLES, len(masks)))
    low, high = np.quantile([auroc(chosen) for chosen in resamples], [0.025, 0.975])
    return auroc(np.arange(len(masks))), float(low), float(high)


if __name__ == "__main__":
    main()
