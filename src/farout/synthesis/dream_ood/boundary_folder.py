"""Points beyond the boundaries of classes on disk: a file a class, which grows by whole rounds."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from farout.core import store
from farout.core.errors import StoreError
from farout.synthesis.dream_ood.boundary import ClassBoundary

__all__ = ["COLUMNS", "extend_drawn", "read_drawn"]

COLUMNS = ("distance", "boundary_distance", "cosine")
"""What is told of every point: the distance to its k-th nearest image of the class, that of the image that it was drawn
around to its own, and the cosine with the class vector."""
_NAMES = {"vectors", "index", "known", *COLUMNS}


def extend_drawn(folder: Path, boundary: ClassBoundary, index: Tensor, anchor: Tensor, wanted: int) -> None:
    """Draws as many rounds of a class as are missing from its file `<label>.safetensors` for `wanted` points.

    The file holds vectors (M, D), with the length of the class vector; index (M,), places in the source of the images
    that they were drawn around; `COLUMNS` (M,); and known (N,), the distances of the class's own images.

    Args:
        folder: of the files.
        boundary: of the class.
        index: places of its images in the source, int64 (N,).
        anchor: its class vector (D,).
        wanted: number of points.
    """
    path = folder / f"{boundary.label:05d}.safetensors"
    there = _read(path) if path.is_file() else None
    size = boundary.sampling.per_round(len(boundary.features))
    done = 0 if there is None else len(there["vectors"]) // size
    rounds = [_round(boundary, number, index, anchor) for number in range(done, math.ceil(wanted / size))]
    if rounds:
        parts = rounds if there is None else [there, *rounds]
        whole = {name: torch.cat([part[name] for part in parts]) for name in rounds[0]}
        store.save_tensors(path, {**whole, "known": boundary.distances})


def _round(boundary: ClassBoundary, number: int, index: Tensor, anchor: Tensor) -> dict[str, Tensor]:
    drawn = boundary.draw(number)
    vectors, around = drawn.vectors.cpu(), drawn.around.cpu()
    length = anchor.norm()
    return {
        "vectors": length * vectors,
        "index": index[around],
        "distance": drawn.distance.cpu(),
        "boundary_distance": boundary.distances.cpu()[around],
        "cosine": vectors @ (anchor / length),
    }


def read_drawn(folder: str | Path) -> dict[int, dict[str, Tensor]]:
    """What `extend_drawn` has written, by label; raises StoreError for files that are cut short or something else."""
    return {int(path.stem): _read(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def _read(path: Path) -> dict[str, Tensor]:
    found = store.load_tensors(path)
    if set(found) != _NAMES:
        raise StoreError(f"{path} holds no drawn points; remove it and draw them again")
    return found
