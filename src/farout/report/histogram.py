"""Two distributions of scores over one axis, as bars that a page draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Histogram"]


@dataclass(frozen=True)
class Histogram:
    """Bars of two samples, heights as percent of the tallest; the last bar gathers what lies above the axis.

    edges: (bins + 1,) of the axis; above: whether anything lies beyond it; mark: where the score lies beyond which
    images are flagged, as percent of the axis, or None where nothing can be.
    """

    edges: np.ndarray
    first: tuple[float, ...]
    second: tuple[float, ...]
    above: bool
    mark: float | None

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray, limit: float, high: float, bins: int = 48) -> Histogram:
        """Shares of either sample (numbers only, at least one altogether) between their smallest value and `high`."""
        everything = np.concatenate([first, second])
        low = float(everything.min())
        edges = np.linspace(low, high if high > low else low + 1, bins)
        edges[-1] += 1e-9 * (edges[-1] - low)  # a value of `high` lies below the last bar
        edges = np.append(edges, 2 * edges[-1] - edges[-2])
        shares = [
            np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(1, len(values))
            for values in (first, second)
        ]
        tallest = max(share.max() for share in shares)
        one, other = (tuple(round(100 * float(share) / tallest, 2) for share in values) for values in shares)
        place = 100 * (limit - edges[0]) / (edges[-1] - edges[0])
        mark = round(float(place), 2) if np.isfinite(place) else None
        return cls(edges, one, other, bool(everything.max() > edges[-1]), mark)

    @property
    def ends(self) -> tuple[str, str]:
        """The first and the last score of the axis, as text."""
        return f"{self.edges[0]:.3g}", f"{self.edges[-1]:.3g}"

    @property
    def width(self) -> float:
        """Of a bar, as percent of the axis."""
        return round(100 / len(self.first), 4)

    def outline(self, bars: tuple[float, ...]) -> str:
        """A closed path around bars, in a square of 100 by 100 whose first row is the top."""
        steps = " ".join(f"V{round(100 - height, 1):g}h{self.width:g}" for height in bars)
        return f"M0 100{steps}V100Z"
