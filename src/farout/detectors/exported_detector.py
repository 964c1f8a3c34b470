"""A detector as one torch module: images in, score, p-value and flag out."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from farout.data.preprocessing_graph import PreprocessingGraph
from farout.detectors.calibration import check_fitted
from farout.detectors.interface import DetectorInterface

__all__ = ["ExportedDetector"]


class ExportedDetector(nn.Module):
    """Preprocessing, networks, statistics, score and p-value of a detector.

    A score that is not a number has no p-value (NaN) and no flag. The flag is part of the graph because p-values are
    rounded in runtimes without float64, and many are equal to alpha.

    Args:
        detector: a fitted detector that implements `build_score_module`.
        any_size: see `PreprocessingGraph`.
    """

    calibration: Tensor

    def __init__(self, detector: DetectorInterface, any_size: bool = False) -> None:
        super().__init__()
        check_fitted(detector)
        self.score = detector.build_score_module().eval().requires_grad_(False)
        self.preprocessing = PreprocessingGraph(detector.preprocessing, any_size)
        calibration = np.asarray(detector.calibration_scores[detector.score_name], dtype=np.float64)
        self.register_buffer("calibration", torch.from_numpy(calibration.copy()))
        # p <= alpha: this many calibration scores may be as high; see `calibration.flag_outliers`
        self.allowed = math.floor(detector.alpha * (1 + 1e-12) * (len(calibration) + 1)) - 1

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """RGB images (B, 3, H, W), uint8 -> score float64 (B,), p-value float64 (B,), flag bool (B,)."""
        score = self.score(self.preprocessing(images))
        is_number = score.abs() < torch.inf  # also false for NaN
        at_least = (self.calibration[None, :] >= score[:, None]).to(torch.int64).sum(1)
        p_value = (1 + at_least.to(torch.float64)) / (len(self.calibration) + 1)
        flagged = is_number & (at_least <= self.allowed)
        return torch.where(is_number, score, torch.nan), torch.where(is_number, p_value, torch.nan), flagged
