"""The feature denoiser is the paper's network, its schedule and encoding the paper's, and its folder can be trusted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from farout.core import store
from farout.core.errors import FaroutError, StoreError
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.losses import denoising_loss
from farout.features.densities import Mahalanobis
from farout.features.encoding import FeatureEncoding
from farout.features.feature_denoiser import FeatureDenoiser
from farout.features.feature_diffusion import FeatureDiffusion, paper_schedule

pytestmark = pytest.mark.numerics

B4 = (24, 32, 56, 160, 448)
GROUPS = (4, 6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(count: int = 8, width: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=generator(seed)) * 3 + 1


def trained(width: int = 10, seed: int = 1, **settings: object) -> FeatureDenoiser:
    """A small network whose layers that start at zero have left it."""
    torch.manual_seed(seed)
    network = FeatureDenoiser(width, blocks=2, **settings).eval()
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return network


def counted(**settings: object) -> float:
    """Millions of parameters, without their memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in FeatureDenoiser(**settings).parameters()) / 1e6


# -- the paper's network (semantic card 7.5, checks 1 to 3) -------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        ({}, 86.74),
        ({"blocks": 8}, 45.2),
        ({"bottleneck": 720}, 45.2),
        ({"width": 1792, "hidden": 1440, "bottleneck": 1440, "embedding": 720}, 89.8),
    ],
)
def test_the_network_has_the_papers_size(settings: dict, millions: float) -> None:
    digits = 2 if millions == 86.74 else 1
    assert round(counted(**{"width": 720, **settings}), digits) == millions


def test_an_untrained_network_answers_zero() -> None:
    """Training starts from the mean of standardised features, exactly."""
    network = FeatureDenoiser(10, blocks=3)
    assert torch.equal(network(vectors(), torch.arange(8)), torch.zeros(8, 10))


def test_the_first_loss_is_that_of_standardised_features() -> None:
    """sum(c_m - 1) / c: the target is x0 itself, not the noise, and each group has unbiased deviation 1."""
    encoded = FeatureEncoding(B4)(vectors(64, 720))
    network = FeatureDenoiser(720, hidden=8, bottleneck=4, embedding=4, blocks=1)
    denoiser = NetworkDenoiser(network, paper_schedule(), "sample")
    loss = float(denoising_loss(denoiser, encoded, generator()).detach())
    assert loss == pytest.approx(sum(c - 1 for c in B4) / 720, abs=1e-4)
    assert loss == pytest.approx(0.993, abs=5e-4)


def test_the_schedule_is_the_papers() -> None:
    wanted = {
        0: (0.9992, 0.0387),
        1: (0.9985, 0.0555),
        2: (0.9976, 0.0688),
        3: (0.9968, 0.0805),
        4: (0.9958, 0.0911),
        5: (0.9949, 0.1010),
        9: (0.9906, 0.1367),
        10: (0.9894, 0.1450),
        24: (0.9674, 0.2534),
        25: (0.9654, 0.2609),
        49: (0.8984, 0.4392),
        50: (0.8948, 0.4465),
        74: (0.7879, 0.6158),
        99: (0.6417, 0.7670),
    }
    abar = paper_schedule().abar
    assert len(abar) == 100
    for t, (signal, noise) in wanted.items():
        assert float(abar[t].sqrt()) == pytest.approx(signal, abs=5.1e-5), t
        assert float((1 - abar[t]).sqrt()) == pytest.approx(noise, abs=5.1e-5), t
    assert float(abar[99]) == pytest.approx(0.41175, abs=5e-6)
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    assert float(betas.sum()) == pytest.approx(0.88199, abs=5e-6)


def test_the_embedding_of_time_is_cosines_then_sines() -> None:
    """Of raw integer levels; in another order, weights of the paper's would mean something else."""
    network = FeatureDenoiser(6, hidden=8, blocks=1)
    found = network._time_embedding(torch.tensor([0, 3, 99]))
    frequencies = np.array([10000 ** (-k / 4) for k in range(4)])
    for row, t in zip(found.numpy(), (0, 3, 99), strict=True):
        np.testing.assert_allclose(row, [*np.cos(t * frequencies), *np.sin(t * frequencies)], atol=2e-6)


def test_the_network_is_the_published_formula() -> None:
    """Written out once more, step by step, with the weights of a small network."""
    from torch.nn.functional import group_norm, linear, silu

    network, x, t = trained(), vectors(), torch.arange(8)
    w = dict(network.named_parameters())

    def apply(name: str, value: torch.Tensor) -> torch.Tensor:
        return linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        return group_norm(value, 1, w[f"{name}.weight"], w[f"{name}.bias"])

    e = apply("time.2", silu(apply("time.0", network._time_embedding(t))))
    h = apply("enter", silu(x))
    for i in range(2):
        u = apply(f"stack.{i}.narrow.2", silu(norm(f"stack.{i}.narrow.0", h)))
        u = u + apply(f"stack.{i}.time", silu(e))
        h = h + apply(f"stack.{i}.widen.2", silu(norm(f"stack.{i}.norm", u)))
    wanted = apply("leave.2", silu(norm("leave.0", h)))
    torch.testing.assert_close(network(x, t), wanted, rtol=1e-5, atol=1e-5)


def test_variants_run_and_differ() -> None:
    x, t = vectors(), torch.arange(8)
    answers = [trained()(x, t), trained(scale_shift=True)(x, t), trained(input_activation=False)(x, t)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(answers[one], answers[other])
    assert not torch.allclose(trained()(x, t), trained()(x, t + 40)), "the level matters"


def test_dropout_is_for_training_only() -> None:
    network, x, t = trained(dropout=0.5), vectors(), torch.arange(8)
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))


def test_odd_widths_are_refused() -> None:
    for settings in ({"width": 0}, {"width": 6, "hidden": 7}, {"width": 6, "blocks": 0}):
        with pytest.raises(FaroutError, match="must be at least 1"):
            FeatureDenoiser(**settings)


def test_gradients_reach_the_input() -> None:
    """Scores by gradients, and guidance, need them."""
    x = vectors().requires_grad_()
    denoiser = NetworkDenoiser(trained(), paper_schedule(), "sample")
    denoiser(x, torch.full((8,), 0.1)).square().sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().min()) > 0


def test_diffusers_reads_and_writes_it(tmp_path: Path) -> None:
    network = trained(scale_shift=True, input_activation=False)
    network.save_pretrained(tmp_path / "n")
    loaded = FeatureDenoiser.from_pretrained(tmp_path / "n")
    assert torch.equal(loaded(vectors(), torch.arange(8)), network(vectors(), torch.arange(8)))
    assert loaded.config.scale_shift is True
    assert sorted(path.name for path in (tmp_path / "n").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


# -- the encoding -------------------------------------------------------------------------------------------------


def test_each_group_of_an_image_has_mean_zero_and_deviation_one() -> None:
    encoded = FeatureEncoding(B4)(vectors(5, 720))
    assert encoded.dtype == torch.float32
    for group in encoded.split(B4, dim=1):
        torch.testing.assert_close(group.mean(1), torch.zeros(5), rtol=0, atol=1e-5)
        torch.testing.assert_close(group.std(1), torch.ones(5), rtol=1e-4, atol=0)
    torch.testing.assert_close(encoded.square().sum(1), torch.full((5,), 715.0), rtol=1e-4, atol=0)


def test_by_image_nothing_of_a_layers_size_is_left() -> None:
    """That is the paper's choice; the summaries bring it back."""
    x = vectors(6)
    plain = FeatureEncoding(GROUPS)
    torch.testing.assert_close(plain(5 * x + 3), plain(x), rtol=1e-3, atol=1e-4)
    rich = FeatureEncoding(GROUPS, summaries=True).fit(vectors(50, seed=4))
    assert rich.groups == (4, 6, 4)
    assert rich.width == 14
    assert torch.equal(rich(x)[:, :10], plain(x))
    assert float((rich(5 * x + 3)[:, 10:] - rich(x)[:, 10:]).abs().min()) > 0.5


@pytest.mark.parametrize("summaries", [False, True])
def test_by_channel_normal_images_have_mean_zero_and_deviation_one(summaries: bool) -> None:
    good = vectors(200) * torch.linspace(0.1, 20, 10)
    encoding = FeatureEncoding(GROUPS, "channel", summaries).fit(good)
    encoded = encoding(good)
    assert encoded.shape == (200, encoding.width)
    torch.testing.assert_close(encoded.mean(0), torch.zeros(encoding.width), rtol=0, atol=1e-4)
    torch.testing.assert_close(encoded.std(0), torch.ones(encoding.width), rtol=1e-3, atol=0)


@pytest.mark.parametrize("standardize", ["image", "channel"])
def test_constant_channels_and_features_stay_numbers(standardize: str) -> None:
    """Dead channels are common behind a ReLU, and a black image has many."""
    good = vectors(30)
    good[:, 3] = 7.0
    good[:, 5] = 0.0
    encoding = FeatureEncoding(GROUPS, standardize, True).fit(good)
    for features in (good, torch.zeros(2, 10), torch.full((2, 10), 7.0)):
        assert bool(torch.isfinite(encoding(features)).all())
    assert float(encoding(good)[:, 3].abs().max()) < 10, "a dead channel does not explode"


def test_a_single_image_can_be_fitted() -> None:
    encoding = FeatureEncoding(GROUPS, "channel", True).fit(vectors(1))
    assert bool(torch.isfinite(encoding(vectors(3, seed=2))).all())


def test_the_encoding_is_differentiable() -> None:
    for standardize in ("image", "channel"):
        x = vectors().requires_grad_()
        FeatureEncoding(GROUPS, standardize, True).fit(vectors(30)).__call__(x).square().sum().backward()
        assert x.grad is not None
        assert bool(torch.isfinite(x.grad).all())


def test_wrong_features_are_refused() -> None:
    with pytest.raises(FaroutError, match=r"\(B, 10\)"):
        FeatureEncoding(GROUPS)(vectors(3, 9))
    with pytest.raises(FaroutError, match="'image' or 'channel'"):
        FeatureEncoding(GROUPS, "layer")
    with pytest.raises(FaroutError, match="two channels"):
        FeatureEncoding((4, 1))
    with pytest.raises(FaroutError, match="fitted"):
        FeatureEncoding(GROUPS, "channel")(vectors())
    with pytest.raises(FaroutError, match="fitted"):
        FeatureEncoding(GROUPS, summaries=True)(vectors())


# -- the model and its folder -------------------------------------------------------------------------------------


def model(first: bool = True) -> FeatureDiffusion:
    encoding = FeatureEncoding(GROUPS, "channel", True).fit(vectors(40))
    return FeatureDiffusion(
        trained(14),
        encoding,
        paper_schedule(),
        "backbone's hash",
        first=trained(14, seed=5) if first else None,
        gaussian=Mahalanobis.fit(vectors(40).double().numpy()),
        trained_on=["b", "a"],
        provenance={"seed": 3},
    )


def answers(made: FeatureDiffusion) -> list[torch.Tensor]:
    x0 = made.encode(vectors())
    return [denoiser(x0, torch.full((8,), 0.1)) for denoiser in made.denoisers()]


@pytest.mark.parametrize("first", [True, False])
def test_a_saved_model_answers_the_same(first: bool, tmp_path: Path) -> None:
    before = model(first)
    before.save(tmp_path / "m")
    after = FeatureDiffusion.load(tmp_path / "m")
    assert after.content_hash == before.content_hash
    assert len(answers(after)) == 1 + first
    for one, other in zip(answers(before), answers(after), strict=True):
        assert torch.equal(one, other)
    assert after.trained_on == {"a", "b"}
    assert after.provenance == {"seed": 3}
    assert after.backbone == "backbone's hash"
    assert after.gaussian is not None
    assert before.gaussian is not None
    assert np.array_equal(after.gaussian.precision, before.gaussian.precision)


@pytest.mark.parametrize("file", ["network", "first", "statistics.safetensors"])
def test_altered_weights_are_refused(file: str, tmp_path: Path) -> None:
    """Scores of another model than was calibrated would be nonsense without a word."""
    model().save(tmp_path / "m")
    path = tmp_path / "m" / file
    path = path if path.is_file() else path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    save_file({**tensors, name: tensors[name] * 1.001 + 1e-3}, path)
    with pytest.raises(StoreError, match=f"{path.name} was changed"):
        FeatureDiffusion.load(tmp_path / "m")
    store.write_folder_hashes(tmp_path / "m")
    with pytest.raises(StoreError, match="hash differs"):
        FeatureDiffusion.load(tmp_path / "m")
    path.unlink()
    with pytest.raises(StoreError):
        FeatureDiffusion.load(tmp_path / "m")
    with pytest.raises(StoreError, match="no folder"):
        FeatureDiffusion.load(tmp_path / "nowhere")


def test_a_random_twin_shares_nothing_learnt() -> None:
    """The control for what training gave: same sizes of weights, none of their meaning."""
    made = model()
    twin = made.with_random_weights(1)
    assert twin.content_hash != made.content_hash
    assert twin.content_hash == made.with_random_weights(1).content_hash
    assert made.content_hash == model().content_hash, "the original is left alone"
    assert not torch.allclose(answers(twin)[0], answers(made)[0])
