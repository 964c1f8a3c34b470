# %% [markdown]
# # Write a detector in one file
#
# A detector measures numbers on each image, estimates statistics of these numbers on normal images, and computes
# scores from both. The base class does everything else: splits, calibration, p-values, flags, saving, and reports.
#
# This detector describes an image by quantiles of its gray levels, and scores the Mahalanobis distance of the
# quantiles to those of normal images. [Add a method](../add-a-detector.md) explains each method, and how to register
# a detector so that it can be saved and used by the command line.

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from farout.data.batching import Batch
from farout.detectors.base import Detector, Measurements
from farout.detectors.plots import draw_score_histogram
from farout.evaluation.metrics import detection_metrics
from farout.features.densities import Mahalanobis


class GrayLevels(Detector):
    """Mahalanobis distance of the quantiles of an image's gray levels.

    Args:
        count: number of quantiles.
    """

    score_name = "distance"

    def __init__(self, *, count: int = 8) -> None:
        self.density: Mahalanobis | None = None

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Quantiles of the images (B, C, H, W): vectors (B, count)."""
        gray = batch.images.mean(1).flatten(1)
        levels = torch.linspace(0, 1, self.config["count"] + 2)[1:-1]
        return Measurements(batch.keys, vectors={"quantiles": gray.quantile(levels, dim=1).T.contiguous()})

    def fit_statistics(self, measurements: Measurements) -> None:
        """Mean and covariance of the quantiles of normal images."""
        self.density = Mahalanobis.fit(measurements.vectors["quantiles"].double().numpy())

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """Scores by name; higher = more anomalous."""
        assert self.density is not None
        distance = self.density.score(measurements.vectors["quantiles"].double().numpy())
        return {"distance": torch.from_numpy(distance)}

    def get_state(self) -> dict[str, np.ndarray]:
        """The statistics as arrays, for saving."""
        return self.density.to_arrays() if self.density else {}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the statistics from the arrays of `get_state`."""
        self.density = Mahalanobis.from_arrays(state)


# %% [markdown]
# ## Use it
#
# It has the interface of every detector.

# %%
out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-output/new_detector")
out.mkdir(parents=True, exist_ok=True)
detector = GrayLevels().fit("sample_fashion:train", limit=1000)
normal, digits = detector.score("sample_fashion:test", limit=300), detector.score("sample_digits:test", limit=300)
metrics = detection_metrics(normal.score, digits.score)
print(f"AUROC {metrics.auroc:.3f} ({metrics.auroc_low:.3f} to {metrics.auroc_high:.3f})")
print(f"flagged: {digits.is_ood.mean():.0%} of the digits, {normal.is_ood.mean():.0%} of the clothes")

# %% [markdown]
# A difference in gray levels says little about the content of an image. Compare a new method with the baselines of
# `farout evaluate`, which include the mean color and its variance.

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
draw_score_histogram(axes, {"clothes": normal.score, "digits": digits.score}, normal.threshold)
figure.savefig(out / "figure.png", dpi=110)
