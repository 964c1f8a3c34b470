"""Near-copies: images of one scene, such as bursts, video frames, recompressed, shifted and mirrored versions.

Near-copies are not independent: a detector that was fitted on one of them gives the others too low scores. They are
found on thumbnails, by distances relative to those between random images of the same set:

    d(x, y)^2 = (r^2 + (w p)^2) / s^2 + c^2 / s^2

with p the root mean square difference of two thumbnails, r what remains of it after a shift of up to a fifteenth of the
side, a gain and an offset, c the difference of the colors, w = 0.12, and s the upper quartile of p over random pairs
with x or with y, the smaller of the two. x and y are near-copies if d is below a quarter of the usual distance to the
next image that is no near-copy. Because of this, images of a set of which all look alike are not near-copies of each
other. One of the images may also be mirrored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from farout.data.thumbnails import COLOR_SIDE, SIDE

__all__ = ["NearCopies", "find_near_copies"]

_SHIFT = 2
"""Largest shift in thumbnail pixels; the linear term of `_unexplained_difference` adds a part of one."""
_LINEAR_SHIFT = 0.75
_GAIN = 0.3
_SHIFT_WEIGHT = 0.12
"""Weight of the difference before the shift: two simple shapes at different positions are different images."""
_FIRST_THRESHOLD = 0.08
"""Threshold before the usual distance is known; copies in every tested form are below, and few distinct images are."""
_SPACING_SHARE = 0.25
"""Near-copies are nearer than this share of the usual distance between distinct images."""
_LARGEST_THRESHOLD = 0.2
_NOISE_THRESHOLD = 0.02
"""Differences by noise and JPEG of good quality are below."""
_CONTRAST_WEIGHT = 0.3
"""Weight of the difference relative to the images' own contrast: plain or nearly black images are distinct."""
_PARTNERS = 16
_NEIGHBORS = 6
_DIMENSIONS = 10
_LEAST_SCALE = 0.5
"""Where random images differ by less than this many gray levels, thumbnails cannot distinguish images."""
_PAIRS_PER_BLOCK = 256
_COARSE_FACTOR = 5
"""Pairs whose coarse cells differ by more than this multiple of the threshold are not compared in full."""


@dataclass(frozen=True)
class NearCopies:
    """Groups of near-copies.

    Attributes:
        labels: number of the group of each image.
        threshold: distance below which images were near-copies.
        is_restricted: shifted images were not compared, or the threshold was lowered, because more than half of the
            images would have been one group.
    """

    labels: np.ndarray
    threshold: float
    is_restricted: bool = False


def find_near_copies(thumbnails: np.ndarray) -> NearCopies:
    """Group near-copies.

    Memory is a few kilobytes per image, time grows with n log n: about a minute per 60,000 images on one core.

    Args:
        thumbnails: uint8 (n, THUMBNAIL_BYTES), of different images, in an order that does not depend on the images'
            own order, such as that of their content hashes.
    """
    count = len(thumbnails)
    if count < 3:  # there is no other image to compare with
        return NearCopies(np.arange(count), 0.0)
    comparison = _Comparison(thumbnails)
    labels, threshold = _group_below_spacing(comparison)
    if _largest_share(labels) <= 0.5:
        return NearCopies(labels, threshold)
    # Is it one burst, or a set whose images differ by degrees, such as one shape at random positions?
    comparison.compare_shifted(False)
    if _largest_share(_group(comparison, _NOISE_THRESHOLD)) > 0.5:
        return NearCopies(labels, threshold)
    labels, threshold = _group_below_spacing(comparison)
    while _largest_share(labels) > 0.5 and threshold > _NOISE_THRESHOLD:
        threshold /= 2
        labels = _group(comparison, threshold)
    return NearCopies(labels, threshold, is_restricted=True)


def _largest_share(labels: np.ndarray) -> float:
    return float(np.bincount(labels).max() / len(labels))


def _group_below_spacing(comparison: _Comparison) -> tuple[np.ndarray, float]:
    """Group images below the threshold that is a fixed share of the usual distance between the groups it makes."""
    threshold, labels = _FIRST_THRESHOLD, np.arange(comparison.count)
    for attempt in range(6):
        following = round(min(_LARGEST_THRESHOLD, _SPACING_SHARE * _measure_spacing(comparison, labels)), 4)
        if attempt == 0:
            # where most images have near-copies, this is a share of the distance between these
            following = min(following, threshold) if following >= _FIRST_THRESHOLD / 2 else threshold
        elif abs(following - threshold) <= 0.02 * threshold:
            break
        threshold = following
        labels = _group(comparison, threshold)
    return labels, threshold


def _group(comparison: _Comparison, threshold: float) -> np.ndarray:
    """Label the connected components of near-copies.

    All neighbors of an image in a large group may be of the group, so that groups are connected further through their
    first images.
    """
    labels = np.arange(comparison.count)
    queries = labels
    for _ in range(4):
        _, chosen = np.unique(labels, return_index=True)
        pairs = comparison.find_neighbors(chosen, queries)
        near = pairs[comparison.distances(pairs, threshold) < threshold]
        if len(near):
            ends = labels[near[:, 0]], labels[near[:, 1]]
            edges = coo_array((np.ones(len(near)), ends), shape=(comparison.count,) * 2)
            _, components = connected_components(edges, directed=False)
            _, labels = np.unique(components[labels], return_inverse=True)
        _, chosen, sizes = np.unique(labels, return_index=True, return_counts=True)
        queries = chosen[sizes >= _NEIGHBORS - 1]
        if not len(near) or not len(queries):
            break
    return labels


def _measure_spacing(comparison: _Comparison, labels: np.ndarray) -> float:
    """Median distance from the first image of a group to the nearest of another group, over up to 1,000 groups."""
    _, chosen = np.unique(labels, return_index=True)
    sample = chosen[:1000]
    pairs = comparison.find_neighbors(chosen, sample)
    pairs = pairs[~pairs[:, 2].astype(bool)]
    distances = comparison.distances(pairs)
    nearest = np.full(comparison.count, np.inf)
    for side in (0, 1):
        np.minimum.at(nearest, pairs[:, side], distances)
    known = nearest[sample]
    known = known[np.isfinite(known)]
    return float(np.median(known)) if len(known) else 1.0


class _Comparison:
    """Distances between thumbnails of a set. A pair is (first, second, 1 if the first is mirrored, else 0)."""

    def __init__(self, thumbnails: np.ndarray) -> None:
        self.count = len(thumbnails)
        self.with_shift = True
        self._luminance = thumbnails[:, : SIDE**2].reshape(-1, SIDE, SIDE)
        self._color = thumbnails[:, SIDE**2 :].reshape(-1, 2, COLOR_SIDE, COLOR_SIDE)
        cells = self._luminance.reshape(-1, 8, 4, 8, 4).mean((2, 4), dtype=np.float32)
        flat = _normalize(cells)
        mean = flat.mean(0)
        _, axes = np.linalg.eigh((flat - mean).T @ (flat - mean))
        axes = axes[:, : -_DIMENSIONS - 1 : -1]
        self._cells = cells
        self._descriptors = (flat - mean) @ axes
        self._mirrored_descriptors = (_normalize(cells[:, :, ::-1]) - mean) @ axes
        self._scale = self._measure_scale()
        self._known = np.empty(0, np.int64), np.empty(0)
        self._all_neighbors: np.ndarray | None = None

    def compare_shifted(self, with_shift: bool) -> None:
        """Choose whether images may be shifted, and their gain and offset changed, before they are compared."""
        if with_shift != self.with_shift:
            self.with_shift, self._known = with_shift, (np.empty(0, np.int64), np.empty(0))

    def _measure_scale(self) -> np.ndarray:
        """Upper quartile of the difference of each thumbnail to those at fixed steps in the (random) order.

        It is that to other scenes also where up to three quarters of the images show one scene.
        """
        steps = sorted({1 + number * (self.count - 1) // _PARTNERS for number in range(_PARTNERS)})
        scale = np.empty(self.count)
        for start in range(0, self.count, _PAIRS_PER_BLOCK):
            block = np.arange(start, min(start + _PAIRS_PER_BLOCK, self.count))
            differences = []
            for step in steps:
                x, y = self._images(block), self._images((block + step) % self.count)
                differences.append(np.sqrt(_mean_square(x[0] - y[0]) + _mean_square(x[1] - y[1])))
            scale[block] = np.quantile(differences, 0.75, axis=0)
        return scale

    def _images(self, index: np.ndarray, mirror: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Luminance and color, float32; mirrored where `mirror`."""
        images = self._luminance[index].astype(np.float32), self._color[index].astype(np.float32)
        if mirror is not None:
            for image in images:
                image[mirror] = image[mirror][..., ::-1]
        return images

    def find_neighbors(self, chosen: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """Return the pairs (m, 3) of a query and the chosen images with the most similar descriptors."""
        is_complete = len(queries) == self.count
        if is_complete and self._all_neighbors is not None:
            return self._all_neighbors
        tree = KDTree(self._descriptors[chosen])
        found = []
        for mirrored, descriptors in enumerate((self._descriptors, self._mirrored_descriptors)):
            _, neighbors = tree.query(descriptors[queries], k=min(_NEIGHBORS + 1 - 2 * mirrored, len(chosen)))
            first, second = np.repeat(queries, neighbors.size // len(queries)), chosen[neighbors.ravel()]
            ordered = np.stack([np.minimum(first, second), np.maximum(first, second)], 1)
            ordered = np.unique(ordered[first != second], axis=0)
            found.append(np.column_stack([ordered, np.full(len(ordered), mirrored)]))
        pairs = np.concatenate(found)
        if is_complete:
            self._all_neighbors = pairs
        return pairs

    def distances(self, pairs: np.ndarray, limit: float | None = None) -> np.ndarray:
        """Return the distance of each pair; with a limit, infinity for pairs that coarse cells show to be above it."""
        result = np.full(len(pairs), np.inf)
        codes = (pairs[:, 0].astype(np.int64) * self.count + pairs[:, 1]) * 2 + pairs[:, 2]
        possible = np.arange(len(pairs))
        if limit is not None:
            possible = np.flatnonzero(self._coarse_distances(pairs) < _COARSE_FACTOR * limit)
        known_codes, known = self._known
        missing = possible[~np.isin(codes[possible], known_codes)]
        if len(missing):
            known_codes = np.concatenate([known_codes, codes[missing]])
            known = np.concatenate([known, _in_blocks(self._compare, pairs[missing])])
            order = np.argsort(known_codes)
            self._known = known_codes, known = known_codes[order], known[order]
        result[possible] = known[np.searchsorted(known_codes, codes[possible])]
        return result

    def _coarse_distances(self, pairs: np.ndarray) -> np.ndarray:
        def compare(block: np.ndarray) -> np.ndarray:
            first, second, mirrored = block.T
            x, y = self._cells[first], self._cells[second]
            x[mirrored == 1] = x[mirrored == 1][..., ::-1]
            remainder = np.sqrt(_unexplained_difference(x, y))
            return remainder / np.maximum(np.minimum(self._scale[first], self._scale[second]), _LEAST_SCALE)

        return _in_blocks(compare, pairs)

    def _compare(self, pairs: np.ndarray) -> np.ndarray:
        first, second, mirrored = pairs.T
        scale = np.minimum(self._scale[first], self._scale[second])
        (x, x_color), (y, y_color) = self._images(first, mirrored == 1), self._images(second)
        color = _mean_square(x_color - y_color)
        difference = np.sqrt(_mean_square(x - y) + color)
        if self.with_shift:
            aligned = _unexplained_difference(*_shift_to_match(x, y), blur=True) + color
            difference = np.minimum(difference, np.sqrt(aligned + np.square(_SHIFT_WEIGHT * difference)))
        contrast = np.minimum(x.std((1, 2), dtype=np.float64), y.std((1, 2), dtype=np.float64))
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.maximum(difference / scale, _CONTRAST_WEIGHT * difference / contrast)
        return np.where(scale >= _LEAST_SCALE, distance, np.inf)


def _in_blocks(function: Callable[[np.ndarray], np.ndarray], pairs: np.ndarray) -> np.ndarray:
    blocks = [pairs[start : start + _PAIRS_PER_BLOCK] for start in range(0, len(pairs), _PAIRS_PER_BLOCK)]
    return np.concatenate([np.empty(0), *map(function, blocks)])


def _mean_square(values: np.ndarray) -> np.ndarray:
    return np.square(values).reshape(len(values), -1).mean(1, dtype=np.float64)


def _normalize(cells: np.ndarray) -> np.ndarray:
    """Cells (n, 8, 8) as rows with mean 0 and a contrast of about 1; that of plain images stays low."""
    rows = cells.reshape(len(cells), -1).astype(np.float64)
    rows -= rows.mean(1, keepdims=True)
    return rows / np.sqrt(np.square(rows).mean(1, keepdims=True) + 100)


def _shift_to_match(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the inner part of x, and the part of y at the shift by whole pixels that resembles it most."""
    count, inner = len(x), SIDE - 2 * _SHIFT
    fixed = np.ascontiguousarray(x[:, _SHIFT:-_SHIFT, _SHIFT:-_SHIFT])
    lowest, moved = np.full(count, np.inf), np.empty_like(fixed)
    for row in range(2 * _SHIFT + 1):
        for column in range(2 * _SHIFT + 1):
            window = y[:, row : row + inner, column : column + inner]
            difference = (window - fixed).reshape(count, -1)
            variance = np.einsum("pk,pk->p", difference, difference) - np.square(difference.sum(1)) / inner**2
            better = variance < lowest
            lowest[better], moved[better] = variance[better], window[better]
    return fixed, moved


def _unexplained_difference(x: np.ndarray, y: np.ndarray, blur: bool = False) -> np.ndarray:
    """Mean square of what remains of y - x after a gain, an offset and a shift by a part of a pixel.

    The shift is the linear term of a Taylor series, as in optical flow: with m the mean of both images,
    y - x = g m + b + u dm/dx + v dm/dy. The blur by a pixel makes the derivatives exact enough.
    """
    mean, difference = (x + y) / 2, y - x
    if blur:
        mean, difference = _blur(mean), _blur(difference)
    down, right = (mean[:, 2:, 1:-1] - mean[:, :-2, 1:-1]) / 2, (mean[:, 1:-1, 2:] - mean[:, 1:-1, :-2]) / 2
    parts = (mean[:, 1:-1, 1:-1], down, right)
    terms = np.stack([part.reshape(len(part), -1) for part in parts], 1).astype(np.float64)
    terms -= terms.mean(2, keepdims=True)  # the offset
    target = difference[:, 1:-1, 1:-1].reshape(len(x), -1).astype(np.float64)
    target -= target.mean(1, keepdims=True)
    normal = terms @ terms.transpose(0, 2, 1) + 1e-3 * np.eye(3)
    factors = np.linalg.solve(normal, terms @ target[:, :, None])[:, :, 0]
    limits = np.array([_GAIN, _LINEAR_SHIFT, _LINEAR_SHIFT])
    remainder = target - np.einsum("pt,ptk->pk", np.clip(factors, -limits, limits), terms)
    return np.square(remainder).mean(1)


def _blur(images: np.ndarray) -> np.ndarray:
    images = (images[:, 2:] + 2 * images[:, 1:-1] + images[:, :-2]) / 4
    return (images[:, :, 2:] + 2 * images[:, :, 1:-1] + images[:, :, :-2]) / 4
