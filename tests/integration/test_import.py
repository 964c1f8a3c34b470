"""`farout import`: published weights compute in farout what they computed in their own program."""

import argparse
import os
import pickle
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from farout.cli import main
from farout.cli.command_parser import parse
from farout.core.errors import FaroutError, StoreError
from farout.detectors.semantic import Semantic
from farout.diffusion.model import DiffusionModel
from farout.diffusion.schedule import NoiseSchedule
from farout.features.extractor import FeatureExtractor
from farout.features.feature_diffusion import FeatureDiffusion
from farout.importing.import_weights import import_weights
from foreign_features import EfficientNetB0, Lfdn, randomize_statistics
from foreign_unets import DdimUNet, GuidedUNet, MonaiUNet, randomize
from small import pictures

T = torch.tensor([0.0, 37.0, 999.0])


def assert_same_network(foreign: nn.Module, folder: Path, *, colors: int, classes: int = 0, size: int = 16) -> None:
    """The loaded model's denoiser gives the epsilon of the foreign network, at each noise level of the schedule."""
    model = DiffusionModel.load(folder)
    x = torch.randn(len(T), colors, size, size, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, classes - 1, 1]) if classes else None
    with torch.no_grad():
        expected = foreign(x, T) if labels is None else foreign(x, T, labels)
        sigma = model.schedule.sigma_of(T.long())
        noisy = x * (1 + sigma[:, None, None, None] ** 2).sqrt().float()
        condition = None if labels is None or model.conditioning is None else model.conditioning(labels)
        found = model.denoiser().predict(noisy, sigma, condition)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected[:, :colors], atol=1e-5, rtol=1e-4)


def assert_runs(command: str) -> None:
    """The printed command is understood."""
    words = shlex.split(command)
    assert words[0] == "farout"
    parse(words[1], words[2:])


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


def test_monai_unet_of_ddpm_ood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = randomize(MonaiUNet(1, (32, 64), 1, (False, True), head=32))
    content = {
        "epoch": 3,
        "global_step": 7,
        "model_state_dict": foreign.state_dict(),
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "best_loss": 0.1,
    }
    source = save(tmp_path / "checkpoint.pth", content)
    assert main(["import", source, "--head-width", "32", "--out", str(tmp_path / "m")]) == 0
    printed = capsys.readouterr().out
    assert "DiffusionModelUNet of MONAI" in printed
    assert "--diffusion" in printed
    assert_same_network(foreign, tmp_path / "m", colors=1)
    model = DiffusionModel.load(tmp_path / "m")
    assert model.schedule == NoiseSchedule("scaled_linear", 0.0015, 0.0195)
    assert (model.data_range, model.preprocessing.scaling, model.preprocessing.size) == ((0, 1), "minmax", (28, 28))
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert "checkpoint.pth" in card
    assert "unknown" in card
    assert str(model.provenance["source_sha256"]) in card


def test_monai_unet_with_attention_at_every_level(tmp_path: Path) -> None:
    foreign = randomize(MonaiUNet(3, (32, 64, 96), 2, (True, True, True), head=32))
    source = save(tmp_path / "c.pth", {"model_state_dict": foreign.state_dict()})
    assert_runs(import_weights(source, out=str(tmp_path / "m"), head_width=32, size=16).next_command)
    assert_same_network(foreign, tmp_path / "m", colors=3)


def test_ddim_unet_of_diffood(tmp_path: Path) -> None:
    foreign = randomize(DdimUNet((32, 64, 64), 2, (False, True, False), classes=3))
    wrapped = {f"module.{name}": value for name, value in foreign.state_dict().items()}
    source = save(tmp_path / "ema.ckpt", wrapped)
    import_weights(source, out=str(tmp_path / "m"), classes=("a", "b", "c"))
    assert_same_network(foreign, tmp_path / "m", colors=3, classes=3)
    conditioning = DiffusionModel.load(tmp_path / "m").conditioning
    assert conditioning is not None
    assert conditioning.class_names == ("a", "b", "c")
    assert conditioning.has_null


def test_the_training_state_of_diffood_is_a_list(tmp_path: Path) -> None:
    foreign = randomize(DdimUNet((32, 32), 1, (False, True)))
    state = [foreign.state_dict(), {"state": {}, "param_groups": []}, {"last_epoch": 1}, 0, 1, "0101-0000"]
    import_weights(save(tmp_path / "train.ckpt", state), out=str(tmp_path / "m"))
    assert_same_network(foreign, tmp_path / "m", colors=3)
    averaged = randomize(DdimUNet((32, 32), 1, (False, True)))
    with_average = save(tmp_path / "ema.ckpt", [*state[:2], 0, 1, averaged.state_dict()])
    import_weights(with_average, out=str(tmp_path / "averaged"))
    assert_same_network(averaged, tmp_path / "averaged", colors=3)
    import_weights(with_average, out=str(tmp_path / "trained"), ema=False)
    assert_same_network(foreign, tmp_path / "trained", colors=3)


@pytest.mark.parametrize("by_blocks", [True, False], ids=["guided", "improved"])
def test_unets_of_openai(tmp_path: Path, by_blocks: bool) -> None:
    foreign = randomize(GuidedUNet((32, 64), 2, (False, True), 32, by_blocks=by_blocks, classes=4))
    source = save(tmp_path / "model.pt", foreign.state_dict())
    assert_runs(import_weights(source, out=str(tmp_path / "m"), heads=2, size=16).next_command)
    assert_same_network(foreign, tmp_path / "m", colors=3, classes=4)
    assert DiffusionModel.load(tmp_path / "m").schedule.kind == ("linear" if by_blocks else "cosine")


def test_improved_diffusion_with_attention_above_and_shift_only(tmp_path: Path) -> None:
    foreign = GuidedUNet((32, 64, 64), 1, (True, False, True), 32, by_blocks=False, shift_only=True)
    source = save(tmp_path / "model.pt", randomize(foreign).state_dict())
    import_weights(source, out=str(tmp_path / "m"), head_width=32)
    assert_same_network(foreign, tmp_path / "m", colors=3)


def test_4000_noise_levels_are_rescaled_to_the_time_of_the_network(tmp_path: Path) -> None:
    foreign = randomize(GuidedUNet((32, 32), 1, (False, False), 32, by_blocks=False))
    source = save(tmp_path / "model.pt", foreign.state_dict())
    import_weights(source, out=str(tmp_path / "m"), head_width=32, train_steps=4000)
    schedule = DiffusionModel.load(tmp_path / "m").schedule
    torch.testing.assert_close(schedule.abar, NoiseSchedule("cosine", num_levels=4000).abar[::4])
    assert_same_network(foreign, tmp_path / "m", colors=3)


def lfdn_checkpoint(path: Path, seed: int, *, ema: str) -> tuple[nn.Module, str]:
    """A checkpoint of DLSR with averaged weights in `model_ema`, or under LitEma's names without dots."""
    foreign = randomize(Lfdn(512, 64, 48, 32, 2), seed)
    state, trained = foreign.state_dict(), randomize(Lfdn(512, 64, 48, 32, 2), seed + 1).state_dict()
    names = {name: f"model.diffusion_model.{name}" for name in state}
    model = {names[name]: value for name, value in trained.items()} | {"betas": torch.zeros(100)}
    averaged = {names[name]: value for name, value in state.items()}
    content: dict[str, Any] = {
        "model": model,
        "model_ema": averaged if ema == "entry" else None,
        "optimizer": {"state": {}},
    }
    if ema == "names":
        flat = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": v for n, v in averaged.items()}
        model |= flat | {"model_ema.decay": torch.tensor(0.9999)}
    content |= {"epoch": 149, "args": argparse.Namespace(lr=1e-5, output_dir="./x")}
    return foreign, save(path, content)


@pytest.mark.parametrize("ema", ["entry", "names"])
def test_denoiser_of_dlsr_with_the_first_epoch(tmp_path: Path, ema: str) -> None:
    last, source = lfdn_checkpoint(tmp_path / "checkpoint-149.pth", 1, ema=ema)
    early, first = lfdn_checkpoint(tmp_path / "checkpoint-0.pth", 5, ema=ema)
    images = str(pictures(tmp_path / "images", 12))
    result = import_weights(source, out=str(tmp_path / "m"), first=first, backbone="lite0", images=images)
    assert "--regret" in result.next_command
    assert_runs(result.next_command)
    model = FeatureDiffusion.load(tmp_path / "m")
    x, t = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 99])
    assert model.first is not None
    for foreign, network in ((last, model.network), (early, model.first)):
        with torch.no_grad():
            expected = foreign(x, t)
            torch.testing.assert_close(network(x, t), expected, atol=1e-5, rtol=1e-4)
        assert expected.std() > 0.05
    assert model.encoding.channels == (16, 24, 40, 112, 320)
    assert len(model.trained_on) == 12
    good = pictures(tmp_path / "good", 40, seed=3)
    detector = Semantic.from_preset("released", backbone="lite0", standardize="image")
    detector.fit(good, FeatureDiffusion.load(tmp_path / "m"), alpha=0.1, statistics=20)
    assert len(detector.score(good).is_ood) == 40


def test_a_denoiser_of_features_requires_its_backbone(tmp_path: Path) -> None:
    _, source = lfdn_checkpoint(tmp_path / "checkpoint-149.pth", 1, ema="entry")
    with pytest.raises(FaroutError, match="denoises 512 features; give --backbone"):
        import_weights(source, out=str(tmp_path / "m"))
    _, other = lfdn_checkpoint(tmp_path / "checkpoint-0.pth", 5, ema="entry")
    with pytest.raises(FaroutError, match="denoises 512 features, and resnet18 has"):
        import_weights(other, out=str(tmp_path / "m"), backbone="resnet18", backbone_weights="random")


def test_efficientnet_of_dlsr(tmp_path: Path) -> None:
    foreign = randomize_statistics(randomize(EfficientNetB0()))
    state = {n: v for n, v in foreign.state_dict().items() if not n.endswith("num_batches_tracked")}
    source = tmp_path / "efficientnet-b0.pth"
    torch.save(state, source, _use_new_zipfile_serialization=False)  # as the published files of 2019
    result = import_weights(str(source), out=str(tmp_path / "m"))
    assert result.network == "timm's tf_efficientnet_b0"
    assert_runs(result.next_command)
    network = timm.create_model("tf_efficientnet_b0", pretrained=False)
    network.load_state_dict(load_file(tmp_path / "m" / "model.safetensors"))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = foreign(x)
        torch.testing.assert_close(network.eval()(x), expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 1e-3
    FeatureExtractor.create("tf_efficientnet_b0", str(tmp_path / "m"))


# -- files that are not imported ------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch executed",)


def tiny_state() -> dict[str, Tensor]:
    return randomize(DdimUNet((32, 32), 1, (False, True))).state_dict()


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {"a.pth": {"model": tiny_state(), "args": Hostile()}, "b.pth": Hostile()}.items():
        with pytest.raises(StoreError, match=r"system.*nothing in a file is executed"):
            import_weights(save(tmp_path / name, content), out=str(tmp_path / "m"))
    Path("c.pkl").write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(StoreError):
        import_weights("c.pkl", out="m")
    assert not Path("executed").exists()
    assert not Path("m").exists()


def test_arguments_next_to_the_weights_are_ignored(tmp_path: Path) -> None:
    content = {"model": tiny_state(), "args": argparse.Namespace(lr=1e-4, data="x")}
    result = import_weights(save(tmp_path / "c.pth", content), out=str(tmp_path / "m"))
    assert result.layout == "ddim"


def damaged(tmp_path: Path, what: str) -> str:
    path, state = tmp_path / "c.pth", tiny_state()
    if what == "nan":
        state["conv_in.weight"][0, 0, 0, 0] = torch.nan
    if what == "huge":
        state["conv_in.weight"] = torch.zeros(1).expand(10**6, 10**6, 3, 3)
    if what == "shape":
        state["mid.block_1.conv1.weight"] = torch.zeros(32, 32, 1, 1)
    if what == "missing":
        del state["up.1.block.0.conv2.weight"]
    if what == "foreign":
        state = {"layers.0.weight": torch.zeros(3), "layers.0.bias": torch.zeros(3)}
    if what == "empty":
        state = {}
    torch.save(state, path)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    if what == "text":
        path.write_text("<html>404</html>")
    if what == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("c/data.pkl", bytes(10**6))
    return str(path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "infinite or not numbers: conv_in.weight"),
        ("huge", "larger than the values in the file"),
        ("shape", r"mid_block.resnets.0.conv1.weight has shape \(32, 32, 1, 1\), expected \(32, 32, 3, 3\)"),
        ("missing", "1 tensors are missing"),
        ("foreign", r"such as layers.0.weight(?s:.*)ddim: .*"),
        ("empty", "no tensors"),
        ("truncated", "not a complete file of tensors"),
        ("text", "not a complete file of tensors"),
        ("compressed", "compressed archive"),
    ],
)
def test_a_file_that_is_not_imported_is_named_with_the_reason(tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        import_weights(damaged(tmp_path, what), out=str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_settings_that_have_no_effect_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "c.pth", tiny_state())
    with pytest.raises(FaroutError, match="heads has no effect on weights of the layout ddim"):
        import_weights(source, out=str(tmp_path / "m"), heads=2)
    with pytest.raises(FaroutError, match="unconditional"):
        import_weights(source, out=str(tmp_path / "m"), classes=("a",))
    with pytest.raises(FaroutError, match="did you mean monai"):
        import_weights(source, out=str(tmp_path / "m"), kind="mona")
    with pytest.raises(StoreError, match="not weights of the layout monai"):
        import_weights(source, out=str(tmp_path / "m"), kind="monai")
