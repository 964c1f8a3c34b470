"""The training loop: exact resume, several processes, schedules, averages, checkpoints, errors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from farout.core.errors import FaroutError, StoreError
from farout.training.checkpoints import (
    checkpoint_folders,
    checkpoint_weights,
    read_state,
    step_folder,
    write_checkpoint,
)
from farout.training.data_order import DataOrder
from farout.training.loop import TrainingConfig, train
from launch import in_two_processes

BASE = TrainingConfig(
    steps=8, batch_size=6, learning_rate=1e-2, warmup=2, ema=0.9, device="cpu", precision="fp32", clip=1.0
)


def _data(count: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 4, 4, generator=generator)
    return TensorDataset(x, x.flatten(1).sum(1))


def _network(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 1))


def _step(network: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
    x, y = batch
    noisy = x + 0.1 * torch.randn(x.shape, generator=generator).to(x.device)
    loss = (network(noisy)[:, 0] - y).square().mean()
    return {"loss": loss, "error": loss.detach().sqrt()}


def _plain_step(network: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
    return {"loss": (network(batch[0])[:, 0] - batch[1]).square().mean()}


def _linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 1))


class _StopAt:
    """A step that fails at its n-th call, after a forward pass that moves running statistics."""

    def __init__(self, call: int, error: type[BaseException]) -> None:
        self.left, self.error = call, error

    def __call__(self, network: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        self.left -= 1
        losses = _step(network, batch, generator)
        if self.left < 0:
            raise self.error("stopped")
        return losses


def _same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "sgd", "weight_decay": 1e-3},
        {"accumulate": 2, "checkpoint": "best", "validate_every": 2},
        {"ema": None, "optimizer": "adam", "clip": None, "decay": "linear"},
    ],
)
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, changes: dict[str, Any], stop: type[BaseException]
) -> None:
    config = replace(BASE, checkpoint_every=2, **changes)
    validation = _data(7) if config.validate_every else None
    whole = _network()
    expected = train(whole, _step, _data(), config, out=tmp_path / "whole", validation=validation)
    calls = (5 if validation is None else 7) * config.accumulate
    with pytest.raises(stop):
        train(_network(), _StopAt(calls, stop), _data(), config, out=tmp_path / "cut", validation=validation)
    assert max(checkpoint_folders(tmp_path / "cut")) in ((4,) if stop is RuntimeError else (4, 5, 6))
    torch.manual_seed(99)
    resumed = _network()
    found = train(resumed, _step, _data(), config, out=tmp_path / "cut", validation=validation, resume=True)
    assert _same(resumed, whole)
    assert found == expected


def test_an_interruption_saves_the_last_completed_step(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(_network(), _StopAt(5, KeyboardInterrupt), _data(), BASE, out=tmp_path)
    state = read_state(step_folder(tmp_path, 5))
    assert (state["step"], state["random_state"]) == (5, "derived from seed, step and process")
    assert set(checkpoint_folders(tmp_path)) == {5}


def test_a_crash_costs_no_more_than_the_time_between_two_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = _network(), _network()
    expected = train(whole, _step, _data(), BASE)
    monkeypatch.setattr("farout.training.loop._CHECKPOINT_INTERVAL_S", 0.0)
    with pytest.raises(RuntimeError, match="stopped"):
        train(_network(), _StopAt(5, RuntimeError), _data(), BASE, out=tmp_path)
    assert set(checkpoint_folders(tmp_path)) == {5}
    assert train(resumed, _StopAt(BASE.steps - 5, RuntimeError), _data(), BASE, out=tmp_path, resume=True) == expected
    assert _same(resumed, whole)
    assert set(checkpoint_folders(tmp_path)) == {BASE.steps}


def test_an_interruption_of_a_write_writes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints" / ".step_00000002.killed").mkdir(parents=True)
    calls = 0

    def write(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        write_checkpoint(*given)

    monkeypatch.setattr("farout.training.loop.write_checkpoint", write)
    with pytest.raises(KeyboardInterrupt):
        train(_network(), _step, _data(), replace(BASE, checkpoint_every=3), out=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_finished_run_resumes_to_its_result(tmp_path: Path) -> None:
    first, second = _network(), _network()
    result = train(first, _step, _data(), BASE, out=tmp_path)
    assert train(second, _StopAt(0, RuntimeError), _data(), BASE, out=tmp_path, resume=True) == result
    assert _same(first, second)


def test_the_caller_keeps_its_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    network = _network()
    torch.manual_seed(5)
    train(network, _step, _data(), BASE)
    assert torch.equal(torch.rand(3), expected)


class _Augmented(Dataset):
    """Random per item: the loop must make that a function of the position."""

    def __init__(self) -> None:
        self.base = _data()

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.base[index]
        return x + torch.rand(()), y


def test_workers_change_nothing_even_with_random_augmentation() -> None:
    one, two = _network(), _network()
    train(one, _step, _Augmented(), replace(BASE, steps=3))
    train(two, _step, _Augmented(), replace(BASE, steps=3, workers=1))
    assert _same(one, two)


def test_accumulation_equals_the_large_batch() -> None:
    one, three = _linear(), _linear()
    config = replace(BASE, optimizer="sgd", clip=None)  # neither hides the scale of a gradient
    train(one, _plain_step, _data(), config)
    train(three, _plain_step, _data(), replace(config, accumulate=3))
    for a, b in zip(one.parameters(), three.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


# data order


def test_each_item_is_seen_once_per_epoch_and_the_tail_is_carried_over() -> None:
    seen: list[int] = []

    def step(network: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        seen.extend(batch[1].long().tolist())
        return {"loss": network(batch[0]).mean()}

    data = TensorDataset(torch.randn(7, 1, 4, 4), torch.arange(7.0))
    train(_linear(), step, data, replace(BASE, steps=7, batch_size=3))
    epochs = [seen[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    order = DataOrder(7, 0)
    assert seen == [order[i] for i in range(21)]
    assert [order[i] for i in (15, 2, 9)] == [seen[15], seen[2], seen[9]]


def test_another_seed_gives_another_order() -> None:
    assert [DataOrder(50, 0)[i] for i in range(50)] != [DataOrder(50, 1)[i] for i in range(50)]


def test_a_batch_may_be_larger_than_the_data() -> None:
    assert train(_linear(), _plain_step, _data(4), replace(BASE, steps=2)).images == 12


# average


def test_the_average_has_the_value_computed_by_hand(tmp_path: Path) -> None:
    config = replace(BASE, steps=3, ema=0.15, checkpoint_every=1)
    network = _linear()
    expected = network[1].weight.detach().clone()
    train(network, _plain_step, _data(), config, out=tmp_path)
    for n, decay in enumerate([0.1, 0.15, 0.15]):  # (1 + n) / (10 + n) is 0.1, 2/11, ...
        weights = checkpoint_weights(step_folder(tmp_path, n + 1), average=False)["1.weight"]
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(network[1].weight.detach(), expected)
    assert not network.training


def test_buffers_of_the_average_are_those_of_the_network(tmp_path: Path) -> None:
    network = _network()
    train(network, _step, _data(), BASE, out=tmp_path)
    raw = checkpoint_weights(step_folder(tmp_path, 8), average=False)
    assert torch.equal(network[1].running_mean, raw["1.running_mean"])
    assert int(network[1].num_batches_tracked) == 8
    assert not torch.equal(network[5].weight, raw["5.weight"])


def test_frozen_parameters_stay() -> None:
    network = _network()
    network[0].weight.requires_grad_(False)
    before = network[0].weight.clone()
    train(network, _step, _data(), replace(BASE, weight_decay=0.1))
    assert torch.equal(network[0].weight, before)


# which weights, which checkpoints


def _drifting_step(network: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Trains the weight upwards past 1, where its validation loss is lowest."""
    weight = network.weight.sum()
    return {"loss": -weight if network.training else (weight - 1).square()}


class _Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(("checkpoint", "step"), [("last", 8), ("best", 4), ("6", 6)])
@pytest.mark.parametrize("saved", [False, True])
def test_last_best_or_a_step_is_returned(tmp_path: Path, checkpoint: str, step: int, saved: bool) -> None:
    config = replace(
        BASE, optimizer="sgd", momentum=0.0, learning_rate=0.25, decay="constant", warmup=0, ema=None, clip=None,
        checkpoint=checkpoint, validate_every=1,
    )  # fmt: skip
    network = _Weight()
    result = train(network, _drifting_step, _data(), config, out=tmp_path if saved else None, validation=_data(5))
    assert (result.chosen_step, result.best_step, result.best_loss) == (step, 4, 0.0)
    assert network.weight.item() == 0.25 * step
    assert [e["step"] for e in result.history if "validation_loss" in e] == list(range(1, 9))
    if saved:
        assert set(checkpoint_folders(tmp_path)) == {4, 8, step}
        again = _Weight()
        train(again, _drifting_step, _data(), config, out=tmp_path, validation=_data(5), resume=True)
        assert _same(again, network)


def test_validation_has_the_same_noise_each_time_and_counts_items() -> None:
    def step(network: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.randn(1, generator=generator)
        return {"loss": network.weight.sum(), "noise": noise, "mean": batch[1].mean()}

    config = replace(BASE, validate_every=3)
    validation = _data(8)
    history = train(_Weight(), step, _data(), config, validation=validation).history
    found = [entry for entry in history if "validation_loss" in entry]
    assert [entry["step"] for entry in found] == [3, 6, 8]
    assert len({entry["validation_noise"] for entry in found}) == 1
    assert found[0]["validation_mean"] == pytest.approx(float(validation.tensors[1].mean()), abs=1e-6)


def test_multiples_and_the_last_checkpoint_are_kept(tmp_path: Path) -> None:
    train(_linear(), _plain_step, _data(), replace(BASE, steps=7, checkpoint_every=3), out=tmp_path)
    folders = checkpoint_folders(tmp_path)
    assert list(folders) == [3, 6, 7]
    names = {"model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"}
    assert {path.name for path in folders[3].iterdir()} == names


def test_the_checkpoints_of_named_steps_are_kept_over_a_resume(tmp_path: Path) -> None:
    """A score that compares an early state with the last one needs both."""
    config = replace(BASE, keep=(2, 5))
    train(_network(), _step, _data(), config, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(_network(), _StopAt(4, KeyboardInterrupt), _data(), config, out=tmp_path / "cut")
    train(_network(), _step, _data(), config, out=tmp_path / "cut", resume=True)
    assert list(checkpoint_folders(tmp_path / "cut")) == [2, 5, 8]
    early = [checkpoint_weights(step_folder(tmp_path / name, 5)) for name in ("whole", "cut")]
    assert all(torch.equal(value, early[1][name]) for name, value in early[0].items())


def test_a_broken_checkpoint_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(BASE, checkpoint_every=2)
    whole, resumed = _network(), _network()
    train(whole, _step, _data(), config, out=tmp_path)
    broken = step_folder(tmp_path, 8) / "model.safetensors"
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(bytes(content))
    (step_folder(tmp_path, 6) / "state.json").unlink()
    train(resumed, _step, _data(), config, out=tmp_path, resume=True)
    assert _same(whole, resumed)
    assert "step_00000008 is ignored" in caplog.text
    assert "step_00000006 is ignored" in caplog.text
    assert set(checkpoint_folders(tmp_path)) == {2, 4, 6, 8}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "folder", "text"])
def test_every_damage_of_a_checkpoint_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    """Training continues from the checkpoint before it."""
    train(_linear(), _plain_step, _data(), replace(BASE, steps=4, checkpoint_every=2), out=tmp_path)
    path = step_folder(tmp_path, 4) / name
    content = path.read_bytes()
    middle = len(content) // 2
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "flip":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes({"cut": content[:middle], "empty": b"", "text": b"words"}[damage])
    assert list(checkpoint_folders(tmp_path)) == [2]
    assert "step_00000004 is ignored" in caplog.text
    if name == "model.safetensors":
        with pytest.raises(StoreError, match=r"model\.safetensors"):
            checkpoint_weights(step_folder(tmp_path, 4), average=False)


def test_a_resume_without_checkpoint_starts_anew(tmp_path: Path) -> None:
    assert train(_linear(), _plain_step, _data(), BASE, out=tmp_path, resume=True).steps == 8


# refusals


def test_resume_refuses_other_options_data_and_networks(tmp_path: Path) -> None:
    train(_linear(), _plain_step, _data(), BASE, out=tmp_path, fingerprint="a")
    cases: list[tuple[dict[str, Any], nn.Module, str, str]] = [
        ({"learning_rate": 0.5}, _linear(), "a", r"learning_rate: 0.01 in the checkpoint, 0.5 now"),
        ({"steps": 9}, _linear(), "a", "steps: 8 in the checkpoint, 9 now"),
        ({}, _linear(), "b", "fingerprint: 'a' in the checkpoint, 'b' now"),
        ({}, nn.Linear(2, 2), "a", "another network"),
    ]
    for changes, network, fingerprint, message in cases:
        with pytest.raises(StoreError, match=message):
            train(network, _plain_step, _data(), replace(BASE, **changes), out=tmp_path, resume=True,
                  fingerprint=fingerprint)  # fmt: skip
    with pytest.raises(StoreError, match="data_size: 20 in the checkpoint, 19 now"):
        train(_linear(), _plain_step, _data(19), BASE, out=tmp_path, resume=True, fingerprint="a")
    free = replace(BASE, workers=1, tensorboard=True)
    assert train(_linear(), _plain_step, _data(), free, out=tmp_path, resume=True, fingerprint="a").steps == 8


def test_a_folder_with_checkpoints_is_not_overwritten(tmp_path: Path) -> None:
    train(_linear(), _plain_step, _data(), BASE, out=tmp_path)
    with pytest.raises(FaroutError, match="earlier run"):
        train(_linear(), _plain_step, _data(), BASE, out=tmp_path)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_it_reaches_weights_or_checkpoints(tmp_path: Path, where: str) -> None:
    calls = 0

    def step(network: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        loss = _plain_step(network, batch, generator)["loss"]
        bad = calls == 6
        # sqrt at 0 has a finite value and an infinite slope
        return {"loss": (loss * math.nan if where == "loss" else (loss * 0).sqrt()) if bad else loss}

    network = _linear()
    with pytest.raises(FaroutError, match=r"step 6: .*last finite losses were [\d., ]+\. Try a lower learning_rate"):
        train(network, step, _data(), replace(BASE, checkpoint_every=5), out=tmp_path)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert set(checkpoint_folders(tmp_path)) == {5}


# several processes

SCRIPT = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_training as t
from dataclasses import replace
import farout.training.loop
torch.set_num_threads(1)
farout.training.loop._CHECKPOINT_INTERVAL_S = 0.0  # the first process writes a checkpoint after every step
out, rank, seen = Path({out!r}), os.environ["RANK"], []

def step(network, batch, generator):
    if network.training:
        seen.extend(batch[1].tolist())
    return t._plain_step(network, batch, generator)

network, config = t._linear(), replace(t.BASE, batch_size=4, steps=10, validate_every=4, accumulate=2)
with torch.no_grad():
    network[1].weight.add_(int(rank))  # every process starts from the weights of the first
result = t.train(network, step, t._data(), config, out=out, validation=t._data(7))
torch.save({{"weights": network.state_dict(), "seen": seen, "history": result.history}}, out / f"{{rank}}.pt")
"""


@pytest.mark.slow
def test_two_processes_share_the_data_and_agree_with_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    in_two_processes(script, 120)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = _linear()
    config = replace(BASE, batch_size=4, steps=10, validate_every=4, accumulate=2)
    result = train(alone, _plain_step, _data(), config, validation=_data(7))
    targets = sorted(_data().tensors[1].tolist())
    for epoch in (slice(0, 10), slice(10, 20)):
        assert sorted(first["seen"][epoch] + second["seen"][epoch]) == targets
    for name, value in alone.state_dict().items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, atol=1e-5, rtol=1e-5)
    assert first["history"] == second["history"]
    for ours, theirs in zip(result.history, first["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert set(checkpoint_folders(tmp_path)) == {result.best_step, 10}


@pytest.mark.parametrize("patience", [2, 3])
def test_training_ends_when_the_validation_loss_no_longer_falls(tmp_path: Path, patience: int) -> None:
    """At learning rate 0 after the first updates nothing improves; the best weights are returned."""
    losses = iter([3.0, 2.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0])

    def step(network: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        loss = network(batch[0]).square().mean()
        return {"loss": loss if network.training else loss.detach() * 0 + next(losses)}

    config = replace(BASE, steps=100, validate_every=1, patience=patience, checkpoint="best", batch_size=20)
    result = train(_linear(), step, _data(), config, validation=_data(), out=tmp_path / "c")
    assert (result.chosen_step, result.steps) == (3, 3 + patience)
    assert step_folder(tmp_path / "c", result.steps).is_dir(), "the end is a checkpoint, as that of all updates"
    with pytest.raises(FaroutError, match="patience"):
        TrainingConfig(patience=5)
