"""Statistics fitted on tables (n, d): means, covariances, mixtures; kept as arrays. Scores: higher = further out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture as _Mixture
from threadpoolctl import threadpool_limits

from farout.core.errors import FaroutError, StoreError

__all__ = [
    "ClassMahalanobis",
    "GaussianMixture",
    "KernelDensity",
    "Mahalanobis",
    "Nearest",
    "Principal",
    "ZScore",
    "pack_arrays",
    "unpack_arrays",
]

Arrays = Mapping[str, np.ndarray]


def _table(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise FaroutError(f"expected a table (n, d) of at least 2 rows, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise FaroutError(
            f"{int((~np.isfinite(x)).any(1).sum())} of {len(x)} rows hold values that are not finite numbers"
        )
    return x


def _standardised(x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    # one column would broadcast in silence
    if x.ndim != 2 or x.shape[1] != len(mean):
        raise FaroutError(f"expected a table (n, {len(mean)}) with the columns fitted on, got shape {x.shape}")
    return (x - mean) / std


def _deviations(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sample deviations of the columns of `x`, at least float32's resolution of `values`, and 1e-12."""
    floor = np.maximum(1e-12, np.finfo(np.float32).eps * np.abs(values).max(0))
    return np.maximum(x.std(0, ddof=1), floor)


class _Fitted:
    """Arrays in, arrays out."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The fitted arrays by name."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Rebuilds what `to_arrays` gave; raises StoreError where an array is missing or unknown."""
        wanted = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if set(arrays) != wanted:
            raise StoreError(f"{cls.__name__} requires the arrays {sorted(wanted)}, got {sorted(arrays)}; fit it again")
        return cls(**arrays)


def pack_arrays(parts: Mapping[str, _Fitted]) -> dict[str, np.ndarray]:
    """The arrays of several fitted statistics, each named `part.array`."""
    return {f"{part}.{name}": array for part, fitted in parts.items() for name, array in fitted.to_arrays().items()}


def unpack_arrays(arrays: Arrays, part: str) -> dict[str, np.ndarray]:
    """The arrays of one part of `pack`; empty where it holds none."""
    start = f"{part}."
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


@dataclass(frozen=True)
class ZScore(_Fitted):
    """z = (x - mean) / std with the sample deviation (ddof = 1), per column (Graham et al. 2023, section 3.3).

    A column that never varies has no scale; its deviation is set to float32's resolution of its values (at least
    1e-12), so that an equal value has z = 0, one that differs by the rounding of a network is near, any other far out.
    """

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> Self:
        """From a table (n, d) of at least two rows."""
        x = _table(x)
        return cls(x.mean(0), _deviations(x, x))

    def transform(self, x: np.ndarray) -> np.ndarray:
        """(n, d); NaN where x is. Raises FaroutError for another number of columns."""
        return _standardised(x, self.mean, self.std)

    def score(self, x: np.ndarray) -> np.ndarray:
        """Mean over columns of z: one-sided, (n,)."""
        return self.transform(x).mean(1)

    def score_two_sided(self, x: np.ndarray) -> np.ndarray:
        """Mean over columns of |z|, (n,)."""
        return np.abs(self.transform(x)).mean(1)


def _standard(x: np.ndarray) -> tuple[ZScore, np.ndarray]:
    """The z scores of a table (n, d) of at least two rows, and the table in them."""
    z = ZScore.fit(x)
    return z, z.transform(x)


def _precision(z: np.ndarray) -> np.ndarray:
    """Inverse of the Ledoit-Wolf shrunk covariance of a table of mean 0; the identity where nothing varies."""
    if not z.any():
        return np.eye(z.shape[1])
    return LedoitWolf(assume_centered=True).fit(z).precision_


@dataclass(frozen=True)
class Mahalanobis(_Fitted):
    """(x - mean)^T C^-1 (x - mean) / d, C the Ledoit-Wolf shrunk covariance (2004) of standardised columns, so that
    it exists for n < d as well.
    """

    mean: np.ndarray
    std: np.ndarray
    precision: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> Self:
        """From a table (n, d) of at least two rows."""
        z, table = _standard(x)
        return cls(z.mean, z.std, _precision(table))

    def score(self, x: np.ndarray) -> np.ndarray:
        """Squared distance divided by d, (n,): about 1 for images like those fitted on."""
        z = _standardised(x, self.mean, self.std)
        return ((z @ self.precision) * z).sum(1) / z.shape[1]


@dataclass(frozen=True)
class ClassMahalanobis(_Fitted):
    """min over classes c of (x - m_c)^T C^-1 (x - m_c) / d, C the covariance that all classes share (Lee et al. 2018,
    section 2.1), shrunk as in `Mahalanobis`. Columns are standardised by their deviations within classes; `root` then
    makes C the identity, and `means` are those of the classes afterwards.
    """

    mean: np.ndarray
    std: np.ndarray
    means: np.ndarray
    root: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, labels: np.ndarray) -> Self:
        """From a table (n, d) and n labels; some class wants two rows, for how far a class spreads."""
        x = _table(x)
        classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if len(labels) != len(x) or counts.max() < 2:
            given = f"{len(labels)} labels of {len(classes)} classes for {len(x)} rows"
            raise FaroutError(f"class-wise distances require one label a row and a class of two rows, got {given}")
        means = np.stack([x[index == number].mean(0) for number in range(len(classes))])
        inner = x - means[index]
        mean, std = x.mean(0), _deviations(inner, x)
        root = np.linalg.cholesky(_precision(inner / std))
        return cls(mean, std, ((means - mean) / std) @ root, root)

    def score(self, x: np.ndarray) -> np.ndarray:
        """Squared distance to the nearest class, divided by d, (n,)."""
        white = _standardised(x, self.mean, self.std) @ self.root
        return np.stack([np.square(white - mean).sum(1) for mean in self.means]).min(0) / white.shape[1]


@dataclass(frozen=True)
class Principal(_Fitted):
    """Principal components of standardised columns: eigenvectors (d, k) of their correlation matrix."""

    mean: np.ndarray
    std: np.ndarray
    axes: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, *, share: float = 1.0, most: int | None = None) -> Self:
        """The fewest components, at least one, that explain `share` of the variance, but no more than `most`."""
        z, table = _standard(x)
        variances, axes = np.linalg.eigh(table.T @ table / len(table))
        explained = np.cumsum(np.maximum(variances[::-1], 0))
        count = 1 + int(np.searchsorted(explained, share * explained[-1]))
        return cls(z.mean, z.std, axes[:, ::-1][:, : min(count, most or len(axes))].copy())

    def project(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates along the components (n, k), and what they leave of the standardised columns (n, d)."""
        z = _standardised(x, self.mean, self.std)
        inside = z @ self.axes
        return inside, z - inside @ self.axes.T


@dataclass(frozen=True)
class GaussianMixture(_Fitted):
    """-log density of a Gaussian mixture on standardised columns; the number of components by BIC."""

    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray
    means: np.ndarray
    roots: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, *, seed: int = 0, most: int = 3, shared: bool = False) -> Self:
        """From a table (n, d) of at least two rows, with up to `most` components.

        Each has its own covariance, which wants 10 d rows a component; or all have one (`shared`), which wants 20 rows
        a component, and their numbers double from 1.
        """
        z, table = _standard(x)
        # copies of a row add nothing
        rows = len(np.unique(table, axis=0))
        limit = max(1, min(most, rows // (20 if shared else 10 * table.shape[1])))
        counts = [2**i for i in range(limit.bit_length())] if shared else range(1, 1 + limit)
        kind = {"covariance_type": "tied" if shared else "full", "reg_covar": 1e-2, "max_iter": 500, "n_init": 2}
        # several threads on matrices this small wait for each other
        with threadpool_limits(1, user_api="blas"):
            fits = [_Mixture(count, random_state=seed, **kind).fit(table) for count in counts]
        best = min(fits, key=lambda mixture: mixture.bic(table))
        roots = np.broadcast_to(best.precisions_cholesky_, (len(best.means_), *z.mean.shape * 2))
        return cls(z.mean, z.std, best.weights_, best.means_, roots.copy())

    def score(self, x: np.ndarray) -> np.ndarray:
        """-log sum_k w_k N(z; m_k, C_k), (n,), with the Cholesky factors of the inverse covariances."""
        z = _standardised(x, self.mean, self.std)
        parts = []
        for mean, root in zip(self.means, self.roots, strict=True):
            distance = np.square((z - mean) @ root).sum(1)
            parts.append(np.log(np.diag(root)).sum() - 0.5 * (distance + z.shape[1] * np.log(2 * np.pi)))
        return -logsumexp(np.log(self.weights)[:, None] + np.stack(parts), axis=0)


@dataclass(frozen=True)
class KernelDensity(_Fitted):
    """-log of the mean of Gaussian kernels N(x; x_i, width^2 I) around the rows x_i fitted on, columns standardised.

    The kernels' deviation follows Scott's rule, n^(-1 / (d + 4)) (1992). Two-sided; meant for one to few columns.
    """

    mean: np.ndarray
    std: np.ndarray
    rows: np.ndarray
    width: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> Self:
        """From a table (n, d) of at least two rows."""
        z, rows = _standard(x)
        return cls(z.mean, z.std, rows, np.asarray(len(rows) ** (-1 / (rows.shape[1] + 4))))

    def score(self, x: np.ndarray) -> np.ndarray:
        """-log density of the standardised rows, (n,); far out it grows as the squared distance."""
        z = _standardised(x, self.mean, self.std)
        squares = np.square(cdist(z, self.rows) / self.width)
        normal = z.shape[1] * np.log(self.width * np.sqrt(2 * np.pi)) + np.log(len(self.rows))
        return normal - logsumexp(-0.5 * squares, axis=1)


@dataclass(frozen=True)
class Nearest(_Fitted):
    """Distance to the k-th nearest of the rows fitted on, columns standardised; brute force."""

    mean: np.ndarray
    std: np.ndarray
    rows: np.ndarray
    k: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, *, k: int = 1) -> Self:
        """From a table (n, d) of at least two rows; k is at most n."""
        z, rows = _standard(x)
        return cls(z.mean, z.std, rows, np.asarray(min(k, len(rows))))

    def score(self, x: np.ndarray) -> np.ndarray:
        """Euclidean distance, (n,)."""
        distances = cdist(_standardised(x, self.mean, self.std), self.rows)
        place = int(self.k) - 1
        return np.partition(distances, place, axis=1)[:, place]
