"""The one contract for a network: `denoiser(x, sigma, condition) -> x0`, and the adapters that keep it.

`x = x0 + sigma * noise`; the answer is the expected clean value. x, sigma and x0 are float32 in the network's space,
x of any shape (B, …), sigma (B,), positive and finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from farout.core.chunking import BatchSize, call_in_chunks, check_batch_size
from farout.core.devices import Precision, autocast
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
    """The prediction as it is; raises FaroutError for another word."""
    if prediction not in get_args(Prediction):
        known = ", ".join(get_args(Prediction))
        raise FaroutError(f"a network that predicts {prediction!r} is not known; expected one of {known}")
    return prediction


class Denoiser(Protocol):
    """Anything that tells the expected clean value of a noisy one."""

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """x (B, …) float32, sigma (B,) -> x0 (B, …) float32."""


def expand_dims(values: Tensor, like: Tensor) -> Tensor:
    """values (B,) reshaped to (B, 1, …) on the device of `like`, in float32, to multiply a batch row by row."""
    return values.to(device=like.device, dtype=torch.float32).reshape(-1, *[1] * (like.ndim - 1))


class NetworkDenoiser:
    """Adapter of a discrete-time, variance-preserving network (diffusers' call) to the contract.

    With sigma = sqrt((1 - abar) / abar) and x_vp = x / sqrt(1 + sigma^2), the network's answer is, by `prediction`:
    eps (`epsilon`), v = sqrt(abar) eps - sqrt(1 - abar) x0 (`v_prediction`, Salimans & Ho 2022) or x0 (`sample`).

    Args:
        network: called as `network(x_vp, t, **condition).sample`; learned variances (twice the channels) are dropped.
        schedule: the schedule that the network was trained with.
        prediction: what the network predicts.
        batch_size: the most rows of one network call; `auto`: by memory (see `call_in_chunks`).
        precision: fp32, bf16 or fp16; outputs become float32 before x0 is formed.
        null: gives the condition of a number of rows where none is given; None: the network gets none.

    Raises FaroutError for an unknown prediction.

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
    ) -> None:
        self.network, self.schedule, self.prediction = network, schedule, check_prediction(prediction)
        self.batch_size, self.precision, self.null = check_batch_size(batch_size), precision, null
        self.evaluations = 0

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """The network's native answer (eps, v or x0), float32, shape of x; differentiable in x and the condition.

        Raises FaroutError for a sigma that is not positive and finite.
        """
        _check_sigma(sigma)
        self.evaluations += len(x)
        t = self.schedule.t_of(sigma).to(device=x.device, dtype=torch.float32)
        scaled = x / (1 + expand_dims(sigma, x) ** 2).sqrt()
        if condition is None and self.null is not None:
            condition = self.null(len(x))
        tensors = dict(condition.tensors) if condition is not None else {}

        def call(scaled: Tensor, t: Tensor, *values: Tensor) -> Tensor:
            return self._network(scaled, t, dict(zip(tensors, values, strict=True)))

        return call_in_chunks(self.network, call, scaled, t, *tensors.values(), batch_size=self.batch_size)

    def _network(self, scaled: Tensor, t: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        with autocast(scaled.device, self.precision):
            output: Any = self.network(scaled, t, **tensors)
        answer = (output.sample if hasattr(output, "sample") else output).float()
        return answer[:, : scaled.shape[1]]

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """The expected clean value, float32, shape of x."""
        return self.clean(x, sigma, self.predict(x, sigma, condition))

    def clean(self, x: Tensor, sigma: Tensor, predicted: Tensor) -> Tensor:
        """x0 from the native answer at (x, sigma): x - sigma eps; x / (1 + sigma^2) - sigma v / sqrt(1 + sigma^2)."""
        wide = expand_dims(sigma, x)
        if self.prediction == "epsilon":
            return x - wide * predicted
        if self.prediction == "v_prediction":
            return (x / (1 + wide**2).sqrt() - wide * predicted) / (1 + wide**2).sqrt()
        return predicted

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network should answer for `x0 + sigma noise`: the target of its training loss."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "v_prediction":
            wide = expand_dims(sigma, x0)
            return (noise - wide * x0) / (1 + wide**2).sqrt()
        return x0


def _check_sigma(sigma: Tensor) -> None:
    if sigma.numel() and not bool(((sigma > 0) & torch.isfinite(sigma)).all()):
        raise FaroutError(f"a denoiser requires positive, finite sigmas, got {sigma.min():g} to {sigma.max():g}")


class ClampedDenoiser:
    """A denoiser whose answer is clamped to [low, high]."""

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
        null: gives the null condition of a number of rows.
    """

    def __init__(self, denoiser: Denoiser, scale: float, null: Callable[[int], Condition]) -> None:
        self.denoiser, self.scale, self.null = denoiser, scale, null

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """Guided x0; raises FaroutError without a condition to guide by."""
        if condition is None:
            raise FaroutError("guidance requires a condition; call the inner denoiser for an unconditional answer")
        if self.scale == 1:
            return self.denoiser(x, sigma, condition)
        both = Condition.join([condition, self.null(len(x))])
        with_it, without = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return without + self.scale * (with_it - without)


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
        """x (B, …) with D values a row -> the posterior mean, in x's type and shape."""
        _check_sigma(sigma)
        self.evaluations += len(x)
        centred = (x.double().flatten(1) - self.mean) @ self.basis
        gain = self.eigenvalues / (self.eigenvalues + sigma.double()[:, None] ** 2)
        return (self.mean + (gain * centred) @ self.basis.T).reshape(x.shape).to(x.dtype)
