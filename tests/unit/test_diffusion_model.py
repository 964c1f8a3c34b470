"""DiffusionModel: folders that either library reads, crossings between images and the network's space, training."""

import json
import os
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from farout.core import store
from farout.core.errors import FaroutError, StoreError
from farout.data.preprocessing import Preprocessing
from farout.diffusion import train
from farout.diffusion.config import PRESETS, DiffusionConfig
from farout.diffusion.model import DiffusionModel
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.train import train_diffusion
from farout.diffusion.unets import build_network
from farout.training.config import TrainingConfig
from small import model, pictures, tiny_unet

pytestmark = pytest.mark.numerics


def test_save_and_load_are_the_same_model(tmp_path: Path) -> None:
    saved = model(trained_on=["aa", "bb"], b_scale=1.4, data_range=(0.0, 1.0), provenance={"seed": 3})
    saved.save(tmp_path / "m")
    loaded = DiffusionModel.load(tmp_path / "m")
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 9.0])
    with torch.no_grad():
        assert torch.equal(saved.denoiser()(x, sigma), loaded.denoiser()(x, sigma))
    assert loaded.content_hash == saved.content_hash
    assert (loaded.b_scale, loaded.data_range, loaded.provenance) == (1.4, (0.0, 1.0), {"seed": 3})
    assert loaded.trained_on == {"aa", "bb"}
    assert loaded.schedule == saved.schedule
    assert loaded.preprocessing == saved.preprocessing


def test_diffusers_reads_our_folder_and_we_read_theirs(tmp_path: Path) -> None:
    saved = model(prediction="v_prediction")
    saved.save(tmp_path / "ours")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod.double(), saved.schedule.abar, rtol=3e-4, atol=1e-8)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.save_pretrained(tmp_path / "theirs")
    foreign = DiffusionModel.load(tmp_path / "theirs")
    assert foreign.prediction == "v_prediction"
    assert foreign.preprocessing.size == (8, 8)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        torch.testing.assert_close(foreign.denoiser()(x, sigma), saved.denoiser()(x, sigma), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (28, 28), (5, 6)])
def test_patches_become_channels_and_pixels_again(tmp_path: Path, size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(size=size, channels=1, native=size)
    patched = DiffusionModel(tiny_unet(4), NoiseSchedule(), preprocessing, patch=2)
    images = torch.rand(2, 1, *size)
    x = patched.encode(images)
    assert x.shape[1:] == patched.shape
    torch.testing.assert_close(patched.decode(x), images)
    assert patched.latent_shape == (1, *size)
    patched.save(tmp_path / "m")
    loaded = DiffusionModel.load(tmp_path / "m")
    assert loaded.content_hash == patched.content_hash
    assert torch.equal(loaded.encode(images), x)


def test_folders_without_the_newer_entries_are_loaded(tmp_path: Path) -> None:
    """Folders that were written before models had patches and a number format of their weights."""
    saved = model()
    saved.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    del config["patch"], config["weights"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    store.write_folder_hashes(tmp_path / "m")
    loaded = DiffusionModel.load(tmp_path / "m")
    assert (loaded.patch, loaded.weight_format) == (1, "fp32")
    assert loaded.content_hash == saved.content_hash


def test_rounded_weights_take_half_the_space_and_are_loaded_exactly(tmp_path: Path) -> None:
    rounded = model()
    rounded.save(tmp_path / "full")
    rounded.round_weights()
    rounded.save(tmp_path / "half")
    loaded = DiffusionModel.load(tmp_path / "half")
    assert loaded.content_hash == rounded.content_hash
    assert {parameter.dtype for parameter in loaded.network.parameters()} == {torch.float32}
    loaded.save(tmp_path / "again")  # as a detector saves its networks
    name = "unet/diffusion_pytorch_model.safetensors"
    sizes = [(tmp_path / folder / name).stat().st_size for folder in ("full", "half", "again")]
    assert sizes[2] == sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_old_checkpoints_lie_at_the_root(tmp_path: Path, safe: bool) -> None:
    """Early hub checkpoints keep network and scheduler in one folder, some as .bin files."""
    tiny_unet().save_pretrained(tmp_path, safe_serialization=safe)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    foreign = DiffusionModel.load(tmp_path)
    assert foreign.schedule == NoiseSchedule("linear", 1e-4, 0.02)
    assert foreign.schedule.num_levels == 1000


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (28, 28), (5, 6)])
def test_sizes_that_do_not_halve_are_padded_and_cropped_back(size: tuple[int, int]) -> None:
    images = torch.rand(2, 1, *size)
    crossed = model(size)
    x = crossed.encode(images)
    assert x.shape[1:] == crossed.shape
    assert all(side % 2 == 0 for side in x.shape[2:])
    torch.testing.assert_close(crossed.decode(x), images)
    with torch.no_grad():
        assert crossed.denoiser()(x, torch.ones(2)).shape == x.shape


def test_ranges_and_b_scale() -> None:
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model().encode(images), 2 * images - 1)
    torch.testing.assert_close(model(b_scale=1.4, data_range=(0.0, 1.0)).encode(images), 1.4 * images)
    assert float(model().decode(torch.full((1, 1, 8, 8), 5.0)).max()) == 1.0


def test_images_of_another_shape() -> None:
    assert model().encode(torch.rand(1, 1, 16, 16)).shape == (1, 1, 8, 8)
    with pytest.raises(FaroutError, match=r"\(B, 1, H, W\)"):
        model().encode(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_every_model_can_work_on_latents(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    common = {
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 3,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
    }
    autoencoder = (diffusers.AutoencoderKL if kind == "kl" else diffusers.VQModel)(**common, **blocks)
    preprocessing = Preprocessing(size=(16, 16), channels=1, native=(16, 16))
    latent = DiffusionModel(tiny_unet(3), NoiseSchedule(), preprocessing, autoencoder=autoencoder)
    images = torch.rand(2, 1, 16, 16)
    x = latent.encode(images)
    assert x.shape[1:] == latent.shape == (3, 8, 8)
    assert latent.decode(x).shape == images.shape
    assert torch.equal(latent.encode(images), x), "the mode of the posterior has no noise in it"
    if kind == "kl":
        assert not torch.equal(latent.encode(images, torch.randn(2, 3, 8, 8)), x)
    latent.save(tmp_path / "m")
    again = DiffusionModel.load(tmp_path / "m")
    assert torch.equal(again.encode(images), x)
    assert again.content_hash == latent.content_hash


def test_random_weights_have_learnt_nothing_but_keep_their_scale() -> None:
    plain = model()
    control = plain.with_random_weights(1)
    assert control.content_hash != plain.content_hash
    assert control.content_hash == plain.with_random_weights(1).content_hash
    with torch.no_grad():
        answer = control.denoiser().predict(torch.randn(4, 1, 8, 8), torch.ones(4))
    assert float(answer.std()) > 1e-3, "a network that answers zero would be no control"


def break_folder(folder: Path, how: str) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "altered weights":
        data = bytearray(weights.read_bytes())
        data[-3] ^= 1
        weights.write_bytes(bytes(data))
    elif how == "no config":
        (folder / "unet" / "config.json").unlink()
    elif how == "newer":
        config = json.loads((folder / "config.json").read_text())
        config["farout"]["format"] = 99
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "no list":
        (folder / "trained_on.txt").unlink()
    elif how == "foreign code":
        config = json.loads((folder / "unet" / "config.json").read_text())
        config["_class_name"] = "Evil"
        (folder / "unet" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", "incomplete"),
        ("cut weights", "cannot be read"),
        ("altered weights", "hash differs"),
        ("no config", "missing"),
        ("newer", "upgrade"),
        ("no list", "the images that were seen"),
        ("foreign code", "never runs code"),
    ],
)
def test_broken_folders_are_refused(tmp_path: Path, how: str, message: str) -> None:
    """By the hashes of the files; and where somebody has written the hashes anew, by what the files contain."""
    model().save(tmp_path / "m")
    break_folder(tmp_path / "m", how)
    with pytest.raises(StoreError, match=r"diffusion_pytorch_model.*(missing|changed)|config.json|trained_on|layout"):
        DiffusionModel.load(tmp_path / "m")
    store.write_folder_hashes(tmp_path / "m")
    with pytest.raises(StoreError, match=message):
        DiffusionModel.load(tmp_path / "m")


def test_a_model_from_the_hub_knows_what_it_has_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a detector would rest its p-values on images that the model was trained on."""
    model(trained_on=["aa"]).save(tmp_path / "hub")
    names = [path.relative_to(tmp_path / "hub").as_posix() for path in (tmp_path / "hub").rglob("*") if path.is_file()]

    def download(name: str, allow_patterns: list[str]) -> str:
        for wanted in filter_repo_objects(names, allow_patterns=allow_patterns):
            target = tmp_path / name / wanted
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((tmp_path / "hub" / wanted).read_bytes())
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert DiffusionModel.load("hf://me/model").trained_on == {"aa"}


def test_missing_folders_and_schedulers(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="hf://"):
        DiffusionModel.load(tmp_path / "nowhere")
    tiny_unet().save_pretrained(tmp_path / "only-a-network")
    with pytest.raises(StoreError, match="scheduler"):
        DiffusionModel.load(tmp_path / "only-a-network")


@pytest.mark.parametrize("message", ["", "cannot find it\nmore of it"])
def test_a_hub_out_of_reach_says_so(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError(message)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(StoreError, match=r"\((OSError|cannot find it)\); download it"):
        DiffusionModel.load("hf://me/model")


def test_networks_that_predict_something_else_are_refused(tmp_path: Path) -> None:
    """Their answers would be taken for clean images."""
    tiny_unet().save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler(prediction_type="flow_prediction").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(FaroutError, match=r"flow_prediction.*epsilon"):
        DiffusionModel.load(tmp_path)


def test_a_network_that_does_not_say_its_size_is_refused(tmp_path: Path) -> None:
    model().save(tmp_path)
    for name in ("config.json", "hashes.json"):  # what is left is a folder of diffusers
        (tmp_path / name).unlink()
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": None}))
    with pytest.raises(StoreError, match="sample_size"):
        DiffusionModel.load(tmp_path)


def test_a_failed_save_leaves_nothing_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk midway: the old folder stands, nothing half-written lies beside it."""
    model().save(tmp_path / "m")
    before = model().content_hash

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        model(b_scale=2.0).save(tmp_path / "m")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert DiffusionModel.load(tmp_path / "m").content_hash == before


def test_a_folder_is_replaced_where_none_can_be_put_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    replace = os.replace

    def strict(source: Path, target: Path) -> None:
        if Path(target).is_dir():
            raise PermissionError(5, "Access is denied")
        replace(source, target)

    monkeypatch.setattr("farout.core.store.os.replace", strict)
    for scale in (1.0, 2.0):
        model(b_scale=scale).save(tmp_path / "m")
        assert DiffusionModel.load(tmp_path / "m").b_scale == scale
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_training_learns_holds_out_and_lists_what_it_saw(tmp_path: Path) -> None:
    source = pictures(tmp_path / "good")
    training = TrainingConfig(steps=30, batch_size=16, learning_rate=3e-3, warmup=5, ema=None, validate_every=15)
    trained = train_diffusion(source, tmp_path / "m", training=training, statistics=10, alpha=0.2)
    assert len(trained.trained_on) == 40 - 8 - 10
    loaded = DiffusionModel.load(tmp_path / "m")
    assert loaded.trained_on == trained.trained_on
    assert loaded.provenance["steps"] == 30
    x0 = loaded.encode(torch.full((4, 1, 8, 8), 140 / 255))
    noisy = x0 + torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = (loaded.denoiser()(noisy, torch.ones(4)) - x0).square().mean()
    assert float(error) < 0.5, "noise of variance 1 must shrink"


def test_training_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pictures(tmp_path / "good")
    settings = {"steps": 8, "batch_size": 8, "warmup": 1, "checkpoint_every": 4}
    whole = train_diffusion(source, tmp_path / "a", training=TrainingConfig(**settings), statistics=4)
    original, calls = train.denoising_loss, []

    def interrupted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "denoising_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_diffusion(source, tmp_path / "b", training=TrainingConfig(**settings), statistics=4)
    assert not (tmp_path / "b").exists()
    # what the weights have learnt so far would be lost on another target, silently
    for changed in ({"prediction": "v_prediction"}, {"levels": "low_noise"}, {"dropout": 0.2}, {"schedule": "cosine"}):
        with pytest.raises(StoreError, match="fingerprint"):
            train_diffusion(
                source,
                tmp_path / "b",
                model=DiffusionConfig(**changed),  # type: ignore[arg-type]
                training=TrainingConfig(**settings),
                statistics=4,
                resume=True,
            )
    resumed = train_diffusion(source, tmp_path / "b", training=TrainingConfig(**settings), statistics=4, resume=True)
    assert resumed.content_hash == whole.content_hash


def test_latents_are_computed_where_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training moves the network alone: an autoencoder left behind is slow at first, and fails afterwards."""
    calls: list[str] = []
    for name in ("to", "encode"):
        original = getattr(DiffusionModel, name)
        monkeypatch.setattr(DiffusionModel, name, lambda *a, o=original, n=name: (calls.append(n), o(*a))[1])
    diffusers.AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4).save_pretrained(
        tmp_path / "vae"
    )
    common = {"training": TrainingConfig(steps=1, batch_size=2, warmup=0), "statistics": 2, "alpha": 0.5}
    train_diffusion(pictures(tmp_path / "good", 12), tmp_path / "m", autoencoder=str(tmp_path / "vae"), **common)
    assert calls[:2] == ["to", "encode"]


def test_presets_are_what_they_say() -> None:
    for preset in PRESETS.values():
        DiffusionConfig(**preset["model"])
        TrainingConfig(**preset["training"])
    assert sum(p.numel() for p in build_network("tiny", 1, 28).parameters()) == pytest.approx(1.1e6, rel=0.05)
    with torch.device("meta"):
        count = sum(p.numel() for p in build_network("paper", 1, 28).parameters())
    assert count == pytest.approx(171e6, rel=0.01)
