"""The interface of all networks, `denoiser(x, sigma, condition) -> x0`, and the adapters that implement it.

For `x = x0 + sigma * noise` a denoiser returns the expected clean value x0. x, sigma and x0 are float32 in the
network's space; x has any shape (B, ...), sigma has shape (B,) and is positive and finite.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from farout.core.backends import Backend, NetworkRunner
from farout.core.chunking import BatchSize, call_in_chunks, check_batch_size
from farout.core.devices import Precision
from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.schedule import NoiseSchedule

__all__ = [
    "ClampedDenoiser",
    "Denoiser",
    "GaussianDenoiser",
    "GuidedDenoiser",
    "NetworkDenoiser",
    "Prediction",
    "check_prediction",
    "expand_dims",
]

Prediction = Literal["epsilon", "v_prediction", "sample"]


def check_prediction(prediction: Prediction) -> Prediction:
    """The prediction type unchanged; raises FaroutError for an unknown one."""
    if prediction not in get_args(Prediction):
        known = ", ".join(get_args(Prediction))
        raise FaroutError(f"there is no prediction type {prediction!r}; expected one of {known}")
    return prediction


class Denoiser(Protocol):
    """Anything that estimates the expected clean value of a noisy one."""

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """x (B, ...) float32, sigma (B,) -> x0 (B, ...) float32."""


def expand_dims(values: Tensor, like: Tensor) -> Tensor:
    """values (B,) reshaped to (B, 1, ...) in float32 on the device of `like`, so that they multiply its rows."""
    return values.to(device=like.device, dtype=torch.float32).reshape(-1, *[1] * (like.ndim - 1))


class NetworkDenoiser:
    """Adapter of a discrete-time, variance-preserving network, called as diffusers' networks are.

    With sigma = sqrt((1 - abar) / abar) and x_vp = x / sqrt(1 + sigma^2), the network's output is, by `prediction`:
    eps (`epsilon`), v = sqrt(abar) eps - sqrt(1 - abar) x0 (`v_prediction`, Salimans & Ho 2022) or x0 (`sample`).

    Args:
        network: called as `network(x_vp, t, **condition).sample`; learned variances (twice the channels) are dropped.
        schedule: the schedule that the network was trained with.
        prediction: what the network predicts.
        batch_size: the most rows of one network call; `auto`: by memory (see `call_in_chunks`).
        precision: fp32, bf16 or fp16; outputs become float32 before x0 is formed.
        null: count -> the condition of rows that are given none; None: the network is called without a condition.
        backend: the library that evaluates the network where no gradients are recorded.

    Raises FaroutError for an unknown prediction type.

    Attributes:
        evaluations: rows evaluated so far, guidance branches included.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        prediction: Prediction = "epsilon",
        batch_size: BatchSize = "auto",
        precision: Precision = "fp32",
        null: Callable[[int], Condition] | None = None,
        backend: Backend = "eager",
    ) -> None:
        self.network, self.schedule, self.prediction = network, schedule, check_prediction(prediction)
        self.batch_size, self.precision, self.null = check_batch_size(batch_size), precision, null
        self.backend = backend
        self._runners: dict[tuple[str, ...], NetworkRunner] = {}  # by names of the condition's tensors
        self.evaluations = 0

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """The network's output (eps, v or x0), float32, shape of x; differentiable in x and the condition.

        Raises FaroutError for a sigma that is not positive and finite.
        """
        _check_sigma(sigma)
        self.evaluations += len(x)
        t = self.schedule.t_of(sigma).to(device=x.device, dtype=torch.float32)
        scaled = x / (1 + expand_dims(sigma, x) ** 2).sqrt()
        if condition is None and self.null is not None:
            condition = self.null(len(x))
        tensors = dict(condition.tensors) if condition is not None else {}

        if tuple(tensors) not in self._runners:
            self._runners[tuple(tensors)] = NetworkRunner(_Prediction(self.network, tuple(tensors)), "denoiser")
        call = partial(self._runners[tuple(tensors)], precision=self.precision, backend=self.backend)
        return call_in_chunks(self.network, call, scaled, t, *tensors.values(), batch_size=self.batch_size)

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """The expected clean value, float32, shape of x."""
        return self.to_x0(x, sigma, self.predict(x, sigma, condition))

    def to_x0(self, x: Tensor, sigma: Tensor, predicted: Tensor) -> Tensor:
        """x0 from the network's output: x - sigma eps, or x / (1 + sigma^2) - sigma v / sqrt(1 + sigma^2)."""
        sigma = expand_dims(sigma, x)
        if self.prediction == "epsilon":
            return x - sigma * predicted
        if self.prediction == "v_prediction":
            return (x / (1 + sigma**2).sqrt() - sigma * predicted) / (1 + sigma**2).sqrt()
        return predicted

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The target of the training loss for `x0 + sigma noise`: eps, v or x0."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "v_prediction":
            sigma = expand_dims(sigma, x0)
            return (noise - sigma * x0) / (1 + sigma**2).sqrt()
        return x0


class _Prediction(nn.Module):
    """A network's output, float32, for positional arguments: x, t, and the named tensors of a condition."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, scaled: Tensor, t: Tensor, *values: Tensor) -> Tensor:
        output: Any = self.network(scaled, t, **dict(zip(self.names, values, strict=True)))
        prediction: Tensor = (output.sample if hasattr(output, "sample") else output).float()
        return prediction[:, : scaled.shape[1]]  # without learned variances


def _check_sigma(sigma: Tensor) -> None:
    """Raises FaroutError for a sigma that is not positive and finite."""
    if sigma.numel() and not bool(((sigma > 0) & torch.isfinite(sigma)).all()):
        raise FaroutError(f"a denoiser requires positive, finite sigmas, got {sigma.min():g} to {sigma.max():g}")


class ClampedDenoiser:
    """A denoiser whose x0 is clamped to [low, high]."""

    def __init__(self, denoiser: Denoiser, low: float, high: float) -> None:
        self.denoiser, self.low, self.high = denoiser, low, high

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """x0 of the inner denoiser, clamped."""
        return self.denoiser(x, sigma, condition).clamp(self.low, self.high)


class GuidedDenoiser:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale (conditional - null), both branches in one batch.

    Args:
        denoiser: a conditional denoiser.
        scale: 1 is conditional, 0 unconditional; the weight omega of (1 + omega) cond - omega null is scale - 1.
        null: count -> the null condition of that many rows.
    """

    def __init__(self, denoiser: Denoiser, scale: float, null: Callable[[int], Condition]) -> None:
        self.denoiser, self.scale, self.null = denoiser, scale, null

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """Guided x0; raises FaroutError without a condition."""
        if condition is None:
            raise FaroutError("guidance requires a condition; call the inner denoiser for an unconditional prediction")
        if self.scale == 1:
            return self.denoiser(x, sigma, condition)
        both = Condition.join([condition, self.null(len(x))])
        conditional, null = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return null + self.scale * (conditional - null)


class GaussianDenoiser:
    """The exact denoiser of Gaussian data, for tests: x0 = mean + C (C + sigma^2 I)^-1 (x - mean).

    Args:
        mean: (D,) mean of the data.
        covariance: (D, D) covariance of the data.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean = mean.double()
        self.eigenvalues, self.basis = torch.linalg.eigh(covariance.double())
        self.evaluations = 0

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """x (B, ...) with D values per row -> the posterior mean, in x's type and shape."""
        _check_sigma(sigma)
        self.evaluations += len(x)
        centered = (x.double().flatten(1) - self.mean) @ self.basis
        gain = self.eigenvalues / (self.eigenvalues + sigma.double()[:, None] ** 2)
        return (self.mean + (gain * centered) @ self.basis.T).reshape(x.shape).to(x.dtype)
