"""What a training run logs: means per interval, kept as a history that survives a resume, and TensorBoard."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farout.core.errors import MissingExtraError

__all__ = ["Means", "TrainingLog"]


class Means:
    """Means of logged values since they were last taken; values that are not finite are left out."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, values: dict[str, float], weight: float = 1.0) -> None:
        """Takes one value of each name."""
        for name, value in values.items():
            if math.isfinite(value):
                total, count = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = [total + weight * value, count + weight]

    @classmethod
    def joined(cls, parts: Sequence[dict[str, list[float]]]) -> Means:
        """The means over the sums of several processes."""
        means = cls()
        for name in sorted({name for sums in parts for name in sums}):
            found = [sums[name] for sums in parts if name in sums]
            means.sums[name] = [math.fsum(total for total, _ in found), math.fsum(count for _, count in found)]
        return means

    def take(self) -> dict[str, float]:
        """The means by name; counting starts anew."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means


class TrainingLog:
    """History of a run: the means of every `interval` updates, and one entry per validation."""

    def __init__(self, interval: int) -> None:
        self.interval, self.history = interval, list[dict[str, float]]()
        self.means, self.recent = Means(), deque[float](maxlen=5)
        self._writer: Any = None

    def open(self, folder: Path, step: int) -> None:
        """Also writes TensorBoard files from `step` on; raises MissingExtraError without tensorboard."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError('tensorboard is not installed; pip install "farout[tensorboard]"') from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def close(self) -> None:
        """Ends the TensorBoard file, if there is one."""
        if self._writer is not None:
            self._writer.close()

    def add(self, step: int, values: dict[str, float], last: bool) -> None:
        """Takes the values of one update; its `loss` must be among them."""
        self.recent.append(values["loss"])
        self.means.add(values)
        if last or step % self.interval == 0:
            self.entry(step, self.means.take())

    def entry(self, step: int, values: dict[str, float]) -> None:
        """Adds one entry to the history."""
        self.history.append({"step": step, **values})
        for name, value in values.items() if self._writer is not None else ():
            self._writer.add_scalar(name, value, step)

    def state(self) -> dict[str, Any]:
        """For `state.json`."""
        return {"history": self.history, "means": self.means.sums, "recent": list(self.recent)}

    def load(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` gave."""
        self.history, self.means.sums = state["history"], state["means"]
        self.recent.extend(state["recent"])

    def last(self) -> dict[str, float]:
        """The values of the last entry of training, without its step."""
        found = next(entry for entry in reversed(self.history) if "loss" in entry)
        return {name: value for name, value in found.items() if name != "step"}
