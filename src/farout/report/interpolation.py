"""A folder of interpolations: their pictures by kind, and a page to look at."""

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
from farout.core.runtime import Runtime
from farout.data.batching import batches
from farout.data.decoding import save_png
from farout.data.image_source import ImageSource
from farout.data.sources import Images, open_source
from farout.diffusion.interpolation import Interpolations, Interpolator
from farout.diffusion.model import DiffusionModel
from farout.diffusion.solvers.registry import is_adaptive
from farout.report.rendering import png_address, render

__all__ = ["KIND", "InterpolatedFolder", "write_interpolations"]

KIND = "interpolations"
_KINDS = ("asymmetric_1", "asymmetric_2", "symmetric")


@dataclass(frozen=True)
class InterpolatedFolder:
    """What `write_interpolations` did. images: pictures written; round_trip: root mean square difference of an image
    and its decoded inversion, values in [0, 1], mean over all images.
    """

    folder: Path
    pairs: int
    images: int
    round_trip: float


def write_interpolations(
    model: DiffusionModel | str | Path,
    source: Images,
    out: str | Path,
    *,
    pairs: int = 8,
    solver: str = "pndm4",
    steps: int = 50,
    stations: int = 9,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    device: str = "auto",
    precision: PrecisionChoice = "fp32",
    workers: int = 2,
) -> InterpolatedFolder:
    """Interpolate between pairs of images with a diffusion model: images and an HTML page.

    Writes `asymmetric_1/`, `asymmetric_2/` and `symmetric/` with `PPP-SS.png` (pair, station; ends left out),
    `config.json`, and `page.html`, one file without outside requests; see `Interpolator`. An older folder of
    interpolations is replaced when all is done. A model, given in place of its folder, is used where it lies.

    Args:
        model: folder of a diffusion model, or hf://owner/name; a class-conditional one is used without classes.
        source: images: a named set, folder, glob, file, or hf://owner/name:split.
        out: folder of the images and the page.
        pairs: number of pairs, drawn at random from the source.
        solver: one of `ddim`, `heun`, `dpm_solver_2m`, `unipc`, `plms`, `pndm2`, `pndm4`, `ndm1`, `ndm4` or
            `probability_flow`.
        steps: number of steps of the inversion, and of the denoising.
        stations: number of images between the two ends.
        seed: seed of the choice of images.
        batch_size: maximum number of images processed together and of rows per network call; `auto`: set by memory.
        device: device of the network: `auto` (CUDA if present, else CPU), `cpu`, `cuda`, `cuda:1`, `mps`.
        precision: precision of the network; fp32 is recommended, since inversion is sensitive to rounding.
        workers: number of threads that decode images.

    Raises:
        FaroutError: for settings that do not go together.
        SourceError: for fewer images than the pairs want.
        StoreError: where `out` holds something else.
    """
    if pairs < 1:
        raise FaroutError(f"pairs must be 1 or more, got {pairs}")
    store.check_replaceable(out, KIND)
    network = model if isinstance(model, DiffusionModel) else DiffusionModel.load(model).to(resolve_device(device))
    exact = resolve_precision(precision, network.device)
    interpolator = Interpolator(network, solver, steps, stations, batch_size, exact)
    opened = open_source(source, limit=2 * pairs, seed=seed)
    if len(opened) < 2 * pairs:
        raise SourceError(f"{opened.name} has {len(opened)} images, {pairs} pairs require {2 * pairs}")
    drawn = opened.subset([place for pair in range(pairs) for place in (pair, pair + pairs)])
    with store.atomic_folder(out, KIND) as folder:
        runtime = Runtime(str(network.device), exact, batch_size, workers)
        found = _interpolated(interpolator, drawn, folder, runtime)
        keys = list(zip(drawn.keys[::2], drawn.keys[1::2], strict=True))
        error = _round_trip(found)
        about = {
            "source": opened.name,
            "pairs": [list(pair) for pair in keys],
            "model": network.content_hash,
            "solver": solver,
            "steps": None if is_adaptive(solver) else steps,
            "levels": list(interpolator.levels),
            "seed": seed,
            "precision": exact,
            "round_trip": error,
        }
        store.write_config(folder, KIND, about)
        (folder / "page.html").write_text(_page(about, keys, found), encoding="utf-8")
    return InterpolatedFolder(Path(out), pairs, pairs * stations * len(_KINDS), error)


def _interpolated(
    interpolator: Interpolator, drawn: ImageSource, folder: Path, runtime: Runtime
) -> list[Interpolations]:
    """Interpolations of every two images that follow one another, saved as they are made."""
    found: list[Interpolations] = []
    prepared, stations = interpolator.model.preprocessing, len(interpolator.levels)
    pairs = max(1, runtime.images_per_batch((prepared.channels, *prepared.size), stations) // 2)
    with progress.task("interpolating", len(drawn) // 2) as bar:
        for batch in batches(drawn, prepared, 2 * pairs, workers=runtime.workers):
            for images in _one_by_one(interpolator(batch.images[::2], batch.images[1::2])):
                _save(folder, len(found), images)
                found.append(images)
                bar.advance()
    return found


def _one_by_one(images: Interpolations) -> list[Interpolations]:
    parts = zip(images.first.split(1), images.second.split(1), images.symmetric.split(1), strict=True)
    return [Interpolations(*part) for part in parts]


def _kinds(images: Interpolations) -> dict[str, Tensor]:
    """The pictures of one pair, (S, C, H, W), by kind."""
    return dict(zip(_KINDS, (images.first[0], images.second[0], images.symmetric[0]), strict=True))


def _save(folder: Path, pair: int, images: Interpolations) -> None:
    for kind, stations in _kinds(images).items():
        for number, image in enumerate(stations[1:-1], start=1):
            save_png(image, folder / kind / f"{pair:03d}-{number:02d}.png", folder / ".working")


def _round_trip(found: list[Interpolations]) -> float:
    """Images A and B stand at station 0 of the asymmetric kinds; decoded inversions at the symmetric one's ends."""
    errors = [
        (images[0, 0] - decoded).square().mean().sqrt()
        for each in found
        for images, decoded in ((each.first, each.symmetric[0, 0]), (each.second, each.symmetric[0, -1]))
    ]
    return float(torch.stack(errors).mean())


def _page(about: dict[str, Any], keys: list[tuple[str, str]], found: list[Interpolations]) -> str:
    pairs = [
        {
            "first": pair[0],
            "second": pair[1],
            "kinds": {kind: [png_address(image) for image in stations] for kind, stations in _kinds(images).items()},
        }
        for pair, images in zip(keys, found, strict=True)
    ]
    return render("interpolations.html", about=about, pairs=pairs, versions=store.versions())
