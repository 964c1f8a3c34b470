"""`farout synthesize`."""

from __future__ import annotations

from typing import Any, Literal

from farout.classifiers.model import Classifier
from farout.cli.output import print_existing
from farout.cli.terminal import print_text
from farout.core.devices import is_main_process, resolve_device
from farout.core.runtime import Runtime
from farout.data.sources import open_source
from farout.report.outlier_page import write_outlier_page
from farout.synthesis import SYNTHESIZERS
from farout.synthesis.base import OutlierFolder, Synthesizer
from farout.synthesis.quality import has_source_images, measure_quality, write_quality

__all__ = ["print_outlier_folder", "synthesize"]


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
    arguments: dict[str, Any],
    runtime: Runtime,
) -> OutlierFolder:
    """Generate synthetic outliers from labelled images with a diffusion model.

    `accelerate launch -m farout synthesize …` shares the images among several processes, one device each.

    Args:
        method: name of the synthesizer, see `farout list synthesizers`.
        source: labelled images: a named set, folder, glob, file, URL, or hf://owner/name:split.
        diffusion: folder of a class-conditional diffusion model or of Stable Diffusion, or hf://owner/name.
        out: folder of the outliers.
        classifier: folder of a separately trained classifier, to check the classes of the generator's samples and of
            outliers edited from images.
        count: number of outliers, over all classes.
        seed: seed of all random choices.
        resume: continue an interrupted run in the folder; a larger count adds outliers.
        stage: last stage to run: `embed`, `manifold`, `sample` or `decode` (ncis); `align`, `sample` or `decode`
            (dream_ood); default: all.
        limit: use a seeded random sample of this many images; default: all.
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        preset: preset that `arguments` started from.
        arguments: settings of the method.
        runtime: how networks are run.
    """
    synthesizer: Synthesizer = SYNTHESIZERS[method].load()(**arguments)
    synthesizer.provenance["preset"] = preset or ""
    images = open_source(source, limit=limit, seed=seed, policy=policy)
    outliers = synthesizer.synthesize(
        images,
        out,
        count=count,
        diffusion=diffusion,
        classifier=classifier,
        seed=seed,
        resume=resume,
        stage=stage,
        runtime=runtime,
    )
    if is_main_process():
        quality = None
        if classifier is not None and has_source_images(outliers):
            network = Classifier.load(classifier).to(resolve_device(runtime.device))
            quality = measure_quality(outliers, images, network, runtime)
        write_quality(quality, outliers)
        write_outlier_page(outliers, images, quality)
    return outliers


def print_outlier_folder(outliers: OutlierFolder) -> None:
    """Prints the number of outliers and the paths."""
    requested = f", {outliers.requested} requested" if outliers.images != outliers.requested else ""
    print_text(f"{outliers.images} outliers, {outliers.generated} new{requested}")
    print_existing(outliers.folder, "images", "reconstructions", "manifest.csv", "quality.csv", "page.html")
