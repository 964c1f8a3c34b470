"""Commands that make images with a diffusion model: signatures are the flags."""

from __future__ import annotations

from typing import Any, Literal

from farout.classifiers.model import Classifier
from farout.core.chunking import BatchSize
from farout.core.devices import PrecisionChoice, is_main_process, resolve_device, resolve_precision
from farout.core.runtime import Runtime
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.diffusion.image_to_image import DenoisingSpacing
from farout.diffusion.model import DiffusionModel
from farout.diffusion.sample_folder import SampledFolder, write_samples
from farout.diffusion.sampling import Sampler, Spacing, parse_class_labels
from farout.report.outlier_page import write_outlier_page
from farout.synthesis import SYNTHESIZERS
from farout.synthesis.base import OutlierFolder, Synthesizer
from farout.synthesis.quality import has_source_images, measure_quality, write_quality
from farout.synthesis.reconstruct import ReconstructedFolder
from farout.synthesis.reconstruct import reconstruct as _reconstruct

__all__ = ["reconstruct", "sample", "synthesize"]


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
    batch_size: BatchSize = "auto",
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    clamp: bool = True,
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
        spacing: spacing of the steps: `grid` (even in t), `geometric` (even in log sigma) or `leading` (even in t from
            1 up, as for Stable Diffusion: 981, …, 21, 1).
        seed: seed of the noise; an image depends only on it and on its own number.
        grid: also write OUT-grid.png, a grid of some of the images.
        batch_size: maximum number of images processed together and of rows per network call; `auto`: set by memory.
        device: device of the network: `auto` (CUDA if present, else CPU), `cpu`, `cuda`, `cuda:1`, `mps`.
        precision: precision of the network: `fp32`, `bf16`, `fp16`, or `auto` (bf16 if the device supports it natively,
            else fp32).
        clamp: clamp the estimated clean image to the valid pixel range at every step (not for latents).
    """
    where = resolve_device(device)
    network = DiffusionModel.load(model).to(where)
    chosen = parse_class_labels(network, classes) if classes else None
    exact = resolve_precision(precision, where)
    sampler = Sampler(network, solver, steps, spacing, guidance, seed, batch_size, exact, clamp)
    return write_samples(sampler, out, count, classes=chosen, grid=grid)


def synthesize(
    method: str,
    source: str,
    *,
    diffusion: str,
    out: str,
    classifier: str | None = None,
    count: int = 1000,
    seed: int = 0,
    resume: bool = False,
    stage: str | None = None,
    limit: int | None = None,
    policy: Literal["raise", "skip"] = "raise",
    preset: str | None = None,
    runtime: Runtime,
    arguments: dict[str, Any],
) -> OutlierFolder:
    """Generate synthetic outliers from labelled images with a diffusion model.

    `accelerate launch -m farout synthesize …` shares the images among several processes, one device each.

    Args:
        method: name of the synthesizer, see `farout list synthesizers`.
        source: labelled images: a named set, folder, glob, file, or hf://owner/name:split.
        diffusion: folder of a class-conditional diffusion model or of Stable Diffusion, or hf://owner/name.
        out: folder of the outliers.
        classifier: folder of a separately trained classifier, to check the classes of the generator's samples and of
            outliers edited from images.
        count: number of outliers, over all classes.
        seed: seed of all random choices.
        resume: continue an interrupted run in the folder; a larger count adds outliers.
        stage: last stage to run: `embed`, `manifold`, `draw` or `decode` (ncis); `align`, `draw` or `decode`
            (dream_ood); default: all.
        limit: use a seeded random sample of this many images; default: all.
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        preset: preset that `arguments` started from.
        runtime: how networks are run.
        arguments: settings of the method.
    """
    made: Synthesizer = SYNTHESIZERS[method].load()(**arguments)
    made.provenance["preset"] = preset or ""
    images = open_source(source, limit=limit, seed=seed, policy=policy)
    found = made.synthesize(
        images,
        out,
        count=count,
        diffusion=diffusion,
        classifier=classifier,
        seed=seed,
        resume=resume,
        stage=stage,
        policy=policy,
        runtime=runtime,
    )
    if is_main_process():
        _write_page(found, images, classifier, runtime)
    return found


def _write_page(found: OutlierFolder, images: ImageSource, classifier: str | None, runtime: Runtime) -> None:
    """The page, with what a classifier says of outliers that were made of images."""
    rated = None
    if classifier is not None and has_source_images(found):
        judge = Classifier.load(classifier).to(resolve_device(runtime.device))
        rated = measure_quality(found, images, judge, runtime)
    write_quality(rated, found)
    write_outlier_page(found, images, rated)


def reconstruct(
    source: str,
    *,
    diffusion: str,
    out: str,
    level: float = 0.5,
    highest: float | None = None,
    classes: bool = True,
    solver: str = "dpm_solver_2m",
    steps: int | None = None,
    spacing: DenoisingSpacing = "grid",
    seed: int = 0,
    resume: bool = False,
    limit: int | None = None,
    policy: Literal["raise", "skip"] = "raise",
    runtime: Runtime,
) -> ReconstructedFolder:
    """Reconstruct images by image-to-image: add noise and denoise.

    `accelerate launch -m farout reconstruct …` shares the images among several processes, one device each.

    Args:
        source: images: a named set, folder, glob, file, or hf://owner/name:split; labels are kept.
        diffusion: folder of a diffusion model or of Stable Diffusion, or hf://owner/name.
        out: folder of the images, one folder per class.
        level: noise level as a share of the schedule, 0 to 1; 0: the autoencoder's reconstruction only.
        highest: draw a noise level per image, between `level` and this one; default: always `level`.
        classes: denoise each image under its class, if the model is class-conditional.
        solver: one of `ddim`, `heun`, `dpm_solver_2m`, `unipc`, `plms`, `pndm2`, `pndm4`, `ndm1`, `ndm4` or
            `probability_flow`.
        steps: number of denoising steps; default: 10 (probability_flow chooses its own).
        spacing: spacing of the steps: `grid` (even in t) or `geometric` (even in log sigma).
        seed: seed of the level and noise of each image, together with its key.
        resume: continue an interrupted run in the folder.
        limit: use a seeded random sample of this many images; default: all.
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        runtime: how networks are run.
    """
    return _reconstruct(
        source,
        diffusion,
        out,
        level=level,
        highest=highest,
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
