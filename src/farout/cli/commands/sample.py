"""`farout sample`."""

from __future__ import annotations

from typing import cast

from farout.cli.terminal import print_text
from farout.core.devices import Precision
from farout.core.runtime import Runtime
from farout.diffusion.model import DiffusionModel
from farout.diffusion.sample_folder import SampledFolder, write_samples
from farout.diffusion.sampling import Sampler, Spacing, parse_class_labels

__all__ = ["print_sampled_folder", "sample"]


def sample(
    model: str,
    *,
    out: str,
    count: int = 64,
    classes: tuple[str, ...] = (),
    guidance: float = 1.0,
    solver: str = "dpm_solver_2m",
    steps: int | None = None,
    spacing: Spacing = "even",
    seed: int = 0,
    contact_sheet: bool = False,
    clamp: bool = True,
    runtime: Runtime,
) -> SampledFolder:
    """Generate images with a diffusion model.

    Args:
        model: folder of a diffusion model, or hf://owner/name.
        out: folder of the images, one folder per class; an interrupted run continues there.
        count: number of images, over all classes.
        classes: names or numbers of classes, such as a,b, or `all`; for class-conditional models only.
        guidance: scale of classifier-free guidance; 0: unconditional, 1: conditional, 3: the paper's omega of 2.
        solver: one of `ddim`, `heun`, `dpm_solver_2m`, `unipc`, `plms`, `pndm2`, `pndm4`, `ndm1`, `ndm4` or
            `probability_flow`.
        steps: number of solver steps from noise to image; default: 20 (probability_flow chooses its own).
        spacing: spacing of the steps: `even` (even in t), `geometric` (even in log sigma) or `leading` (even in t from
            1 up, as for Stable Diffusion: 981, …, 21, 1).
        seed: seed of the noise; each image depends only on the seed and on its own number.
        contact_sheet: also write OUT-contact-sheet.png, a picture of some of the images, one row per class.
        clamp: clamp the estimated clean image to the valid pixel range at every step (not for latents).
        runtime: how the network is run.
    """
    runtime = runtime.resolve_auto()
    precision = cast("Precision", runtime.precision)  # `auto` is resolved
    network = DiffusionModel.load(model).to(runtime.device)
    sampler = Sampler(network, solver, steps, spacing, guidance, seed, runtime.batch_size, precision, clamp)
    chosen = parse_class_labels(network, classes) if classes else None
    return write_samples(sampler, out, count, classes=chosen, contact_sheet=contact_sheet)


def print_sampled_folder(result: SampledFolder) -> None:
    """Prints the number of images and the paths."""
    earlier = ""
    if result.images > result.requested:
        earlier = f", {result.requested} requested: the folder has more images from an earlier run"
    print_text(f"{result.images} images, {result.new} new{earlier}")
    for path in filter(None, (result.folder, result.contact_sheet)):
        print_text(f"  {path}")
