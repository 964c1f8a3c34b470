"""The boundary of a class of unit vectors, and samples beyond it: the sampling of Dream-OOD.

Du, Sun, Zhu and Li, "Dream the impossible: outlier imagination with diffusion models", NeurIPS 2023, arXiv 2309.13415,
after NPOS (Tao, Du, Zhu and Li, "Non-parametric outlier synthesis", ICLR 2023). The vectors of a class that are
farthest from their k-th nearest neighbor are its boundary. Gaussian noise is added to a boundary vector and the result
is projected back to the sphere; of these candidates those farthest from the class are kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from farout.core import store
from farout.core.errors import FaroutError, StoreError, TooFewImagesWarning, check_options
from farout.core.names import expand_path
from farout.diffusion.noise import seeded_generator

__all__ = [
    "SAMPLE_COLUMNS",
    "BoundaryConfig",
    "BoundarySamples",
    "ClassBoundary",
    "distance_to_kth_neighbor",
    "extend_samples",
    "read_samples",
    "select_candidates",
]

_MAX_COSINES = 2**24
"""Cosines that are in memory at the same time."""

SAMPLE_COLUMNS = ("distance", "boundary_distance", "cosine")
"""Stored for every sample: the distance to its k-th nearest image of the class, that of the boundary image that it was
sampled around, and its cosine with the class vector."""


@dataclass(frozen=True)
class BoundaryConfig:
    """Sampling beyond the class boundaries. Raises FaroutError for values out of range.

    Args:
        side: `outliers`: sample around the vectors farthest from their class and keep the farthest samples; `inliers`:
            around the nearest, and keep the nearest, for more images of the class.
        k: rank of the neighbor within the class that defines the distance, at most 60 % of the class's images;
            published: 300 of 500 (CIFAR-100) or of 1,000 (ImageNet); default: 60 %.
        select: boundary vectors per class; published: 50 of 500 (CIFAR-100), 200 of 1,000 (ImageNet), all for inliers;
            default: a tenth of the class's images.
        points: boundary vectors sampled around per round, chosen at random; published: 50.
        noise: expected length of the noise added to a unit vector, which turns it by about atan(noise); published: 1.94
            for CIFAR-100, 0.83 for ImageNet, 0.28 for inliers. In small generators 1.94 leaves little of the class.
        candidates: samples per boundary vector and round; published: 1,500.
        kept: samples kept per boundary vector; published: 2, for inliers 1.
        filter: samples kept: `corrected` (the farthest of each boundary vector, as the paper says) or `published` (as
            the released code, whose wrong indexing keeps nearly arbitrary ones).
    """

    side: Literal["outliers", "inliers"] = "outliers"
    k: int | None = None
    select: int | None = None
    points: int = 50
    noise: float = 0.83
    candidates: int = 300
    kept: int = 2
    filter: Literal["corrected", "published"] = "corrected"

    def __post_init__(self) -> None:
        rules = [
            ("side", self.side in ("outliers", "inliers"), "outliers or inliers"),
            ("filter", self.filter in ("corrected", "published"), "corrected or published"),
            ("k", self.k is None or self.k >= 1, "None, or 1 or more"),
            ("select", self.select is None or self.select >= 1, "None, or 1 or more"),
            *((name, getattr(self, name) >= 1, "1 or more") for name in ("points", "candidates", "kept")),
            ("kept", self.kept <= self.candidates, f"at most candidates ({self.candidates})"),
            ("noise", 0 < self.noise < math.inf, "a positive number"),
        ]
        check_options(self, "boundary's option", rules)

    @property
    def largest(self) -> bool:
        """Whether samples with large distances are kept, not those with small ones."""
        return self.side == "outliers"

    def neighbor_rank(self, count: int) -> int:
        """The k used in a class of `count` images, two or more."""
        upper_limit = max(1, 3 * count // 5)
        return upper_limit if self.k is None else min(self.k, upper_limit)

    def boundary_size(self, count: int) -> int:
        """Number of boundary vectors of a class of `count` images."""
        return max(1, count // 10) if self.select is None else min(self.select, count)

    def samples_per_round(self, count: int) -> int:
        """Number of samples of one round in a class of `count` images."""
        return self.kept * min(self.points, self.boundary_size(count))

    def check_class_sizes(self, counts: Sequence[int], names: Sequence[str]) -> None:
        """Raise FaroutError for a class without neighbors; warn about classes too small for `k` or `select`.

        Args:
            counts: images of each class.
            names: names of the classes.
        """
        smallest, name = min(zip(counts, names, strict=True))
        if smallest < 2:
            raise FaroutError(
                f"the class {name!r} has {smallest} readable image{'s' * (smallest != 1)}, and an image's neighbors "
                "are others of its class: give two or more, better some hundred, or leave the class out"
            )
        for option, value, used in (("k", self.k, self.neighbor_rank), ("select", self.select, self.boundary_size)):
            if value is not None and used(smallest) < value:
                too_small = sum(used(count) < value for count in counts)
                warnings.warn(
                    f"{too_small} of {len(counts)} classes are too small for {option} {value}; the smallest, {name!r} "
                    f"with {smallest} images, gets {used(smallest)}",
                    TooFewImagesWarning,
                    stacklevel=3,
                )


def distance_to_kth_neighbor(points: Tensor, bank: Tensor, k: int) -> Tensor:
    """Distance ||p - b_(k)|| of points (M, D) to the k-th nearest b of a bank (N, D), all of length 1: (M,).

    Exact search, in chunks of at most 16 million cosines. Raises FaroutError for different dimensions, and for k
    outside 1 to N.
    """
    if points.ndim != 2 or bank.ndim != 2 or points.shape[1] != bank.shape[1]:
        raise FaroutError(
            f"points and bank must have the shapes (M, D) and (N, D), got {tuple(points.shape)} and {tuple(bank.shape)}"
        )
    if not 1 <= k <= len(bank):
        raise FaroutError(f"there is no neighbor number {k} among {len(bank)} vectors")
    distances = []
    for chunk in torch.split(points, max(1, _MAX_COSINES // len(bank))):
        neighbor = (chunk @ bank.mT).kthvalue(len(bank) + 1 - k, dim=1).indices
        # from the difference: sqrt(2 - 2 cos) cancels if the neighbor is very near
        distances.append((chunk - bank[neighbor]).norm(dim=1))
    return torch.cat(distances) if distances else points.new_empty(0)


def select_candidates(
    distances: Tensor,
    kept: int,
    *,
    filter: Literal["corrected", "published"] = "corrected",
    largest: bool = True,
) -> Tensor:
    """The candidates that are kept of each point: indices (P, kept) into the rows of distances (P, candidates).

    The released code stores the distances point by point and reads them as if candidate by candidate: `published`
    takes the largest of each column of that misread table, and keeps the candidates of these numbers.
    """
    if filter == "corrected":
        return distances.topk(kept, dim=1, largest=largest).indices
    misread = distances.reshape(distances.shape[1], distances.shape[0])
    return misread.topk(kept, dim=0, largest=largest).indices.mT


@dataclass(frozen=True)
class BoundarySamples:
    """Samples beyond the boundary of a class.

    Attributes:
        vectors: float32 (M, D), of length 1.
        distances: distances to the k-th nearest vector of the class, float32 (M,).
        boundary_rows: the boundary vector that each was sampled around, a row of the class's vectors, int64 (M,).
    """

    vectors: Tensor
    distances: Tensor
    boundary_rows: Tensor


class ClassBoundary:
    """The boundary of one class.

    Args:
        features: vectors of its images, of length 1, float32 (N, D), N at least 2; everything is computed on their
            device.
        config: settings of the sampling.
        seed: seed of the samples.
        label: the class; each class has its own random numbers.

    Attributes:
        distances: distances of its vectors to the k-th nearest other one, (N,).
        boundary: rows of its boundary vectors, the farthest first (for inliers: the nearest), int64 (S,).
    """

    def __init__(self, features: Tensor, config: BoundaryConfig, seed: int, label: int) -> None:
        if len(features) < 2:
            raise FaroutError(f"a class requires two or more vectors to have neighbors, got {len(features)}")
        self.features, self.config, self.seed, self.label = features, config, seed, label
        self.k = config.neighbor_rank(len(features))
        # k + 1, because the nearest neighbor of a vector of the class is the vector itself
        self.distances = distance_to_kth_neighbor(features, features, self.k + 1)
        order = self.distances.argsort(descending=config.largest, stable=True)
        self.boundary = order[: config.boundary_size(len(features))]

    def sample_round(self, number: int) -> BoundarySamples:
        """Round `number`: `samples_per_round` samples, the best of each boundary vector first.

        They depend only on the seed, the label and the number.
        """
        config = self.config
        generator = seeded_generator(self.seed, "boundary", self.label, number)
        chosen = torch.randperm(len(self.boundary), generator=generator)[: config.points]
        rows = self.boundary[chosen.to(self.boundary.device)]
        # candidates are generated twice, because those of a whole round may not fit into memory
        distances = torch.stack(
            [distance_to_kth_neighbor(self._sample_candidates(row, number), self.features, self.k) for row in rows]
        )
        best = select_candidates(distances, config.kept, filter=config.filter, largest=config.largest)
        kept = [self._sample_candidates(row, number)[index] for row, index in zip(rows, best, strict=True)]
        return BoundarySamples(
            torch.stack(kept, dim=1).flatten(0, 1),
            distances.gather(1, best).mT.flatten(),
            rows.repeat(config.kept),
        )

    def _sample_candidates(self, row: Tensor, number: int) -> Tensor:
        """Candidates (candidates, D) around one vector u: (u + sigma n) / |u + sigma n|, sigma = noise / sqrt(D)."""
        dim = self.features.shape[1]
        generator = seeded_generator(self.seed, "candidates", self.label, number, int(row))
        noise = torch.randn(self.config.candidates, dim, generator=generator).to(self.features.device)
        return functional.normalize(self.features[row] + self.config.noise / math.sqrt(dim) * noise, dim=1)


# -- samples on disk: one file per class, which grows by whole rounds ------------------------------------------------


def extend_samples(folder: Path, boundary: ClassBoundary, index: Tensor, class_vector: Tensor, count: int) -> None:
    """Add as many rounds to the file `<label>.safetensors` of a class as `count` samples need.

    The file contains vectors (M, D), with the length of the class vector; index (M,), the indices of their boundary
    images in the source; `SAMPLE_COLUMNS` (M,); and class_distances (N,), the distances of the class's own images.

    Args:
        folder: folder of the files.
        boundary: boundary of the class.
        index: indices of its images in the source, int64 (N,).
        class_vector: its class vector (D,).
        count: number of samples.
    """
    path = folder / f"{boundary.label:05d}.safetensors"
    existing = [_read_class_samples(path)] if path.is_file() else []
    round_size = boundary.config.samples_per_round(len(boundary.features))
    finished = len(existing[0]["vectors"]) // round_size if existing else 0
    length = class_vector.norm()
    rounds = []
    for number in range(finished, math.ceil(count / round_size)):
        samples = boundary.sample_round(number)
        vectors, rows = samples.vectors.cpu(), samples.boundary_rows.cpu()
        rounds.append(
            {
                "vectors": length * vectors,
                "index": index[rows],
                "distance": samples.distances.cpu(),
                "boundary_distance": boundary.distances.cpu()[rows],
                "cosine": vectors @ (class_vector / length),
            }
        )
    if rounds:
        tensors = {name: torch.cat([part[name] for part in (*existing, *rounds)]) for name in rounds[0]}
        store.save_tensors(path, {**tensors, "class_distances": boundary.distances})


def read_samples(folder: str | Path) -> dict[int, dict[str, Tensor]]:
    """Read the files of `extend_samples`, by label; raises StoreError for incomplete or other files."""
    return {int(path.stem): _read_class_samples(path) for path in sorted(expand_path(folder).glob("*.safetensors"))}


def _read_class_samples(path: Path) -> dict[str, Tensor]:
    tensors = store.load_tensors(path)
    if set(tensors) != {"vectors", "index", "class_distances", *SAMPLE_COLUMNS}:
        raise StoreError(f"{path} contains no samples; remove it and sample them again")
    return tensors
