"""Statistics fitted on tables (n, d): means, covariances, mixtures; kept as arrays. Scores: higher = further out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from scipy.special import logsumexp
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture as _Mixture

from farout.errors import FaroutError, StoreError

__all__ = ["GaussianMixture", "Mahalanobis", "ZScore"]

Arrays = Mapping[str, np.ndarray]


def _table(x: np.ndarray, least: int = 1) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < least:
        raise FaroutError(f"expected a table (n, d) of at least {least} rows, got shape {x.shape}")
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
            raise StoreError(f"{cls.__name__} wants the arrays {sorted(wanted)}, got {sorted(arrays)}; fit it again")
        return cls(**arrays)


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
        x = _table(x, 2)
        floor = np.maximum(1e-12, np.finfo(np.float32).eps * np.abs(x).max(0))
        return cls(x.mean(0), np.maximum(x.std(0, ddof=1), floor))

    def z(self, x: np.ndarray) -> np.ndarray:
        """(n, d); NaN where x is. Raises FaroutError for another number of columns."""
        return _standardised(x, self.mean, self.std)

    def score(self, x: np.ndarray) -> np.ndarray:
        """Mean over columns of z: one-sided, (n,)."""
        return self.z(x).mean(1)

    def two_sided(self, x: np.ndarray) -> np.ndarray:
        """Mean over columns of |z|, (n,)."""
        return np.abs(self.z(x)).mean(1)


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
        z = ZScore.fit(x)
        precision = LedoitWolf(assume_centered=True).fit(z.z(_table(x, 2))).precision_
        return cls(z.mean, z.std, precision)

    def score(self, x: np.ndarray) -> np.ndarray:
        """Squared distance divided by d, (n,): about 1 for images like those fitted on."""
        z = _standardised(x, self.mean, self.std)
        return ((z @ self.precision) * z).sum(1) / z.shape[1]


@dataclass(frozen=True)
class GaussianMixture(_Fitted):
    """-log density of a Gaussian mixture on standardised columns; the number of components, 1 to 3, by BIC."""

    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray
    means: np.ndarray
    roots: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, *, seed: int = 0, most: int = 3) -> Self:
        """From a table (n, d) of at least two rows; a component wants 10 d rows."""
        z = ZScore.fit(x)
        table = z.z(_table(x, 2))
        counts = range(1, 1 + max(1, min(most, len(table) // (10 * table.shape[1]))))
        fits = [_Mixture(count, reg_covar=1e-2, random_state=seed, n_init=2).fit(table) for count in counts]
        best = min(fits, key=lambda mixture: mixture.bic(table))
        return cls(z.mean, z.std, best.weights_, best.means_, best.precisions_cholesky_)

    def score(self, x: np.ndarray) -> np.ndarray:
        """-log sum_k w_k N(z; m_k, C_k), (n,), with the Cholesky factors of the inverse covariances."""
        z = _standardised(x, self.mean, self.std)
        parts = []
        for mean, root in zip(self.means, self.roots, strict=True):
            distance = np.square((z - mean) @ root).sum(1)
            parts.append(np.log(np.diag(root)).sum() - 0.5 * (distance + z.shape[1] * np.log(2 * np.pi)))
        return -logsumexp(np.log(self.weights)[:, None] + np.stack(parts), axis=0)
