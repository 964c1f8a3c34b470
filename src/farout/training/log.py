"""The values that a training run logs: means per interval, in a history that survives a resume, and TensorBoard."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farout.core.errors import MissingExtraError

__all__ = ["RunningMeans", "TrainingLog"]


class RunningMeans:
    """Weighted means of named values; values that are not finite are ignored.

    Attributes:
        sums: for each name, the weighted sum and the sum of the weights.
    """

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, values: dict[str, float], weight: float = 1.0) -> None:
        """Add one value of each name."""
        for name, value in values.items():
            if math.isfinite(value):
                total, count = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = [total + weight * value, count + weight]

    @classmethod
    def merge(cls, sums_of_processes: Sequence[dict[str, list[float]]]) -> RunningMeans:
        """The means over the `sums` of several processes."""
        means = cls()
        for name in sorted({name for sums in sums_of_processes for name in sums}):
            pairs = [sums[name] for sums in sums_of_processes if name in sums]
            means.sums[name] = [math.fsum(total for total, _ in pairs), math.fsum(count for _, count in pairs)]
        return means

    def pop(self) -> dict[str, float]:
        """The means by name; afterwards there are no values."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means


class TrainingLog:
    """The history of a training run.

    Args:
        interval: number of updates that one entry of the history averages.

    Attributes:
        history: one dict per interval and one per validation, each with its `step`.
        recent: losses of the last updates.
    """

    def __init__(self, interval: int) -> None:
        self.interval, self.history = interval, list[dict[str, float]]()
        self.means, self.recent = RunningMeans(), deque[float](maxlen=5)
        self._tensorboard: Any = None

    def open_tensorboard(self, folder: Path, step: int) -> None:
        """Also write TensorBoard files, from `step` on. Raises MissingExtraError if tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError('tensorboard is not installed; pip install "farout[tensorboard]"') from error
        self._tensorboard = SummaryWriter(str(folder), purge_step=step + 1)

    def close(self) -> None:
        """Close the TensorBoard file, if there is one."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def add_update(self, step: int, values: dict[str, float], is_last: bool) -> None:
        """Add the values of one update, `loss` among them."""
        self.recent.append(values["loss"])
        self.means.add(values)
        if is_last or step % self.interval == 0:
            self.add_entry(step, self.means.pop())

    def add_entry(self, step: int, values: dict[str, float]) -> None:
        """Add one entry to the history."""
        self.history.append({"step": step, **values})
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {"history": self.history, "means": self.means.sums, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.history, self.means.sums = state["history"], state["means"]
        self.recent.extend(state["recent"])

    def last_training_values(self) -> dict[str, float]:
        """The values of the last entry with a `loss`, without its step."""
        entry = next(entry for entry in reversed(self.history) if "loss" in entry)
        return {name: value for name, value in entry.items() if name != "step"}
