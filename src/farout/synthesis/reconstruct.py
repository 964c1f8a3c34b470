"""Images that a generator has made again: part of the way to noise, and back, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from farout.core.chunking import blocks_with
from farout.core.devices import join_processes
from farout.core.errors import FaroutError, SourceError
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import batches
from farout.data.classes import class_numbers, names_of
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.diffusion import diffusers_folders as folders
from farout.diffusion.image_to_image import BackSpacing, RoundTrip
from farout.diffusion.model import DiffusionModel
from farout.synthesis.base import identity
from farout.synthesis.outlier_folder import ReconstructedFolder
from farout.synthesis.writer import ImageWriter

__all__ = ["ReconstructedFolder", "reconstruct"]


def reconstruct(
    images: Any,
    diffusion: DiffusionModel | str | Path,
    out: str | Path,
    *,
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
    runtime: Runtime | None = None,
) -> ReconstructedFolder:
    """Sends every image of a source through a generator and back into `out` (see `RoundTrip`), the same for any batch.

    Started under `accelerate launch` or `torchrun`, several processes, one device each, share the images. The manifest
    (see `MadeFolder.manifest`) says of each also level and source_hash, the content hash of what it was.

    For two uses. A classifier that learns from outliers of a generator learns from these too, as images of their
    classes: then being generated is not what tells outliers apart (`train_classifier(…, reconstructions=out)`). And a
    detector that tells test images from their own round trips sees a generator's traces, not what an image shows: its
    AUROC of the two should be near one half, or no further from it than that of the same detector whose classifier has
    learnt from no outliers. For a weak generator loses some of what an image shows, which anyone may see; `fid` and a
    classifier's accuracy on the folder tell how much.

    Args:
        images: any source; labels are kept.
        diffusion: a `DiffusionModel` or its folder. An original Stable Diffusion folder is told the images' classes by
            the prompts "An image of a …"; for others give what `DiffusionModel.load(folder, class_names=…, prompts=…)`
            loads.
        out: the folder.
        level, highest, classes, solver, steps, spacing, seed: see `RoundTrip`.
        resume: go on where an earlier run in `out` stopped.
        limit: a seeded sample of this many images.
        policy: what becomes of an unreadable image: raise, or skip.
        runtime: how networks are run; None: `Runtime()`.

    Raises:
        FaroutError: for settings that cannot work.
        SourceError: for images without labels, or of a class that the generator does not know, where they are to be
            denoised under their classes.
        StoreError: where `out` holds something else, reconstructions and `resume` is not set, or reconstructions that
            were made with other settings, which are listed.
    """
    resolved = (runtime or Runtime()).resolved()
    processes = join_processes(resolved.device)
    source = open_source(images, policy=policy, limit=limit, seed=seed)
    model = _loaded(diffusion, source).to(resolved.device)
    precision: Any = resolved.precision  # resolved, so not `auto`
    trip = RoundTrip(model, level, highest, classes, solver, steps, spacing, seed, resolved.batch_size, precision)
    names, labels = _classes(source, trip)
    writer = ImageWriter(out, names, seed, ReconstructedFolder.kind, processes)
    about = {"source": source.name, "images": len(source), "class_names": list(names)}
    writer.begin(_settings(source, labels, trip, resolved), about, resume=resume)
    made = _write(source, labels, trip, writer, resolved)
    return ReconstructedFolder(Path(out), writer.images, len(source), made)


def _loaded(given: DiffusionModel | str | Path, source: ImageSource) -> DiffusionModel:
    """The model; a Stable Diffusion folder is told the classes of the images, or one that nobody asks for."""
    if not isinstance(given, str | Path):
        return given
    folder = folders.local(given)
    names = (names_of(source) or ("image",)) if folders.wants_prompts(folder) else None
    return DiffusionModel.load(folder, class_names=names)


def _classes(source: ImageSource, trip: RoundTrip) -> tuple[tuple[str, ...], Tensor | None]:
    """Names, and the number of each image's class: the generator's where it is told them, else the source's own."""
    conditioning = trip.model.conditioning
    if conditioning is not None and trip.told_classes:
        if source.labels is None:
            raise SourceError(
                f"{source.name} has no labels, and each image is denoised under its class; give a class-per-folder "
                "tree or a table with labels, or turn classes off (--no-classes, classes=False)"
            )
        names = tuple(conditioning.class_names)
    else:
        names = names_of(source)
    return names, None if source.labels is None else class_numbers(source, names)


def _settings(source: ImageSource, labels: Tensor | None, trip: RoundTrip, runtime: Runtime) -> dict[str, Any]:
    """All that decides the images."""
    known = torch.empty(0, dtype=torch.int64) if labels is None else labels
    same = identity(source, known, trip.model, runtime)
    return {"method": "reconstruct", "config": trip.settings, "seed": trip.seed, **same}


def _write(source: ImageSource, labels: Tensor | None, trip: RoundTrip, writer: ImageWriter, runtime: Runtime) -> int:
    prepared, made = trip.model.preprocessing, 0
    size = runtime.images_per_batch((prepared.channels, *prepared.size))
    missing = set(writer.missing(len(source)))
    planned = [
        place
        for block in writer.processes.split_between_processes(blocks_with(missing, size, len(source)))
        for place in block
    ]
    with writer, task(f"reconstructions into {writer.folder}", len(planned)) as bar:
        for batch in batches(source.subset(planned), prepared, size, workers=runtime.workers):
            places = [planned[place] for place in batch.indices]
            if missing.intersection(places):
                numbers = None if labels is None else labels[places].tolist()
                again = trip(batch.images, batch.identities, numbers)
                if not bool(torch.isfinite(again).all()):
                    raise FaroutError("some reconstructions are not numbers; use precision fp32, or a lower level")
                hashes = [source.content_hash(place) for place in places]
                columns: dict[str, Sequence[Any]] = {"level": trip.levels(batch.identities), "source_hash": hashes}
                writer.write(places, numbers, again, batch.keys, columns)
                made += len(missing.intersection(places))
            bar.advance(len(batch.keys))
        writer.finish()
    return sum(writer.processes.gather_objects(made))
