"""The boundary of a class of unit vectors, and points beyond it: the sampling of Dream-OOD.

Du, Sun, Zhu and Li, "Dream the impossible: outlier imagination with diffusion models", NeurIPS 2023, arXiv 2309.13415,
after NPOS (Tao, Du, Zhu and Li, "Non-parametric outlier synthesis", ICLR 2023). The vectors of a class that are
farthest from their k-th nearest neighbour are its boundary; Gaussian noise around one of them, brought back to the
sphere, gives candidates, of which those farthest from the class are kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from farout.core.errors import FaroutError, ShortfallWarning, check_options
from farout.diffusion.noise import seeded_generator

__all__ = ["BoundarySampling", "ClassBoundary", "Drawn", "Filter", "Side", "choose", "kth_distance"]

Side = Literal["outliers", "inliers"]
Filter = Literal["mended", "published"]

_AT_ONCE = 2**24
"""Cosines that are held together."""


@dataclass(frozen=True)
class BoundarySampling:
    """Sampling beyond the class boundaries. Raises FaroutError for values out of range.

    Args:
        side: `outliers`: sample around the vectors farthest from their class and keep the farthest samples; `inliers`:
            around the nearest, and keep the nearest, for more images of the class.
        k: rank of the neighbour within the class that defines the distance, at most 60 % of the class's images;
            published: 300 of 500 (CIFAR-100) or of 1,000 (ImageNet); default: 60 %.
        select: boundary vectors per class; published: 50 of 500 (CIFAR-100), 200 of 1,000 (ImageNet), all for inliers;
            default: a tenth of the class's images.
        points: boundary vectors sampled around per round, chosen at random; published: 50.
        noise: expected length of the noise added to a unit vector, which turns it by about atan(noise); published: 1.94
            for CIFAR-100, 0.83 for ImageNet, 0.28 for inliers. In small generators 1.94 leaves little of the class.
        candidates: samples per boundary vector and round; published: 1,500.
        kept: samples kept per boundary vector; published: 2, for inliers 1.
        filter: samples kept: `mended` (the farthest of each boundary vector, as the paper says) or `published` (as the
            released code, whose wrong indexing keeps nearly arbitrary ones).
    """

    side: Side = "outliers"
    k: int | None = None
    select: int | None = None
    points: int = 50
    noise: float = 0.83
    candidates: int = 300
    kept: int = 2
    filter: Filter = "mended"

    def __post_init__(self) -> None:
        check_options(self, "boundary's option", self._rules())

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("side", self.side in get_args(Side), " or ".join(get_args(Side))),
            ("filter", self.filter in get_args(Filter), " or ".join(get_args(Filter))),
            ("k", self.k is None or self.k >= 1, "None, or 1 or more"),
            ("select", self.select is None or self.select >= 1, "None, or 1 or more"),
            *((name, getattr(self, name) >= 1, "1 or more") for name in ("points", "candidates", "kept")),
            ("kept", self.kept <= self.candidates, f"at most candidates ({self.candidates})"),
            ("noise", 0 < self.noise < math.inf, "a positive number"),
        ]

    @property
    def farthest(self) -> bool:
        """Whether large distances are wanted, not small ones."""
        return self.side == "outliers"

    def neighbour(self, count: int) -> int:
        """The k used in a class of `count` images, two or more."""
        most = max(1, 3 * count // 5)
        return most if self.k is None else min(self.k, most)

    def selected(self, count: int) -> int:
        """Boundary vectors of a class of `count` images."""
        return max(1, count // 10) if self.select is None else min(self.select, count)

    def per_round(self, count: int) -> int:
        """Vectors that a round gives in a class of `count` images."""
        return self.kept * min(self.points, self.selected(count))

    def check(self, counts: Sequence[int], names: Sequence[str]) -> None:
        """Raises FaroutError for a class without neighbours; warns of classes too small for `k` or `select`.

        Args:
            counts: images of each class.
            names: of the classes.
        """
        least, name = min(zip(counts, names, strict=True))
        if least < 2:
            raise FaroutError(
                f"the class {name!r} has {least} readable image{'s' * (least != 1)}, and an image's neighbours are "
                "others of its class: give two or more, better some hundred, or leave the class out"
            )
        for option, asked, used in (("k", self.k, self.neighbour), ("select", self.select, self.selected)):
            if asked is not None and used(least) < asked:
                small = sum(used(count) < asked for count in counts)
                warnings.warn(
                    f"{small} of {len(counts)} classes are too small for {option} {asked}; the smallest, {name!r} with "
                    f"{least} images, gets {used(least)}",
                    ShortfallWarning,
                    stacklevel=3,
                )


def kth_distance(points: Tensor, bank: Tensor, k: int) -> Tensor:
    """Distance ||p - b_(k)|| of points (M, D) to the k-th nearest b of a bank (N, D), all of length 1: (M,).

    Brute force, in pieces of at most 16 million cosines. Raises FaroutError for other dimensions, and for k outside
    1 to N.
    """
    if points.ndim != 2 or bank.ndim != 2 or points.shape[1] != bank.shape[1]:
        raise FaroutError(
            f"points and bank must have the shapes (M, D) and (N, D), got {tuple(points.shape)} and {tuple(bank.shape)}"
        )
    if not 1 <= k <= len(bank):
        raise FaroutError(f"there is no neighbour number {k} among {len(bank)} vectors")
    found = [_kth(some, bank, k) for some in points.split(max(1, _AT_ONCE // len(bank)))]
    return torch.cat(found) if found else points.new_empty(0)


def _kth(points: Tensor, bank: Tensor, k: int) -> Tensor:
    nearest = (points @ bank.mT).kthvalue(len(bank) + 1 - k, dim=1).indices
    # from the difference: 2 - 2 cos cancels where the neighbour is very near
    return (points - bank[nearest]).norm(dim=1)


def choose(distances: Tensor, kept: int, *, filter: Filter = "mended", farthest: bool = True) -> Tensor:
    """Which candidates are kept of each point: places (P, kept) in the rows of their distances (P, candidates).

    The released code has the distances point by point and reads them as if candidate by candidate: `published` finds
    the largest of each column of that table, and takes the candidates of these numbers.
    """
    if filter == "mended":
        return distances.topk(kept, dim=1, largest=farthest).indices
    misread = distances.reshape(distances.shape[1], distances.shape[0])
    return misread.topk(kept, dim=0, largest=farthest).indices.mT


@dataclass(frozen=True)
class Drawn:
    """Points beyond the boundary of a class.

    Attributes:
        vectors: of length 1, float32 (M, D).
        distance: to the k-th nearest vector of the class, float32 (M,).
        around: the class's vector that each was drawn around, int64 (M,).
    """

    vectors: Tensor
    distance: Tensor
    around: Tensor


class ClassBoundary:
    """The boundary of one class.

    Args:
        features: vectors of its images, of length 1, float32 (N, D), N at least 2; all is computed where they are.
        sampling: how points are drawn.
        seed: of the draws.
        label: of the class, which has draws of its own.

    Attributes:
        distances: of its vectors to the k-th nearest other one, (N,).
        boundary: the rows of its boundary vectors, those farthest out first (for inliers: nearest), int64 (S,).
    """

    def __init__(self, features: Tensor, sampling: BoundarySampling, seed: int, label: int) -> None:
        if len(features) < 2:
            raise FaroutError(f"a class requires two or more vectors to have neighbours, got {len(features)}")
        self.features, self.sampling, self.seed, self.label = features, sampling, seed, label
        self.k = sampling.neighbour(len(features))
        # the nearest of all is the vector itself
        self.distances = kth_distance(features, features, self.k + 1)
        order = self.distances.argsort(descending=sampling.farthest, stable=True)
        self.boundary = order[: sampling.selected(len(features))]

    def draw(self, number: int) -> Drawn:
        """Round `number`: `sampling.per_round` points, the best of each boundary vector first; from the seed, the label
        and the number alone.
        """
        generator = seeded_generator(self.seed, "boundary", self.label, number)
        places = torch.randperm(len(self.boundary), generator=generator)[: self.sampling.points]
        around = self.boundary[places.to(self.boundary.device)]
        # candidates are made twice: all of a round would not fit where D is large
        distances = torch.stack([kth_distance(self._candidates(row, number), self.features, self.k) for row in around])
        best = choose(distances, self.sampling.kept, filter=self.sampling.filter, farthest=self.sampling.farthest)
        kept = [self._candidates(row, number)[places] for row, places in zip(around, best, strict=True)]
        return Drawn(
            torch.stack(kept, dim=1).flatten(0, 1),
            distances.gather(1, best).mT.flatten(),
            around.repeat(self.sampling.kept),
        )

    def _candidates(self, row: Tensor, number: int) -> Tensor:
        """(candidates, D) around one vector."""
        dim = self.features.shape[1]
        generator = seeded_generator(self.seed, "candidates", self.label, number, int(row))
        noise = torch.randn(self.sampling.candidates, dim, generator=generator).to(self.features.device)
        return functional.normalize(self.features[row] + self.sampling.noise / math.sqrt(dim) * noise, dim=1)
