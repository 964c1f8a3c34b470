"""Densities and distances fitted on tables (n, d), stored as arrays; higher scores mean less typical rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from threadpoolctl import threadpool_limits

from farout.core.errors import FaroutError, StoreError

__all__ = [
    "ClassMahalanobis",
    "FittedStatistics",
    "GaussianMixture",
    "KernelDensity",
    "Mahalanobis",
    "NearestNeighbor",
    "PrincipalAxes",
    "PrincipalComponents",
    "ZScore",
    "pack_arrays",
    "unpack_arrays",
]

Arrays = Mapping[str, np.ndarray]


def _check_table(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise FaroutError(f"expected a table (n, d) of at least 2 rows, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise FaroutError(
            f"{int((~np.isfinite(x)).any(1).sum())} of {len(x)} rows have values that are not finite numbers"
        )
    return x


def _standardize(x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    # one column would broadcast without an error
    if x.ndim != 2 or x.shape[1] != len(mean):
        raise FaroutError(f"expected a table (n, {len(mean)}) with the columns fitted on, got shape {x.shape}")
    return (x - mean) / std


def _standard_deviations(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sample standard deviations of the columns of `x`, at least 1e-12 and the float32 resolution of `values`."""
    floor = np.maximum(1e-12, np.finfo(np.float32).eps * np.abs(values).max(0))
    return np.maximum(x.std(0, ddof=1), floor)


class FittedStatistics:
    """Base class of fitted statistics, which are dataclasses of arrays."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The fitted arrays by name."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Restores the result of `to_arrays`; raises StoreError for missing or unknown arrays."""
        expected = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if set(arrays) != expected:
            raise StoreError(
                f"{cls.__name__} requires the arrays {sorted(expected)}, got {sorted(arrays)}; fit it again"
            )
        return cls(**arrays)


def pack_arrays(parts: Mapping[str, FittedStatistics]) -> dict[str, np.ndarray]:
    """The arrays of several fitted statistics, each named `part.array`."""
    return {f"{part}.{name}": array for part, fitted in parts.items() for name, array in fitted.to_arrays().items()}


def unpack_arrays(arrays: Arrays, part: str) -> dict[str, np.ndarray]:
    """The arrays of one part of the result of `pack_arrays`; empty if there is none."""
    start = f"{part}."
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


@dataclass(frozen=True)
class ZScore(FittedStatistics):
    """z = (x - mean) / std with the sample standard deviation (ddof = 1), per column (Graham et al. 2023, section 3.3).

    The standard deviation of a constant column is set to the float32 resolution of its values (at least 1e-12), so that
    an equal value has z = 0, one that differs by rounding a small z, and any other a large one.
    """

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> Self:
        """From a table (n, d) of at least two rows."""
        x = _check_table(x)
        return cls(x.mean(0), _standard_deviations(x, x))

    def transform(self, x: np.ndarray) -> np.ndarray:
        """The z-scores of a table (n, d); NaN where x is NaN. Raises FaroutError for another number of columns."""
        return _standardize(x, self.mean, self.std)

    def score(self, x: np.ndarray) -> np.ndarray:
        """Mean over columns of z: one-sided, (n,)."""
        return self.transform(x).mean(1)

    def score_two_sided(self, x: np.ndarray) -> np.ndarray:
        """Mean over columns of |z|, (n,)."""
        return np.abs(self.transform(x)).mean(1)


def _fit_transform(x: np.ndarray) -> tuple[ZScore, np.ndarray]:
    """The z-score of a table (n, d) of at least two rows, and the transformed table."""
    z = ZScore.fit(x)
    return z, z.transform(x)


def _precision(z: np.ndarray) -> np.ndarray:
    """Inverse of the Ledoit-Wolf shrunk covariance of a table of mean 0; the identity for a constant table."""
    if not z.any():
        return np.eye(z.shape[1])
    from sklearn.covariance import LedoitWolf  # only a fit uses scikit-learn, whose import takes a second

    return LedoitWolf(assume_centered=True).fit(z).precision_


@dataclass(frozen=True)
class Mahalanobis(FittedStatistics):
    """(x - mean)^T C^-1 (x - mean) / d, C the Ledoit-Wolf shrunk covariance (2004) of standardized columns, so that
    it exists for n < d as well.
    """

    mean: np.ndarray
    std: np.ndarray
    precision: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> Self:
        """From a table (n, d) of at least two rows."""
        z, table = _fit_transform(x)
        return cls(z.mean, z.std, _precision(table))

    def score(self, x: np.ndarray) -> np.ndarray:
        """Squared distance divided by d, (n,): about 1 for rows like those of the fit."""
        z = _standardize(x, self.mean, self.std)
        return ((z @ self.precision) * z).sum(1) / z.shape[1]


@dataclass(frozen=True)
class ClassMahalanobis(FittedStatistics):
    """min over classes c of (x - m_c)^T C^-1 (x - m_c) / d, C the covariance that all classes share (Lee et al. 2018,
    section 2.1), shrunk as in `Mahalanobis`. Columns are standardized by their standard deviations within classes;
    after multiplication with `root` C is the identity, and `means` are the class means in that space.
    """

    mean: np.ndarray
    std: np.ndarray
    means: np.ndarray
    root: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, labels: np.ndarray) -> Self:
        """From a table (n, d) and n labels; at least one class requires two rows, for the covariance."""
        x = _check_table(x)
        classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if len(labels) != len(x) or counts.max() < 2:
            given = f"{len(labels)} labels of {len(classes)} classes for {len(x)} rows"
            raise FaroutError(f"class-wise distances require one label per row and a class with two rows, got {given}")
        means = np.stack([x[index == number].mean(0) for number in range(len(classes))])
        inner = x - means[index]
        mean, std = x.mean(0), _standard_deviations(inner, x)
        root = np.linalg.cholesky(_precision(inner / std))
        return cls(mean, std, ((means - mean) / std) @ root, root)

    def score(self, x: np.ndarray) -> np.ndarray:
        """Squared distance to the nearest class, divided by d, (n,)."""
        whitened = _standardize(x, self.mean, self.std) @ self.root
        return np.stack([np.square(whitened - mean).sum(1) for mean in self.means]).min(0) / whitened.shape[1]


@dataclass(frozen=True)
class PrincipalComponents(FittedStatistics):
    """Principal components of standardized columns: eigenvectors (d, k) of their correlation matrix."""

    mean: np.ndarray
    std: np.ndarray
    axes: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, *, explained: float = 1.0, max_components: int | None = None) -> Self:
        """The fewest components, at least one, that explain this fraction of the variance, at most `max_components`."""
        z, table = _fit_transform(x)
        variances, axes = np.linalg.eigh(table.T @ table / len(table))
        cumulative = np.cumsum(np.maximum(variances[::-1], 0))
        count = 1 + int(np.searchsorted(cumulative, explained * cumulative[-1]))
        return cls(z.mean, z.std, axes[:, ::-1][:, : min(count, max_components or len(axes))].copy())

    def project(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates along the components (n, k), and the residual of the standardized columns (n, d)."""
        z = _standardize(x, self.mean, self.std)
        coordinates = z @ self.axes
        return coordinates, z - coordinates @ self.axes.T


@dataclass(frozen=True)
class PrincipalAxes(FittedStatistics):
    """All principal axes of a table, its columns centered: y = axes^T (x - mean) * scale, with uncorrelated columns.

    The covariance is shrunk (Ledoit and Wolf 2004). With `whiten`, the columns of x are standardized first and every
    column of y has variance 1, so that the mean of y^2 is `Mahalanobis.score`; otherwise `variances` are proportional
    to the covariance's eigenvalues and have mean 1.
    """

    mean: np.ndarray
    axes: np.ndarray
    scale: np.ndarray
    variances: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, *, whiten: bool) -> Self:
        """From a table (n, d) of at least two rows."""
        x = _check_table(x)
        mean, width = x.mean(0), x.shape[1]
        std = _standard_deviations(x, x) if whiten else np.ones(width)
        z = (x - mean) / std
        from sklearn.covariance import LedoitWolf  # as in `_precision`

        covariance = LedoitWolf(assume_centered=True).fit(z).covariance_ if z.any() else np.eye(width)
        eigenvalues, axes = np.linalg.eigh(covariance)
        eigenvalues = np.maximum(eigenvalues, 1e-12 * eigenvalues[-1])
        if whiten:
            return cls(mean, axes / std[:, None], 1 / np.sqrt(eigenvalues), np.ones(width))
        variances = eigenvalues / eigenvalues.mean()
        return cls(mean, axes, np.full(width, 1 / np.sqrt(eigenvalues.mean())), variances)

    def check(self, width: int) -> None:
        """Raise FaroutError unless these are finite axes of tables (n, width), with positive variances."""
        expected = {"mean": (width,), "axes": (width, width), "scale": (width,), "variances": (width,)}
        for name, array in self.to_arrays().items():
            if array.shape != expected[name] or not np.isfinite(array).all():
                raise FaroutError(f"expected finite {name} {expected[name]} of principal axes, got shape {array.shape}")
        if (self.variances <= 0).any():
            raise FaroutError("the variances of principal axes must be positive")

    def transform(self, x: np.ndarray) -> np.ndarray:
        """Coordinates (n, d) of a table (n, d)."""
        return _standardize(x, self.mean, np.ones(len(self.mean))) @ self.axes * self.scale


@dataclass(frozen=True)
class GaussianMixture(FittedStatistics):
    """-log density of a Gaussian mixture on standardized columns; the number of components by BIC."""

    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray
    means: np.ndarray
    roots: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, *, seed: int = 0, max_components: int = 3, shared: bool = False) -> Self:
        """From a table (n, d) of at least two rows, with up to `max_components` components.

        Each component has its own covariance, which requires 10 d rows per component; or all have the same (`shared`),
        which requires 20 rows per component, with component counts 1, 2, 4, ...
        """
        from sklearn.mixture import GaussianMixture as Mixture  # see _precision

        z, table = _fit_transform(x)
        # duplicate rows do not count
        rows = len(np.unique(table, axis=0))
        limit = max(1, min(max_components, rows // (20 if shared else 10 * table.shape[1])))
        counts = [2**i for i in range(limit.bit_length())] if shared else range(1, 1 + limit)
        kind = {"covariance_type": "tied" if shared else "full", "reg_covar": 1e-2, "max_iter": 500, "n_init": 2}
        # for matrices this small, several threads are slower than one
        with threadpool_limits(1, user_api="blas"):
            fits = [Mixture(count, random_state=seed, **kind).fit(table) for count in counts]
        best = min(fits, key=lambda mixture: mixture.bic(table))
        roots = np.broadcast_to(best.precisions_cholesky_, (len(best.means_), *z.mean.shape * 2))
        return cls(z.mean, z.std, best.weights_, best.means_, roots.copy())

    def score(self, x: np.ndarray) -> np.ndarray:
        """-log sum_k w_k N(z; m_k, C_k), (n,), with the Cholesky factors of the inverse covariances."""
        z = _standardize(x, self.mean, self.std)
        parts = []
        for mean, root in zip(self.means, self.roots, strict=True):
            distance = np.square((z - mean) @ root).sum(1)
            parts.append(np.log(np.diag(root)).sum() - 0.5 * (distance + z.shape[1] * np.log(2 * np.pi)))
        return -logsumexp(np.log(self.weights)[:, None] + np.stack(parts), axis=0)


@dataclass(frozen=True)
class KernelDensity(FittedStatistics):
    """-log of the mean of Gaussian kernels N(x; x_i, width^2 I) around the rows x_i of the fit, columns standardized.

    The kernel width follows Scott's rule, n^(-1 / (d + 4)) (1992). Two-sided; meant for one to few columns.
    """

    mean: np.ndarray
    std: np.ndarray
    rows: np.ndarray
    width: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> Self:
        """From a table (n, d) of at least two rows."""
        z, rows = _fit_transform(x)
        return cls(z.mean, z.std, rows, np.asarray(len(rows) ** (-1 / (rows.shape[1] + 4))))

    def score(self, x: np.ndarray) -> np.ndarray:
        """-log density of the standardized rows, (n,); far from all rows it grows as the squared distance."""
        z = _standardize(x, self.mean, self.std)
        squares = np.square(cdist(z, self.rows) / self.width)
        normal = z.shape[1] * np.log(self.width * np.sqrt(2 * np.pi)) + np.log(len(self.rows))
        return normal - logsumexp(-0.5 * squares, axis=1)


@dataclass(frozen=True)
class NearestNeighbor(FittedStatistics):
    """Distance to the k-th nearest row of the fit, columns standardized; brute force."""

    mean: np.ndarray
    std: np.ndarray
    rows: np.ndarray
    k: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, *, k: int = 1) -> Self:
        """From a table (n, d) of at least two rows; k is at most n."""
        z, rows = _fit_transform(x)
        return cls(z.mean, z.std, rows, np.asarray(min(k, len(rows))))

    def score(self, x: np.ndarray) -> np.ndarray:
        """Euclidean distance, (n,)."""
        distances = cdist(_standardize(x, self.mean, self.std), self.rows)
        index = int(self.k) - 1
        return np.partition(distances, index, axis=1)[:, index]
