"""From errors per level, draw and layer to scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from farout.detectors.results import Measurements
from farout.features.densities import ZScore, pack_arrays, unpack_arrays

__all__ = ["Scorer", "metric_names", "names"]


def names(regret: bool = True) -> list[str]:
    """The indicators that `Scorer` gives; `lr` with an early denoiser only."""
    found = ["mse", "mfsim", "mfsim_released", "lr", "calibrated_mse", "calibrated_mfsim", "distance", "fused"]
    return [name for name in found if regret or name != "lr"]


def metric_names(groups: int, regret: bool) -> tuple[str, ...]:
    """What is measured of every level and draw: per group the mean squared error, 1 - cosine and, with an early
    denoiser, its mean squared error; and the Mahalanobis distance of the features, the same at all of them.
    """
    kinds = ["error", "angle", *(["first_error"] if regret else [])]
    return (*[f"{kind}_{group}" for kind in kinds for group in range(groups)], "distance")


class Scorer:
    """Scores of features whose groups have the given widths.

    With e_g and c_g the mean squared error and 1 - cosine of group g, w_g its width, averaged over levels and draws:
    mse = sum w_g e_g / sum w_g and mfsim = mean_g c_g - 1 (Yang et al. 2024, section 3.4), mfsim_released without the
    first group, as the released code has it; lr = sign (mse of the early denoiser - mse). calibrated_mse and
    calibrated_mfsim = mean over levels and groups of z(log e) and of z(log c); distance = Mahalanobis distance of the
    encoded features themselves; fused = mean of z(log mse), z(calibrated_mse) and z(log distance); z by the statistics
    images.
    """

    def __init__(self, widths: Sequence[int], regret: bool, lr_sign: int) -> None:
        self.widths, self.regret, self.lr_sign = np.array(widths, dtype=np.float64), regret, lr_sign
        self.z: ZScore | None = None
        self.parts: ZScore | None = None

    def _kind(self, measurements: Measurements, kind: str) -> np.ndarray:
        """(B, level, group) float64, draws averaged."""
        assert measurements.values is not None
        columns = [measurements.metrics.index(f"{kind}_{group}") for group in range(len(self.widths))]
        return measurements.values[..., columns].double().mean(2).numpy()

    def _logs(self, measurements: Measurements) -> np.ndarray:
        """(B, 2 x level x group)"""
        parts = [self._kind(measurements, kind) for kind in ("error", "angle")]
        # what comes back exactly has no logarithm; below 1e-9 float32 resolves nothing
        return np.log(np.maximum(np.stack(parts, axis=1), 1e-9)).reshape(len(measurements), -1)

    def _distance(self, measurements: Measurements) -> np.ndarray:
        assert measurements.values is not None
        return measurements.values[:, 0, 0, measurements.metrics.index("distance")].double().numpy()

    def fit(self, measurements: Measurements) -> None:
        """Statistics of the statistics images."""
        self.z = ZScore.fit(self._logs(measurements))
        self.parts = ZScore.fit(self._parts(self._plain(measurements)))

    def __call__(self, measurements: Measurements) -> dict[str, Tensor]:
        """Every indicator, float64 (B,)."""
        assert self.parts is not None
        found = self._plain(measurements)
        found["fused"] = self.parts.transform(self._parts(found)).mean(1)
        return {name: torch.from_numpy(found[name]) for name in names(self.regret)}

    def _plain(self, measurements: Measurements) -> dict[str, np.ndarray]:
        """Every indicator but the fusion of them."""
        assert self.z is not None
        error, angle = self._kind(measurements, "error"), self._kind(measurements, "angle")
        error_z, angle_z = np.split(self.z.transform(self._logs(measurements)), 2, axis=1)
        mse = self._weighted(error)
        found = {
            "mse": mse,
            "mfsim": angle.mean((1, 2)) - 1,
            "mfsim_released": angle[..., 1 if len(self.widths) > 1 else 0 :].mean((1, 2)) - 1,
            "calibrated_mse": error_z.mean(1),
            "calibrated_mfsim": angle_z.mean(1),
            "distance": self._distance(measurements),
        }
        if self.regret:
            found["lr"] = self.lr_sign * (self._weighted(self._kind(measurements, "first_error")) - mse)
        return found

    @staticmethod
    def _parts(found: dict[str, np.ndarray]) -> np.ndarray:
        """(B, 3): what is fused."""
        mse, distance = (np.log(np.maximum(found[name], 1e-12)) for name in ("mse", "distance"))
        return np.stack([mse, found["calibrated_mse"], distance], axis=1)

    def _weighted(self, errors: np.ndarray) -> np.ndarray:
        return (errors * self.widths).sum(2).mean(1) / self.widths.sum()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What `fit` learnt."""
        return pack_arrays(
            {name: part for name, part in {"z": self.z, "parts": self.parts}.items() if part is not None}
        )

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Puts `to_arrays` back."""
        self.z, self.parts = (
            ZScore.from_arrays(unpack_arrays(arrays, "z")),
            ZScore.from_arrays(unpack_arrays(arrays, "parts")),
        )
