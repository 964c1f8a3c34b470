"""Commands that make images with a diffusion model: signatures are the flags."""

from __future__ import annotations

from typing import Any, Literal

from farout.classifiers.model import Classifier
from farout.core.chunking import BatchSize
from farout.core.devices import PrecisionChoice, first_process, resolve_device, resolve_precision
from farout.core.runtime import Runtime
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.diffusion.image_to_image import BackSpacing
from farout.diffusion.model import DiffusionModel
from farout.diffusion.sample_folder import SampledFolder, write_samples
from farout.diffusion.sampling import Sampler, Spacing, choose_classes
from farout.report.outlier_page import write_outlier_page
from farout.synthesis import SYNTHESIZERS
from farout.synthesis.base import OutlierFolder, Synthesizer
from farout.synthesis.quality import is_made_of_images, rate_outliers, write_quality
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
    """Make images with a diffusion model.

    Args:
        model: folder of a diffusion model, or hf://owner/name.
        out: folder of the images, class by class; an interrupted run goes on there.
        count: number of images, all classes together.
        classes: names or numbers of classes, such as a,b, or all; for class-conditional models.
        guidance: weight of the class: 0 is none, 1 conditional, 3 the paper's omega of 2.
        solver: ddim, heun, dpm_solver_2m, unipc, plms, pndm2, pndm4, ndm1, ndm4 or probability_flow.
        steps: steps from noise to image; without it 20, or as many as probability_flow finds.
        spacing: where the steps lie: grid (evenly in t), geometric (evenly in log sigma) or leading (evenly in t from 1
            up, as Stable Diffusion is used: 981, ..., 21, 1).
        seed: every image is made from the seed and its own number.
        grid: also write OUT-grid.png, a picture of some of the images.
        batch_size: the most images sampled together, and rows of one network call; auto: by memory.
        device: auto, cpu, cuda, cuda:1, …
        precision: precision of the network; auto is bf16 where the device computes in it natively, else fp32.
        clamp: keep every estimate of the clean image within what images can be, where the model works on pixels.
    """
    where = resolve_device(device)
    network = DiffusionModel.load(model).to(where)
    chosen = choose_classes(network, classes) if classes else None
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
    """Make outliers from labelled images, with a diffusion model.

    `accelerate launch -m farout synthesize …` shares the images among several processes, one device each.

    Args:
        method: the synthesizer's name, see `farout list synthesizers`.
        source: labelled images: a set's name, a folder, a glob, a file, or hf://owner/name:split.
        diffusion: folder of a class-conditional diffusion model, an original Stable Diffusion folder, or
            hf://owner/name.
        out: folder of the outliers.
        classifier: folder of a classifier trained apart: says whether the generator's own samples are of their classes,
            and of outliers made of images whether they still are.
        count: number of outliers, all classes together.
        seed: seed of everything.
        resume: go on where an earlier run in the folder stopped; a larger count adds outliers.
        stage: the last stage to do; without it all.
        limit: a seeded sample of this many images of the source.
        policy: what becomes of an unreadable image: raise, or skip.
        preset: the method's preset that `arguments` started from.
        runtime: how networks are run.
        arguments: the method's own settings.
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
    if first_process():
        _write_page(found, images, classifier, runtime)
    return found


def _write_page(found: OutlierFolder, images: ImageSource, classifier: str | None, runtime: Runtime) -> None:
    """The page, with what a classifier says of outliers that were made of images."""
    rated = None
    if classifier is not None and is_made_of_images(found):
        judge = Classifier.load(classifier).to(resolve_device(runtime.device))
        rated = rate_outliers(found, images, judge, runtime)
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
    spacing: BackSpacing = "grid",
    seed: int = 0,
    resume: bool = False,
    limit: int | None = None,
    policy: Literal["raise", "skip"] = "raise",
    runtime: Runtime,
) -> ReconstructedFolder:
    """Make images again with a diffusion model: part of the way to noise, and back.

    `accelerate launch -m farout reconstruct …` shares the images among several processes, one device each.

    Args:
        source: images: a set's name, a folder, a glob, a file, or hf://owner/name:split; labels are kept.
        diffusion: folder of a diffusion model, an original Stable Diffusion folder, or hf://owner/name.
        out: folder of the images, class by class.
        level: how far images go, as a share of the way to noise; 0 is an autoencoder's round trip alone.
        highest: draws a level for each image, between level and this one.
        classes: denoise each image under its class, where the model is told classes.
        solver: ddim, heun, dpm_solver_2m, unipc, plms, pndm2, pndm4, ndm1, ndm4 or probability_flow.
        steps: steps back; without it 10, or as many as probability_flow finds.
        spacing: where the steps lie: grid (evenly in t) or geometric (evenly in log sigma).
        seed: level and noise of an image are drawn from the seed and its key.
        resume: go on where an earlier run in the folder stopped.
        limit: a seeded sample of this many images of the source.
        policy: what becomes of an unreadable image: raise, or skip.
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
