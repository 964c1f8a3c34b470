"""Reconstruct all images of a source by image-to-image: noise them part of the way and denoise them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from farout.core.chunking import blocks_containing
from farout.core.devices import join_processes
from farout.core.errors import FaroutError, SourceError
from farout.core.names import expand_path
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import iterate_batches
from farout.data.classes import encode_classes, present_class_names
from farout.data.sources import open_source
from farout.diffusion import diffusers_folders as folders
from farout.diffusion.image_to_image import DenoisingSpacing, ImageToImage
from farout.diffusion.model import DiffusionModel
from farout.synthesis.base import describe_inputs
from farout.synthesis.generated_folder import ReconstructedFolder
from farout.synthesis.writer import ImageWriter

__all__ = ["ReconstructedFolder", "reconstruct"]


def reconstruct(
    images: Any,
    diffusion: DiffusionModel | str | Path,
    out: str | Path,
    *,
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
    runtime: Runtime | None = None,
) -> ReconstructedFolder:
    """Reconstruct every image of a source with a generator (see `ImageToImage`) into `out`, whatever the batch size.

    Under `accelerate launch` or `torchrun`, several processes with one device each share the images. The manifest (see
    `GeneratedFolder.manifest`) also has the columns `level` and `source_hash`, the content hash of the source image.

    Reconstructions have two uses. A classifier that is trained with generated outliers is also trained with
    reconstructions as images of their classes: then it cannot recognize outliers by the generator's artifacts alone
    (`train_classifier(…, reconstructions=out)`). And a detector that separates test images from their own
    reconstructions reacts to such artifacts, not to image content: its AUROC should be near one half, or no farther
    from it than that of the same detector with a classifier trained without outliers. A weak generator also changes
    image content, which any detector may notice; `fid` and a classifier's accuracy on the folder measure how much.

    Args:
        images: any source; labels are kept.
        diffusion: a `DiffusionModel` or its folder. An original Stable Diffusion folder gets the prompts "An image of a
            …" of the images' classes; for others give the model that `DiffusionModel.load(folder, class_names=…,
            prompts=…)` loads.
        out: the output folder.
        level: see `ImageToImage`.
        max_level: see `ImageToImage`.
        classes: see `ImageToImage`.
        solver: see `ImageToImage`.
        steps: see `ImageToImage`.
        spacing: see `ImageToImage`.
        seed: see `ImageToImage`.
        resume: continue an earlier run in `out`.
        limit: use a seeded sample of this many images.
        policy: treatment of unreadable images: raise an error, or skip them.
        runtime: device, precision and batch size; None: `Runtime()`.

    Raises:
        FaroutError: for settings that cannot work.
        SourceError: for images without labels, or of a class that the generator does not know, if they are to be
            denoised under their classes.
        StoreError: if `out` contains other files, contains reconstructions and `resume` is not set, or contains
            reconstructions that were generated with other settings, which the message lists.
    """
    runtime = (runtime or Runtime()).resolve_auto()
    processes = join_processes(runtime.device)
    source = open_source(images, policy=policy, limit=limit, seed=seed, require_range=False)
    if isinstance(diffusion, str | Path):
        folder = folders.local_folder(diffusion)
        # without class names, one prompt that is never used
        prompt_names = (present_class_names(source) or ("image",)) if folders.requires_class_names(folder) else None
        diffusion = DiffusionModel.load(folder, class_names=prompt_names)
    model = diffusion.to(runtime.device)
    source = source.with_value_range(model.preprocessing.value_range)
    precision: Any = runtime.precision  # resolved, so not `auto`
    reconstruction = ImageToImage(
        model, level, max_level, classes, solver, steps, spacing, seed, runtime.batch_size, precision
    )

    names = present_class_names(source)
    if model.conditioning is not None and reconstruction.uses_classes:
        if source.labels is None:
            raise SourceError(
                f"{source.name} has no labels, and each image is denoised under its class; give a class-per-folder "
                "tree or a table with labels, or turn classes off (--no-classes, classes=False)"
            )
        names = tuple(model.conditioning.class_names)
    labels = None if source.labels is None else encode_classes(source, names)
    writer = ImageWriter(out, names, seed, ReconstructedFolder.kind, processes)
    known_labels = torch.empty(0, dtype=torch.int64) if labels is None else labels
    settings = {
        "method": "reconstruct",
        "config": reconstruction.settings,
        "seed": seed,
        **describe_inputs(source, known_labels, model, runtime),
    }
    about = {"source": source.name, "images": len(source), "class_names": list(names)}
    writer.begin(settings, about, resume=resume)

    preprocessing, generated = model.preprocessing, 0
    size = runtime.images_per_batch((preprocessing.channels, *preprocessing.size))
    missing = set(writer.missing_indices(len(source)))
    # batches with fixed boundaries are computed whole, so that a resumed run writes the same bytes
    planned = [
        index
        for block in writer.processes.split_between_processes(blocks_containing(missing, size, len(source)))
        for index in block
    ]
    with writer, task(f"reconstructions into {writer.folder}", len(planned)) as bar:
        for batch in iterate_batches(source.subset(planned), preprocessing, size, workers=runtime.workers):
            indices = [planned[index] for index in batch.indices]
            if missing.intersection(indices):
                batch_labels = None if labels is None else labels[indices].tolist()
                reconstructed = reconstruction(batch.images, batch.identities, batch_labels)
                if not bool(torch.isfinite(reconstructed).all()):
                    raise FaroutError("some reconstructions are not numbers; use precision fp32, or a lower level")
                columns: dict[str, Sequence[Any]] = {
                    "level": reconstruction.image_levels(batch.identities),
                    "source_hash": [source.content_hash(index) for index in indices],
                }
                writer.write(indices, batch_labels, reconstructed, batch.keys, columns)
                generated += len(missing.intersection(indices))
            bar.advance(len(batch.keys))
        writer.finish()
    return ReconstructedFolder(
        expand_path(out), writer.num_images, len(source), sum(writer.processes.gather_objects(generated))
    )
