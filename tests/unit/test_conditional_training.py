"""Training with classes: what is drawn and minimised, whole runs, errors before any work, presets."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError, SourceError, StoreError
from farout.data.classes import class_names_of, encode_classes
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.config import PRESETS, DiffusionConfig
from farout.diffusion.denoiser import GuidedDenoiser, NetworkDenoiser
from farout.diffusion.losses import Objective, denoising_loss, drop_labels, sample_levels
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise_levels import geometric_path, pad_paths
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.ddim import DDIM
from farout.diffusion.train import train_diffusion, train_model
from farout.diffusion.unets import build_network
from farout.training.config import TrainingConfig
from small import autoencoder, by_tokens, conditional, model, pictures

QUICK = {"batch_size": 8, "warmup": 1, "device": "cpu", "precision": "fp32"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_classes(folder: Path, count: int = 30, names: tuple[str, str] = ("dark", "light")) -> Path:
    """Dark and light pictures of 8 x 8 pixels, in a folder each."""
    for name, low in zip(names, (20, 200), strict=True):
        pictures(folder / name, count, low=low, spread=30, seed=low)
    return folder


# -- what a step draws and minimises -----------------------------------------------------------------------------------


def test_antithetic_levels_are_mirrored() -> None:
    for count in (1, 8, 9):
        t = sample_levels(count, 1000, "antithetic", generator())
        half = (count + 1) // 2
        assert torch.equal(t[half:], 999 - t[: count - half])
        assert torch.equal(t[:half], sample_levels(half, 1000, "uniform", generator()))
    many = sample_levels(20000, 1000, "antithetic", generator())
    assert float(many.float().mean()) == pytest.approx(499.5, abs=1e-2), "mirrored pairs have one mean"
    assert (int(many.min()), int(many.max())) == (0, 999)


def test_labels_are_dropped_at_the_given_rate_and_become_the_null_row() -> None:
    labels = torch.arange(5).repeat(4000)
    kept = drop_labels(labels, 5, 0.1, generator())
    dropped = kept == 5
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(kept[~dropped], labels[~dropped])
    assert torch.equal(kept, drop_labels(labels, 5, 0.1, generator())), "the generator alone decides"


def test_the_loss_options_are_those_of_the_formula() -> None:
    given = model()
    x0, draws = torch.rand(3, 1, 8, 8), {}
    for error in ("square", "absolute"):
        for reduction in ("mean", "sum"):
            with torch.no_grad():
                objective = Objective(error=error, reduction=reduction)
                draws[error, reduction] = float(denoising_loss(given.denoiser(), x0, generator(), objective))
    source = generator()
    t = sample_levels(3, 1000, "uniform", source)
    sigma = given.schedule.sigma_of(t).float()
    noise = torch.randn(x0.shape, generator=source)
    with torch.no_grad():
        answer = given.denoiser().predict(x0 + sigma.reshape(-1, 1, 1, 1) * noise, sigma)
    assert draws["square", "sum"] == pytest.approx(float((answer - noise).square().sum((1, 2, 3)).mean()), rel=1e-5)
    assert draws["absolute", "sum"] == pytest.approx(float((answer - noise).abs().sum((1, 2, 3)).mean()), rel=1e-5)
    for error in ("square", "absolute"):
        assert draws[error, "sum"] == pytest.approx(64 * draws[error, "mean"], rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"levels": "log"}, "levels"), ({"error": "cubic"}, "error"), ({"label_dropout": 1.0}, "label_dropout")],
)
def test_objectives_out_of_range_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        Objective(**wrong)


def spied(monkeypatch: pytest.MonkeyPatch) -> list:
    """Collects (x0, condition) of each call of the loss in training."""
    import farout.diffusion.train as module

    seen: list = []
    original = module.denoising_loss

    def spy(denoiser: NetworkDenoiser, x0: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append((x0, rest[2]))
        return original(denoiser, x0, *rest)

    monkeypatch.setattr(module, "denoising_loss", spy)
    return seen


@pytest.mark.slow
def test_training_flips_half_of_the_images_and_drops_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures whose left side is dark: what is dark on the right was mirrored."""
    pixels = torch.zeros(64, 1, 8, 8)
    pixels[..., 4:] = 1
    source = open_source(pixels)
    seen = spied(monkeypatch)
    train_model(
        source, model(), TrainingConfig(steps=10, **{**QUICK, "batch_size": 64}), objective=Objective(flip=True)
    )
    mirrored = torch.cat([x0[:, 0, 0, 0] > 0 for x0, _ in seen])
    assert 0.4 < float(mirrored.float().mean()) < 0.6
    seen.clear()
    labelled = open_source(str(two_classes(tmp_path / "images", names=("a", "b"))))
    given = conditional(classes=2)
    settings = TrainingConfig(steps=10, **{**QUICK, "batch_size": 60})
    train_model(labelled, given, settings, objective=Objective(label_dropout=0.3))
    labels = torch.cat([condition.tensors["class_labels"] for _, condition in seen])
    light = torch.cat([x0.mean((1, 2, 3)) > 0 for x0, _ in seen])
    assert float((labels == 2).float().mean()) == pytest.approx(0.3, abs=0.06)
    assert torch.equal(labels[labels < 2] == 1, light[labels < 2]), "each image goes with its own label"


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_are_renumbered_and_keep_their_names(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cow"):
        pictures(tmp_path / "images" / name, 3)
    source = open_source(f"{tmp_path / 'images'}@classes=cow,ant")
    assert set(source.labels) == {0, 2}, "a filter keeps the original labels"
    assert class_names_of(source) == ("ant", "cow")
    assert encode_classes(source, ("ant", "cow")).tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(SourceError, match="bee"):
        encode_classes(open_source(str(tmp_path / "images")), ("ant", "cow"))


def one_class(folder: Path) -> ImageSource:
    pictures(folder / "only", 8)
    return open_source(str(folder))


@pytest.mark.parametrize("case", ["no labels", "one class", "tokens without classes", "flipped latents", "levels"])
def test_what_cannot_be_trained_is_refused_before_any_work(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import farout.diffusion.train as module

    monkeypatch.setattr(module, "split_source", lambda *_, **__: pytest.fail("work has begun"))
    source: object = str(two_classes(tmp_path / "images", 4))
    config, message, inner = DiffusionConfig(classes=True), "", None
    if case == "no labels":
        source, message = torch.rand(10, 1, 8, 8), "no labels"
    elif case == "one class":
        source, message = one_class(tmp_path / "one"), "one class"
    elif case == "tokens without classes":
        config, message = DiffusionConfig(network="tokens"), "with classes"
    elif case == "levels":
        config, message = DiffusionConfig(levels="log"), "levels"  # type: ignore[arg-type]
    else:
        inner = tmp_path / "vae"
        autoencoder(halvings=0).save_pretrained(inner)
        config, message = DiffusionConfig(flip=True), "latents"
    with pytest.raises(FaroutError, match=message):
        train_diffusion(source, tmp_path / "m", model=config, autoencoder=inner and str(inner))


def test_a_class_without_images_to_train_on_is_named(tmp_path: Path) -> None:
    """Else the model would offer a class whose row of the table is noise."""
    source = open_source(two_classes(tmp_path / "s", names=("a", "b")))
    with pytest.raises(FaroutError, match="train the class c on"):
        train_model(source, conditional(classes=3), TrainingConfig(steps=1, **QUICK))


def test_label_dropout_requires_a_null_row() -> None:
    source = open_source(torch.rand(4, 1, 8, 8))
    with pytest.raises(FaroutError, match="unconditional"):
        train_model(source, model(), TrainingConfig(steps=1), objective=Objective(label_dropout=0.1))
    given = conditional()
    given.conditioning = ClassVectors(given.network, "abcd", has_null=False)
    with pytest.raises(FaroutError, match="null"):
        train_model(source, given, TrainingConfig(steps=1), objective=Objective(label_dropout=0.1))


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [conditional, pytest.param(by_tokens, marks=pytest.mark.slow)])
def test_a_network_learns_two_classes_apart(tmp_path: Path, build: Callable[..., DiffusionModel]) -> None:
    """Samples of the light class are light, those of the dark one dark, also under guidance, with either adapter."""
    two_classes(tmp_path / "images", names=("a", "b"))
    training = TrainingConfig(steps=40, **{**QUICK, "batch_size": 16}, learning_rate=1e-2, ema=0.9)
    given = build(classes=2, prediction="sample")
    trained = train_model(
        open_source(str(tmp_path / "images")), given, training, objective=Objective(label_dropout=0.2)
    )
    trained.save(tmp_path / "m")
    assert DiffusionModel.load(tmp_path / "m").content_hash == trained.content_hash
    condition = trained.conditioning(torch.tensor([0, 1]).repeat_interleave(8))
    sigmas = pad_paths([geometric_path(trained.schedule, 999, 8)] * 16)
    noise = torch.randn(16, *trained.shape, generator=generator())
    for scale in (1, 2):
        denoiser = GuidedDenoiser(trained.denoiser(), scale, trained.conditioning.null_condition)
        with torch.no_grad():
            samples = trained.decode(DDIM()(denoiser, sigmas[:, :1, None, None] * noise, sigmas, condition))
        assert float(samples[:8].mean()) == pytest.approx(35 / 255, abs=0.15)
        assert float(samples[8:].mean()) == pytest.approx(215 / 255, abs=0.15)


@pytest.mark.parametrize("network", [pytest.param(name, marks=pytest.mark.slow) for name in ("tiny", "tokens")])
def test_training_with_classes_resumes_exactly(tmp_path: Path, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import farout.diffusion.train as module

    source = two_classes(tmp_path / "images")
    config = DiffusionConfig(network=network, classes=True, flip=True, levels="antithetic")  # type: ignore[arg-type]
    training = TrainingConfig(steps=4, checkpoint_every=2, validate_every=2, **QUICK)
    common = {"training": training, "statistics": 4, "alpha": 0.5, "model": config}
    whole = train_diffusion(source, tmp_path / "a", **common)
    original, calls = module.denoising_loss, []

    def interrupted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4 + 1:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "denoising_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_diffusion(source, tmp_path / "b", **common)
    monkeypatch.undo()
    changed = DiffusionConfig(network=network, classes=True, flip=True, label_dropout=0.5)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="fingerprint"):
        train_diffusion(source, tmp_path / "b", resume=True, **{**common, "model": changed})
    resumed = train_diffusion(source, tmp_path / "b", resume=True, **common)
    assert resumed.content_hash == whole.content_hash
    assert DiffusionModel.load(tmp_path / "b").content_hash == whole.content_hash


def test_latents_with_classes(tmp_path: Path) -> None:
    autoencoder(halvings=0).save_pretrained(tmp_path / "vae")
    trained = train_diffusion(
        two_classes(tmp_path / "images", 12),
        tmp_path / "m",
        model=DiffusionConfig(classes=True, label_dropout=0.0),
        training=TrainingConfig(steps=2, **QUICK),
        autoencoder=str(tmp_path / "vae"),
        statistics=2,
        alpha=0.5,
    )
    loaded = DiffusionModel.load(tmp_path / "m")
    assert loaded.content_hash == trained.content_hash
    assert not loaded.conditioning.has_null, "nothing was dropped, so the last row has learnt nothing"


def test_the_command_line_trains_with_classes(tmp_path: Path) -> None:
    from farout.cli import main

    source = two_classes(tmp_path / "images", 12)
    words = ["train", "diffusion", str(source), "--out", str(tmp_path / "m"), "--preset", "classes"]
    words += ["--training.steps", "2", "--batch-size", "4", "--statistics", "2", "--alpha", "0.5"]
    assert main([*words, "--model.dropout", "0.2", "--model.error", "absolute"]) == 0
    loaded = DiffusionModel.load(tmp_path / "m")
    assert loaded.conditioning.class_names == ("dark", "light")
    assert loaded.network.config["dropout"] == 0.2
    assert loaded.provenance["objective"]["error"] == "absolute"
    assert loaded.provenance["objective"]["label_dropout"] == 0.1


# -- presets -----------------------------------------------------------------------------------------------------------


def test_the_networks_have_the_published_sizes() -> None:
    def millions(name: str, classes: int | None) -> float:
        with torch.device("meta"):
            network = build_network(name, 3, 32, classes=classes)  # type: ignore[arg-type]
        return sum(p.numel() for p in network.parameters()) / 1e6

    assert round(millions("cifar", 10), 2) == 35.75
    assert round(millions("cifar", 100), 2) == 35.80
    assert round(millions("cifar", None), 2) == 35.75
    assert round(millions("iddpm", None), 1) == 52.5
    assert round(millions("tokens", 10), 1) == 1.4


@pytest.mark.slow
def test_the_network_of_the_card_costs_what_the_card_says() -> None:
    """6.22 billion multiply-accumulates for one image of 32 x 32 pixels, those of attention's products included."""
    from farout.data.preprocessing import Preprocessing

    network = build_network("cifar", 3, 32, classes=10)
    counted = []

    def count(module: nn.Module, _inputs: object, output: Tensor) -> None:
        counted.append(output.numel() * module.weight[0].numel())

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert sum(counted) / 1e9 == pytest.approx(6.05, abs=0.05), "convolutions and linear layers"
    conditioning = ClassVectors(network, [str(n) for n in range(10)], has_null=True)
    preprocessing = Preprocessing(size=(32, 32), channels=3, native=(32, 32))
    whole = DiffusionModel(network, NoiseSchedule(), preprocessing, conditioning=conditioning).gmacs
    assert 6.0 < whole < 6.4, "torch counts attention or not, by its version and kernel"


@pytest.mark.slow
def test_variances_are_dropped() -> None:
    with torch.device("meta"):
        network = build_network("iddpm", 3, 32, classes=10)
        answer = network(torch.zeros(1, 3, 32, 32), torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.long))
    assert answer.sample.shape == (1, 6, 32, 32)
    denoiser = NetworkDenoiser(lambda *_: torch.zeros(1, 6, 8, 8), NoiseSchedule())  # type: ignore[arg-type]
    assert denoiser.predict(torch.zeros(1, 3, 8, 8), torch.ones(1)).shape == (1, 3, 8, 8)


def test_the_presets_with_classes_are_the_card_s() -> None:
    config, training = DiffusionConfig(**PRESETS["cifar"]["model"]), TrainingConfig(**PRESETS["cifar"]["training"])
    assert config.objective == Objective("antithetic", "square", "sum", 0.1, True)
    assert (config.schedule, config.beta_start, config.beta_end) == ("linear", 1e-4, 0.02)
    expected = ("adamw", 2e-4, 0.9, 0.999, 0.0, 5000, "constant", 1.0, 0.9999, 128, 160000)
    names = "optimizer learning_rate momentum beta2 weight_decay warmup decay clip ema batch_size steps"
    assert tuple(getattr(training, name) for name in names.split()) == expected
    assert DiffusionConfig(**PRESETS["iddpm"]["model"]).schedule == "cosine"
    for name in ("classes", "tokens", "cifar", "iddpm"):
        assert DiffusionConfig(**PRESETS[name]["model"]).classes
    assert not DiffusionConfig().classes
