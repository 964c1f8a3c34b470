"""Metrics averaged over random subsets of the out-of-distribution images, the protocol of many papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from farout.core.errors import FaroutError
from farout.evaluation.metrics import aupr_in, aupr_out, auroc, fpr95
from farout.training.data_order import seed_of

__all__ = ["average_over_subsets"]

_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "auroc": auroc,
    "aupr_in": aupr_in,
    "aupr_out": aupr_out,
    "fpr95": fpr95,
}


def average_over_subsets(
    id_scores: Any, ood_scores: Any, draws: int, *, share: float = 0.2, seed: int = 0
) -> dict[str, float]:
    """Average metrics over random subsets of the out-of-distribution images.

    A subset has `share` as many out-of-distribution images as there are in-distribution ones, drawn without
    replacement, or all of them if there are fewer. Hendrycks et al. 2019 ("Deep anomaly detection with outlier
    exposure") use one fifth, on which the AUPR depends. NaN scores are left out.

    Args:
        id_scores: scores of all in-distribution images, (N,).
        ood_scores: scores of all out-of-distribution images, (M,).
        draws: number of subsets.
        share: size of a subset, relative to the in-distribution images.
        seed: seed of the subsets.

    Returns:
        `auroc`, `aupr_in`, `aupr_out` and `fpr95`, means over the subsets; with `_std` their standard deviations
        (n - 1; NaN for one subset); `draws`, `n_id`, and `n_ood` of one subset.

    Raises:
        FaroutError: fewer than one subset, or a share that is not positive.
    """
    if draws < 1 or share <= 0:
        raise FaroutError(f"draws is {draws}, share is {share:g}; expected 1 or more, and a positive number")
    id_scores, ood_scores = (np.asarray(scores, dtype=np.float64) for scores in (id_scores, ood_scores))
    id_scores, ood_scores = id_scores[~np.isnan(id_scores)], ood_scores[~np.isnan(ood_scores)]
    size = min(len(ood_scores), max(1, round(share * len(id_scores))))
    averages: dict[str, float] = {"draws": draws, "n_id": len(id_scores), "n_ood": size}
    if not len(id_scores) or not len(ood_scores):
        return averages | {f"{name}{suffix}": float("nan") for name in _METRICS for suffix in ("", "_std")}
    generator = np.random.default_rng(seed_of(seed, "draws"))
    subsets = [generator.choice(ood_scores, size, replace=False) for _ in range(draws)]
    for name, metric in _METRICS.items():
        values = np.array([metric(id_scores, subset) for subset in subsets])
        averages[name] = float(values.mean())
        averages[f"{name}_std"] = float(values.std(ddof=1)) if draws > 1 else float("nan")
    return averages
