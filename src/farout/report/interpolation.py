"""Interpolations between images of a source, with an HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farout.core import progress, store
from farout.core.chunking import BatchSize
from farout.core.devices import PrecisionChoice, resolve_device, resolve_precision
from farout.core.errors import FaroutError, SourceError
from farout.core.names import expand_path
from farout.core.runtime import Runtime
from farout.data.batching import iterate_batches
from farout.data.decoding import save_png
from farout.data.image_source import ImageSource
from farout.data.sources import Images, open_source
from farout.diffusion.interpolation import Interpolator
from farout.diffusion.model import DiffusionModel
from farout.diffusion.solvers.registry import is_adaptive
from farout.report.rendering import png_data_url, render_template

__all__ = ["KIND", "InterpolatedFolder", "write_interpolations"]

KIND = "interpolations"
_STRIPS = ("asymmetric_1", "asymmetric_2", "symmetric")


@dataclass(frozen=True)
class InterpolatedFolder:
    """Result of `write_interpolations`.

    Attributes:
        folder: folder of the images and the page.
        pairs: number of pairs of images.
        images: number of images written.
        reconstruction_error: root mean square difference of an image and its decoded inversion, values in [0, 1],
            mean over all images.
    """

    folder: Path
    pairs: int
    images: int
    reconstruction_error: float


def write_interpolations(
    model: DiffusionModel | str | Path,
    source: Images,
    out: str | Path,
    *,
    pairs: int = 8,
    solver: str = "pndm4",
    steps: int = 50,
    images_between: int = 9,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    device: str = "auto",
    precision: PrecisionChoice = "fp32",
    workers: int = 2,
) -> InterpolatedFolder:
    """Interpolate between pairs of images with a diffusion model: images and an HTML page.

    Writes `asymmetric_1/`, `asymmetric_2/` and `symmetric/` with `PPP-SS.png` (pair, number of the image between the
    ends), `config.json`, and `page.html`, one file without requests to other hosts; see `Interpolator`. An older
    folder of interpolations is replaced once the new one is complete.

    Args:
        model: folder of a diffusion model, or hf://owner/name; a class-conditional one is used without classes.
        source: images: a named set, folder, glob, file, or hf://owner/name:split.
        out: folder of the images and the page.
        pairs: number of pairs, drawn at random from the source.
        solver: one of `ddim`, `heun`, `dpm_solver_2m`, `unipc`, `plms`, `pndm2`, `pndm4`, `ndm1`, `ndm4` or
            `probability_flow`.
        steps: number of steps of the inversion, and of the denoising.
        images_between: number of images between the two ends.
        seed: seed of the choice of images.
        batch_size: maximum number of images processed together and of rows per network call; `auto`: set by memory.
        device: device of the network: `auto` (CUDA if present, else CPU), `cpu`, `cuda`, `cuda:1`, `mps`.
        precision: precision of the network; fp32 is recommended, since inversion is sensitive to rounding.
        workers: number of threads that decode images.

    Raises:
        FaroutError: incompatible settings.
        SourceError: fewer images than the pairs require.
        StoreError: `out` contains something else.
    """
    if pairs < 1:
        raise FaroutError(f"pairs must be 1 or more, got {pairs}")
    store.check_replaceable(out, KIND)
    network = model if isinstance(model, DiffusionModel) else DiffusionModel.load(model).to(resolve_device(device))
    resolved_precision = resolve_precision(precision, network.device)
    interpolator = Interpolator(network, solver, steps, images_between, batch_size, resolved_precision)
    images = open_source(source, limit=2 * pairs, seed=seed, require_range=False)
    images = images.with_value_range(network.preprocessing.value_range)
    if len(images) < 2 * pairs:
        raise SourceError(f"{images.name} has {len(images)} images, {pairs} pairs require {2 * pairs}")
    # image p is paired with image p + pairs; the two follow one another in the subset
    paired = images.subset([index for pair in range(pairs) for index in (pair, pair + pairs)])
    with store.atomic_folder(out, KIND) as folder:
        runtime = Runtime(str(network.device), resolved_precision, batch_size, workers)
        strips = _interpolate_pairs(interpolator, paired, folder, runtime)
        # the asymmetric strips begin with images A and B, the symmetric one begins and ends with their inversions
        errors = [
            (strip[image][0] - strip["symmetric"][end]).square().mean().sqrt()
            for strip in strips
            for image, end in (("asymmetric_1", 0), ("asymmetric_2", -1))
        ]
        about: dict[str, Any] = {
            "source": images.name,
            "pairs": [list(keys) for keys in zip(paired.keys[::2], paired.keys[1::2], strict=True)],
            "model": network.content_hash,
            "solver": solver,
            "steps": None if is_adaptive(solver) else steps,
            "levels": list(interpolator.levels),
            "seed": seed,
            "precision": resolved_precision,
            "reconstruction_error": float(torch.stack(errors).mean()),
        }
        store.write_config(folder, KIND, about)
        urls = [{name: [png_data_url(image) for image in strip[name]] for name in _STRIPS} for strip in strips]
        page = render_template("interpolation_page.html", about=about, strips=urls, versions=store.versions())
        (folder / "page.html").write_text(page, encoding="utf-8")
    return InterpolatedFolder(
        expand_path(out), pairs, pairs * images_between * len(_STRIPS), about["reconstruction_error"]
    )


def _interpolate_pairs(
    interpolator: Interpolator, paired: ImageSource, folder: Path, runtime: Runtime
) -> list[dict[str, Tensor]]:
    """Interpolate between images 0 and 1, 2 and 3, … and save the images between the ends.

    Returns the images (S, C, H, W) of each pair by the name of the strip, ends included.
    """
    strips: list[dict[str, Tensor]] = []
    prepared = interpolator.model.preprocessing
    rows_per_image = len(interpolator.levels)
    pairs = max(1, runtime.images_per_batch((prepared.channels, *prepared.size), rows_per_image) // 2)
    with progress.task("interpolating", len(paired) // 2, unit="pairs", item="pairs") as bar:
        for batch in iterate_batches(paired, prepared, 2 * pairs, workers=runtime.workers):
            found = interpolator(batch.images[::2], batch.images[1::2])
            for images in zip(found.first, found.second, found.symmetric, strict=True):
                strip = dict(zip(_STRIPS, images, strict=True))
                for name, values in strip.items():
                    for number, image in enumerate(values[1:-1], start=1):
                        save_png(image, folder / name / f"{len(strips):03d}-{number:02d}.png", folder / ".working")
                strips.append(strip)
                bar.advance()
    return strips
