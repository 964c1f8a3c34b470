"""The options of training: their ranges, the learning rate, devices, precision, TensorBoard."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from farout.core import devices
from farout.core.devices import autocast, resolve_device, resolve_precision
from farout.core.errors import FaroutError, MissingExtraError
from farout.training.config import learning_rate
from farout.training.loop import TrainingConfig, train
from test_training import BASE, _data, _linear, _network, _plain_step, _step


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "warmup"), [(2, 0), (3, 100), (10, 0), (1000, 100)])
def test_the_rate_reaches_its_floor_exactly_at_the_last_step(decay: Any, steps: int, warmup: int) -> None:
    config = TrainingConfig(steps=steps, warmup=warmup, decay=decay, learning_rate=1e-3, final_learning_rate=1e-5)
    rates = [learning_rate(config, n) for n in range(steps)]
    peak = rates.index(max(rates))
    assert rates[-1] == 1e-5
    assert max(rates) == 1e-3
    assert peak == min(warmup, (steps - 1) // 2)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_constant_rate_and_a_single_step_stay_at_the_peak() -> None:
    assert learning_rate(TrainingConfig(decay="constant"), 1999) == 3e-4
    assert learning_rate(TrainingConfig(steps=1), 0) == 3e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 5, "accumulate": 2}, "multiple of accumulate"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"final_learning_rate": 1.0}, "final_learning_rate is 1.0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"checkpoint": "first"}, "checkpoint is 'first'"),
        ({"checkpoint": "9"}, "a step from 1 to steps"),
        ({"keep": (9,)}, "steps from 1 to steps"),
    ],
)
def test_bad_options_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        replace(BASE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "fp16 requires a GPU"),
        ({"validate_every": 2}, "no validation data"),
        ({"checkpoint": "best"}, "validate_every is 0"),
        ({"checkpoint_every": 2}, "out is None"),
        ({"keep": (2,)}, "out is None"),
        ({"device": "abacus"}, "no device named 'abacus'"),
    ],
)
def test_requests_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        train(_linear(), _plain_step, _data(), replace(BASE, **changes))


def test_empty_data_frozen_networks_and_steps_without_loss_are_refused() -> None:
    with pytest.raises(FaroutError, match="no items"):
        train(_linear(), _plain_step, _data(0), BASE)
    with pytest.raises(FaroutError, match="requires_grad"):
        train(_linear().requires_grad_(False), _plain_step, _data(), BASE)
    with pytest.raises(FaroutError, match="scalar tensors with a 'loss'"):
        train(_linear(), lambda network, batch, generator: {"mse": torch.zeros(())}, _data(), BASE)


# devices, precision, TensorBoard


def test_devices_and_precisions_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = resolve_device("cpu")
    assert (cpu.type, resolve_precision("fp32", cpu), resolve_precision("bf16", cpu)) == ("cpu", "fp32", "bf16")
    for native, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(devices, "_has_native_bf16", lambda device, native=native: native)
        assert resolve_precision("auto", cpu) == precision
    with pytest.raises(FaroutError, match="precision is 'fp8'"):
        resolve_precision("fp8", cpu)
    if not torch.cuda.is_available():
        assert resolve_device("auto") == cpu
        with pytest.raises(FaroutError, match="'cuda' is not available"):
            resolve_device("cuda")


def test_autocast_in_fp32_leaves_an_outer_one_in_force() -> None:
    cpu, x = torch.device("cpu"), torch.ones(2, 2)
    with autocast(cpu, "fp32"):
        assert (x @ x).dtype == torch.float32
    with autocast(cpu, "bf16"), autocast(cpu, "fp32"):
        assert (x @ x).dtype == torch.bfloat16


def test_bf16_trains_float32_weights() -> None:
    network = _network()
    result = train(network, _step, _data(), replace(BASE, precision="bf16"))
    assert math.isfinite(result.losses["loss"])
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_tensorboard_files_hold_the_losses(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(_linear(), _step, _data(), replace(BASE, tensorboard=True), out=tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    assert written == [(e["step"], pytest.approx(e["loss"])) for e in result.history]


def test_missing_tensorboard_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"farout\[tensorboard\]"):
        train(_linear(), _plain_step, _data(), replace(BASE, tensorboard=True), out=tmp_path)


def test_channels_last_is_harmless() -> None:
    one, two = _network(0.0), _network(0.0)
    train(one, _step, _data(), replace(BASE, channels_last=True))
    train(two, _step, _data(), replace(BASE, channels_last=False))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_and_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    # without the code generator, which requires a C++ compiler
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled, plain = _network(0.0), _network(0.0)
    train(compiled, _step, _data(), replace(BASE, compile=True))
    train(plain, _step, _data(), BASE)
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert compiled._compiled_call_impl is None, "scoring has batches of many sizes"


def test_noise_and_dropout_are_fresh_for_every_step_and_part() -> None:
    noises, drops = [], []

    def step(network: torch.nn.Module, batch: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        noises.append(torch.rand((), generator=generator).item())
        drops.append(torch.rand(()).item())
        return _plain_step(network, batch, generator)

    train(_linear(), step, _data(), replace(BASE, accumulate=2))
    assert len(set(noises) | set(drops)) == 2 * 2 * BASE.steps
