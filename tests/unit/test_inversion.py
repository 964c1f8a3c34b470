"""Inversion of images to class vectors: a batch gives the vectors of each image alone, and only the vectors change."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farout.core.errors import FaroutError, StoreError
from farout.core.runtime import Runtime
from farout.data.sources import open_source
from farout.diffusion.model import DiffusionModel
from farout.synthesis.class_space import class_table_std
from farout.synthesis.ncis import inversion as _embedding
from farout.synthesis.ncis.inversion import InversionConfig, Inverter, embed_images, read_embeddings
from small import by_tokens, conditional, model, pictures
from tolerances import assert_close

pytestmark = pytest.mark.numerics

FEW = InversionConfig(steps=3, draws=4, stratified=False)
LABELS = torch.tensor([0, 2, 1, 1, 0])
KEYS = [f"image {number}" for number in range(5)]


def runtime(batch_size: int = 64) -> Runtime:
    return Runtime(device="cpu", precision="fp32", batch_size=batch_size, workers=0)


def x0() -> Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1


def invert(
    network: DiffusionModel, inversion: InversionConfig = FEW, batch_size: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    return Inverter(network, inversion, seed, runtime(batch_size))(x0(), LABELS, KEYS)


# -- the method -----------------------------------------------------------------------------------------------------


def invert_alone(network: DiffusionModel, inversion: InversionConfig, place: int) -> tuple[Tensor, list[float]]:
    """The published loop for one image, written out with the network's own call."""
    space = network.conditioning
    assert space is not None
    x = x0()[place : place + 1]
    vector = space.class_vectors()[LABELS[place]].clone().requires_grad_()
    optimizer = torch.optim.Adam([vector], lr=inversion.learning_rate(space))
    levels = inversion.timesteps(network.schedule)
    losses = []
    for step in range(inversion.steps):
        places, noise = inversion.sample_noise(KEYS[place], x.shape[1:], step, 0)
        t = levels[places]
        abar = network.schedule.abar[t].float().reshape(-1, 1, 1, 1)
        noisy = abar.sqrt() * x + (1 - abar).sqrt() * noise
        told = space(vector[None].expand(inversion.draws, -1)).tensors
        answer = network.network(noisy, t, **told).sample
        target = {
            "epsilon": noise,
            "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * x,
            "sample": x.expand_as(noise),
        }[network.prediction]
        loss = (answer - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return vector.detach(), losses


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("fresh", [conditional, by_tokens])
def test_a_batch_gives_the_vectors_of_each_image_alone(fresh: Callable[..., DiffusionModel], prediction: str) -> None:
    network = fresh(prediction=prediction)
    vectors, losses = invert(network)
    for place in range(5):
        vector, loss = invert_alone(network, FEW, place)
        torch.testing.assert_close(losses[place], torch.tensor(loss), rtol=1e-4, atol=1e-6)
        # Adam's first step has the same length for a gradient near zero, whose sign depends on rounding
        near = (vectors[place] - vector).abs() < 1e-3 * class_table_std(network.conditioning)
        assert float(near.float().mean()) > 0.97


@pytest.mark.parametrize("batch_size", [2, 4, 32])
def test_the_batch_size_changes_little(batch_size: int) -> None:
    """Adam's first step has the same length for a gradient near zero, whose sign depends on rounding: few differ."""
    inverter = Inverter(conditional(), FEW, 0, runtime(batch_size))
    whole, losses = invert(conditional())
    near = 1e-3 * class_table_std(inverter.conditioning)
    for some in ([0], [1, 2], [4, 0, 3]):
        vectors, loss = inverter(x0()[some], LABELS[some], [KEYS[place] for place in some])
        assert float(((vectors - whole[some]).abs() < near).float().mean()) > 0.97
        torch.testing.assert_close(loss, losses[some], rtol=1e-4, atol=1e-6)


def test_only_the_vectors_change() -> None:
    network = conditional()
    weights = {name: value.clone() for name, value in network.network.state_dict().items()}
    learnt = [parameter.requires_grad for parameter in network.network.parameters()]
    vectors, _ = invert(network)
    space = network.conditioning
    assert space is not None
    assert not torch.equal(vectors, space.class_vectors()[LABELS])
    assert all(torch.equal(value, weights[name]) for name, value in network.network.state_dict().items())
    assert [parameter.requires_grad for parameter in network.network.parameters()] == learnt
    assert all(parameter.grad is None for parameter in network.network.parameters())


def test_the_loss_decreases() -> None:
    """On other noise than that of the inversion: the vector describes the image, not the noise."""
    network, many = conditional(), InversionConfig(draws=16, steps=15, lr_scale=0.2, stratified=False)
    inverter = Inverter(network, many, 0, runtime(16))
    vectors, _ = inverter(x0(), LABELS, KEYS)
    start = inverter.conditioning.class_vectors()[LABELS]
    before, _ = inverter.loss_and_gradient(x0(), start, start, KEYS, step=100)
    after, _ = inverter.loss_and_gradient(x0(), vectors, start, KEYS, step=100)
    assert bool((after < before).all()), (before, after)


def test_the_learning_rate_scales_with_the_class_table() -> None:
    network = conditional()
    space = network.conditioning
    assert space is not None
    scale = class_table_std(space)
    assert scale == pytest.approx(float(space.class_vectors().numpy().std()))
    assert InversionConfig().learning_rate(space) == pytest.approx(0.05 * scale)
    assert InversionConfig(lr=0.01).learning_rate(space) == 0.01
    with pytest.raises(FaroutError, match=r"lr_scale=0\.1 would have no effect"):
        InversionConfig(lr=0.01, lr_scale=0.1)
    # Adam's first step has the length of the learning rate in every coordinate
    vectors, _ = invert(network, replace(FEW, steps=1))
    moved = (vectors - space.class_vectors()[LABELS]).abs()
    assert float((moved / (0.05 * scale)).median()) == pytest.approx(1, abs=1e-3)


def test_the_pull_adds_the_squared_distance_to_the_class_vector() -> None:
    network = conditional()
    space = network.conditioning
    assert space is not None
    start = space.class_vectors()[LABELS]
    plain, pulled = (Inverter(network, replace(FEW, pull=pull), 0, runtime()) for pull in (0.0, 2.0))
    one = plain.loss_and_gradient(x0(), start + 1, start, KEYS, 0)
    two = pulled.loss_and_gradient(x0(), start + 1, start, KEYS, 0)
    torch.testing.assert_close(two[0] - one[0], torch.full((5,), 2.0 * space.dim))
    torch.testing.assert_close(two[1] - one[1], torch.full((5, space.dim), 4.0))


def test_noise_depends_on_the_image() -> None:
    schedule = model().schedule
    assert InversionConfig().timesteps(schedule).tolist() == list(range(1, 1000, 20))
    assert InversionConfig(levels=1000).timesteps(schedule).tolist() == list(range(1000))
    places, noise = InversionConfig(draws=32, stratified=False).sample_noise("a", (1, 8, 8), 0, 0)
    assert noise.shape == (32, 1, 8, 8)
    assert 0 <= int(places.min()) <= int(places.max()) < 50
    for other in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1)):
        assert not torch.equal(noise, InversionConfig(draws=32).sample_noise(other[0], (1, 8, 8), *other[1:])[1])
    shared = [InversionConfig(noise="shared").sample_noise(key, (1, 8, 8), 0, 0)[1] for key in "ab"]
    assert torch.equal(*shared)
    for seed in range(20):
        strata = InversionConfig(draws=8, stratified=True, levels=48).sample_noise("a", (1,), 0, seed)[0]
        assert (strata // 6).tolist() == list(range(8))


# -- the folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Any:
    for name in "abc":
        pictures(tmp_path / "labelled" / name, 4, seed=ord(name))
    return open_source(tmp_path / "labelled")


def numbers(source: Any) -> Tensor:
    return torch.tensor(source.labels)


def test_a_resumed_run_has_the_same_bytes(images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, labels = conditional(), numbers(images)
    whole = embed_images(images, labels, network, tmp_path / "w", FEW, runtime=runtime(batch_size=3))
    assert whole.index.tolist() == list(range(12))
    assert torch.equal(whole.labels, labels)
    assert whole.vectors.shape == (12, network.conditioning.dim)
    assert whole.losses.shape == (12, 3)
    original, calls = Inverter.__call__, []

    def stops(self: Inverter, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Inverter, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            embed_images(images, labels, network, tmp_path / "p", FEW, runtime=runtime(batch_size=3))
    assert len(read_embeddings(tmp_path / "p")) == 6
    (tmp_path / "p" / "00000000.safetensors").unlink()
    parts = embed_images(images, labels, network, tmp_path / "p", FEW, runtime=runtime(batch_size=3))
    for name in ("index", "labels", "vectors", "losses"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name
    monkeypatch.setattr(Inverter, "__call__", None)
    assert len(embed_images(images, labels, network, tmp_path / "p", FEW, runtime=runtime())) == 12


def test_runs_with_other_settings_are_refused(images: Any, tmp_path: Path) -> None:
    labels, out = numbers(images), tmp_path / "e"
    embed_images(images, labels, conditional(), out, FEW, runtime=runtime())
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("steps: 3 before, 4 now", (images, labels, conditional(), out, replace(FEW, steps=4)), {}),
        ("seed: 0 before, 1 now", (images, labels, conditional(), out, FEW), {"seed": 1}),
        ("labels: ", (images, labels.flip(0), conditional(), out, FEW), {}),
        ("diffusion: ", (images, labels, conditional(b_scale=2.0), out, FEW), {}),
        ("data: ", (images.subset(range(6)), labels[:6], conditional(), out, FEW), {}),
    ]
    for message, given, settings in wrong:
        with pytest.raises(StoreError, match=f"generated with other settings .*{message}"):
            embed_images(*given, **{"runtime": runtime(), **settings})


def test_what_cannot_work_is_refused(images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, out = numbers(images), tmp_path / "e"
    for wrong, network, message in (
        (labels, model(), "unconditional"),
        (labels[:3], conditional(), "a label each"),
        (labels + 1, conditional(), "0 to 2, got 3"),
    ):
        with pytest.raises(FaroutError, match=message):
            embed_images(images, wrong, network, out, FEW, runtime=runtime())
    assert not out.exists()
    for settings, message in (
        ({"steps": 0}, "1 or more"),
        ({"lr": 0.0}, "above 0"),
        ({"pull": -1.0}, "at least 0"),
        ({"noise": "none"}, "'shared' or drawn per 'image'"),
    ):
        with pytest.raises(FaroutError, match=message):
            InversionConfig(**settings)
    with pytest.raises(FaroutError, match="steps must be 1 to 1000"):
        Inverter(conditional(), InversionConfig(levels=2000), 0, runtime())
    nothing = (torch.full((12, 32), float("nan")), torch.zeros(12, 3))
    monkeypatch.setattr(_embedding.Inverter, "__call__", lambda *given: nothing)
    with pytest.raises(FaroutError, match="not numbers"):
        embed_images(images, labels, conditional(), out, FEW, runtime=runtime())


def test_unreadable_images_are_skipped(images: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(tmp_path / "labelled", tmp_path / "damaged")
    (folder / "b" / "001.png").write_text("not a picture")
    source = open_source(folder, policy="skip")
    found = embed_images(source, numbers(source), conditional(), tmp_path / "e", FEW, runtime=runtime(batch_size=5))
    whole = embed_images(images, numbers(images), conditional(), tmp_path / "w", FEW, runtime=runtime())
    kept = [place for place in range(12) if place != 5]
    assert found.index.tolist() == kept
    near = 1e-3 * class_table_std(conditional().conditioning)
    assert float(((found.vectors - whole.vectors[kept]).abs() < near).float().mean()) > 0.97
    assert_close(found.losses, whole.losses[kept])


def test_broken_shards_are_refused(images: Any, tmp_path: Path) -> None:
    embed_images(images, numbers(images), conditional(), tmp_path / "e", FEW, runtime=runtime(batch_size=6))
    shutil.copy(tmp_path / "e" / "00000000.safetensors", tmp_path / "e" / "x.safetensors")
    with pytest.raises(StoreError, match="twice"):
        read_embeddings(tmp_path / "e")
    (tmp_path / "e" / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(StoreError, match="safetensors"):
        read_embeddings(tmp_path / "e")
    with pytest.raises(StoreError, match="no folder"):
        read_embeddings(tmp_path / "nowhere")
