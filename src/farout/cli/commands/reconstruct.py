"""`farout reconstruct`."""

from __future__ import annotations

from typing import Literal

from farout.cli.output import print_existing
from farout.cli.terminal import print_text
from farout.core.runtime import Runtime
from farout.diffusion.image_to_image import DenoisingSpacing
from farout.synthesis.reconstruct import ReconstructedFolder
from farout.synthesis.reconstruct import reconstruct as reconstruct_images

__all__ = ["print_reconstructed_folder", "reconstruct"]


def reconstruct(
    source: str,
    *,
    diffusion: str,
    out: str,
    level: float = 0.5,
    max_level: float | None = None,
    classes: bool = True,
    solver: str = "dpm_solver_2m",
    steps: int | None = None,
    spacing: DenoisingSpacing = "even",
    seed: int = 0,
    resume: bool = False,
    limit: int | None = None,
    policy: Literal["raise", "skip"] = "raise",
    runtime: Runtime,
) -> ReconstructedFolder:
    """Reconstruct images by image-to-image: add noise and denoise.

    `accelerate launch -m farout reconstruct …` shares the images among several processes, one device each.

    Args:
        source: images: a named set, folder, glob, file, URL, or hf://owner/name:split; labels are kept.
        diffusion: folder of a diffusion model or of Stable Diffusion, or hf://owner/name.
        out: folder of the images, one folder per class.
        level: noise level as a share of the schedule, 0 to 1; 0: the autoencoder's reconstruction only.
        max_level: draw a noise level per image, between `level` and this one; default: always `level`.
        classes: denoise each image under its class, if the model is class-conditional.
        solver: one of `ddim`, `heun`, `dpm_solver_2m`, `unipc`, `plms`, `pndm2`, `pndm4`, `ndm1`, `ndm4` or
            `probability_flow`.
        steps: number of denoising steps; default: 10 (probability_flow chooses its own).
        spacing: spacing of the steps: `even` (even in t) or `geometric` (even in log sigma).
        seed: seed of the level and noise of each image, together with its key.
        resume: continue an interrupted run in the folder.
        limit: use a seeded random sample of this many images; default: all.
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        runtime: how networks are run.
    """
    return reconstruct_images(
        source,
        diffusion,
        out,
        level=level,
        max_level=max_level,
        classes=classes,
        solver=solver,
        steps=steps,
        spacing=spacing,
        seed=seed,
        resume=resume,
        limit=limit,
        policy=policy,
        runtime=runtime,
    )


def print_reconstructed_folder(result: ReconstructedFolder) -> None:
    """Prints the number of reconstructions and the paths."""
    requested = f", {result.requested} requested" if result.images != result.requested else ""
    print_text(f"{result.images} reconstructions, {result.generated} new{requested}")
    print_existing(result.folder, "images", "manifest.csv", "page.html")
