"""From metrics per level and draw to scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.detectors.reconstruction.comparison import METRICS
from farout.detectors.results import Measurements
from farout.features.densities import GaussianMixture, Mahalanobis, ZScore, pack_arrays, unpack_arrays

__all__ = ["Scorer", "names"]


def names() -> list[str]:
    """The indicators that `Scorer` gives."""
    return ["mean_z", "two_sided", "mahalanobis", "mixture", *[f"mean_z_{metric}" for metric in METRICS]]


class Scorer:
    """Scores from the metrics of the levels strictly between min_t and max_t, every t_skip-th.

    Draws are averaged first. With z of every (level, metric) over the statistics images:
    mean_z = mean over levels of the sum of z over `metrics` (Graham et al. 2023, section 3.3; `mean_z_<metric>` of one
    metric alone); two_sided = mean of |z|; mahalanobis and mixture = densities of the logarithms of
    `density_metrics` at all levels.
    """

    def __init__(
        self, metrics: Sequence[str], density_metrics: Sequence[str], min_t: float, max_t: float, t_skip: int
    ) -> None:
        self.metrics, self.density_metrics = tuple(metrics), tuple(density_metrics)
        self.min_t, self.max_t, self.t_skip = min_t, max_t, t_skip
        self.z: ZScore | None = None
        self.mahalanobis: Mahalanobis | None = None
        self.mixture: GaussianMixture | None = None

    def check_levels(self, levels: Sequence[float]) -> None:
        """Raises FaroutError when no level is left to score with."""
        if not self._rows(levels):
            bounds = f"min_t={self.min_t}, max_t={self.max_t}, t_skip={self.t_skip}"
            raise FaroutError(f"{bounds} leave none of the levels {list(levels)}")

    def _rows(self, levels: Sequence[float]) -> list[int]:
        kept = [row for row, t in enumerate(levels) if self.min_t < t < self.max_t]
        return kept[:: self.t_skip]

    def _values(self, measurements: Measurements) -> np.ndarray:
        """(B, level, metric) float64, chosen levels, draws averaged, in the order of METRICS."""
        assert measurements.values is not None
        order = [measurements.metrics.index(metric) for metric in METRICS]
        rows = self._rows(measurements.levels)
        return measurements.values[:, rows][..., order].double().mean(2).numpy()

    def _logs(self, values: np.ndarray) -> np.ndarray:
        chosen = values[..., [METRICS.index(metric) for metric in self.density_metrics]]
        # a perfect reconstruction has no logarithm; far below what float32 pixels resolve nothing is told apart
        return np.log(np.maximum(chosen, 1e-12)).reshape(len(values), -1)

    def fit(self, measurements: Measurements, seed: int) -> None:
        """Statistics and densities of the statistics images."""
        values = self._values(measurements)
        self.z = ZScore.fit(values.reshape(len(values), -1))
        logs = self._logs(values)
        self.mahalanobis = Mahalanobis.fit(logs)
        self.mixture = GaussianMixture.fit(logs, seed=seed)

    def _z(self, values: np.ndarray) -> np.ndarray:
        if self.z is None:
            raise FaroutError("the statistics have not been fitted; call fit first")
        return self.z.transform(values.reshape(len(values), -1)).reshape(values.shape)

    def curves(self, measurements: Measurements) -> Tensor:
        """z (B, level, metric) of the chosen levels, metrics in the order of METRICS."""
        return torch.from_numpy(self._z(self._values(measurements)))

    def __call__(self, measurements: Measurements) -> dict[str, Tensor]:
        """Every indicator, float64 (B,); NaN where a measurement is not a number."""
        values = self._values(measurements)
        good = np.isfinite(values).all((1, 2))
        found = {name: np.full(len(values), np.nan) for name in names()}
        if good.any():
            for name, score in self._scores(values[good]).items():
                found[name][good] = score
        return {name: torch.from_numpy(score) for name, score in found.items()}

    def _scores(self, values: np.ndarray) -> dict[str, np.ndarray]:
        assert self.mahalanobis is not None
        assert self.mixture is not None
        z, logs = self._z(values), self._logs(values)
        chosen = z[..., [METRICS.index(metric) for metric in self.metrics]]
        alone = {f"mean_z_{metric}": z[..., column].mean(1) for column, metric in enumerate(METRICS)}
        return {
            "mean_z": chosen.sum(2).mean(1),
            "two_sided": np.abs(chosen).mean((1, 2)),
            "mahalanobis": self.mahalanobis.score(logs),
            "mixture": self.mixture.score(logs),
            **alone,
        }

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What `fit` learnt, as arrays."""
        parts = {"z": self.z, "mahalanobis": self.mahalanobis, "mixture": self.mixture}
        return pack_arrays({name: part for name, part in parts.items() if part is not None})

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Puts `to_arrays` back."""
        self.z = ZScore.from_arrays(unpack_arrays(arrays, "z"))
        self.mahalanobis = Mahalanobis.from_arrays(unpack_arrays(arrays, "mahalanobis"))
        self.mixture = GaussianMixture.from_arrays(unpack_arrays(arrays, "mixture"))
