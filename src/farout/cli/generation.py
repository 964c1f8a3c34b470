"""Commands that make images with a diffusion model, and compare them: signatures are the flags."""

from __future__ import annotations

from typing import Literal

from farout.devices import resolve_device, resolve_precision
from farout.diffusion.model import DiffusionModel
from farout.diffusion.sample_folder import SampledFolder, write_samples
from farout.diffusion.sampling import Sampler, Spacing, choose_classes

__all__ = ["sample"]

Precisions = Literal["auto", "fp32", "bf16", "fp16"]


def sample(
    model: str,
    *,
    out: str,
    count: int = 64,
    classes: tuple[str, ...] = (),
    guidance: float = 1.0,
    solver: str = "dpm_solver_2m",
    steps: int | None = None,
    spacing: Spacing = "grid",
    seed: int = 0,
    grid: bool = False,
    batch: int = 64,
    rows: int = 32,
    device: str = "auto",
    precision: Precisions = "auto",
) -> SampledFolder:
    """Make images with a diffusion model.

    Args:
        model: folder of a diffusion model, or hf://owner/name.
        out: folder of the images, class by class; an interrupted run goes on there.
        count: number of images, all classes together.
        classes: names or numbers of classes, such as a,b, or all; for class-conditional models.
        guidance: weight s of null + s (conditional - null); 1 is conditional, above it truer to the class.
        solver: ddim, heun, dpm_solver_2m, unipc, plms, pndm2, pndm4, ndm1, ndm4 or probability_flow.
        steps: steps from noise to image; without it 20, or as many as probability_flow finds.
        spacing: where the steps lie: grid (evenly in t) or geometric (evenly in log sigma).
        seed: every image is made from the seed and its own number.
        grid: also write OUT-grid.png, a picture of some of the images.
        batch: images made at once.
        rows: rows of one network call.
        device: auto, cpu, cuda, cuda:1, …
        precision: precision of the network; auto is bf16 where the device computes in it natively, else fp32.
    """
    where = resolve_device(device)
    network = DiffusionModel.load(model).to(where)
    chosen = choose_classes(network, classes) if classes else None
    exact = resolve_precision(precision, where)
    sampler = Sampler(network, solver, steps, spacing, guidance, seed, rows, exact)
    return write_samples(sampler, out, count, classes=chosen, batch=batch, grid=grid)
