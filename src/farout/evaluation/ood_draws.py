"""The protocol of many papers: few out-of-distribution images, drawn at random, the metrics averaged over draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from farout.core.errors import FaroutError
from farout.evaluation.metrics import aupr_in, aupr_out, auroc, fpr95
from farout.training.data_order import seed_of

__all__ = ["over_draws"]

_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "auroc": auroc,
    "aupr_in": aupr_in,
    "aupr_out": aupr_out,
    "fpr95": fpr95,
}


def over_draws(id_scores: Any, ood_scores: Any, draws: int, *, share: float = 0.2, seed: int = 0) -> dict[str, float]:
    """Metrics of all in-distribution images against random ones of the others, over `draws` draws.

    Each draw takes `share` as many out-of-distribution images as there are in-distribution ones, without replacement,
    or all where there are fewer: a fifth in the protocol of Hendrycks et al. 2019 ("Deep anomaly detection with outlier
    exposure"), which the AUPR depends on. Scores that are not numbers are left out.

    Returns `auroc`, `aupr_in`, `aupr_out` and `fpr95`, means over the draws; with `_std` their standard deviations
    (n - 1; not a number for one draw); `draws`, `n_id` and `n_ood` (of one draw).

    Raises FaroutError for fewer than one draw or a share that is not positive.
    """
    if draws < 1 or share <= 0:
        raise FaroutError(f"draws is {draws}, share is {share:g}; expected 1 or more, and a positive number")
    sides = [np.asarray(side, dtype=np.float64) for side in (id_scores, ood_scores)]
    inside, outside = (side[~np.isnan(side)] for side in sides)
    count = min(len(outside), max(1, round(share * len(inside))))
    found: dict[str, float] = {"draws": draws, "n_id": len(inside), "n_ood": count}
    if not len(inside) or not len(outside):
        return {**found, **{f"{name}{end}": float("nan") for name in _METRICS for end in ("", "_std")}}
    generator = np.random.default_rng(seed_of(seed, "draws"))
    chosen = [generator.choice(outside, count, replace=False) for _ in range(draws)]
    for name, metric in _METRICS.items():
        values = np.array([metric(inside, some) for some in chosen])
        found[name] = float(values.mean())
        found[f"{name}_std"] = float(values.std(ddof=1)) if draws > 1 else float("nan")
    return found
