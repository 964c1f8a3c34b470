"""Frozen backbones: their features are timm's own, whatever the batch; weights come from where is said."""

import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from farout.core import store
from farout.core.errors import FaroutError, StoreError
from farout.features import backbones
from farout.features.extractor import FeatureExtractor
from tolerances import assert_close

pytestmark = pytest.mark.numerics


def pictures(count: int = 3, size: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lite0() -> FeatureExtractor:
    return FeatureExtractor.create("lite0", size=64)


@pytest.fixture(scope="module")
def small() -> FeatureExtractor:
    """timm's smallest residual network, with random weights."""
    return FeatureExtractor.create("test_resnet", weights="random", size=32)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot be reached, and whoever tries learns it."""

    def refuse(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("cannot find the file, and the hub is out of reach\nmore of it")

    for name in ("load_state_dict_from_hf", "load_state_dict_from_url", "load_custom_from_hf"):
        monkeypatch.setattr(timm.models._builder, name, refuse)


# -- what the features are ----------------------------------------------------------------------------------------


def test_features_are_the_means_of_timms_own_maps(lite0: FeatureExtractor) -> None:
    """With other features, published figures would say nothing of ours."""
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(backbones._lite0_weights())
    images = pictures()
    with torch.no_grad():
        maps = whole.forward_intermediates(images * 2 - 1, intermediates_only=True)
    assert [level.shape[1] for level in maps] == [16, 24, 40, 112, 320]
    assert [64 // level.shape[2] for level in maps] == [2, 4, 8, 16, 32]
    wanted = torch.cat([level.mean((2, 3)) for level in maps], dim=1)
    found = lite0.pooled_features(images)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.data
def test_the_installed_weights_are_timms(data: Path) -> None:
    theirs = load_file(data.parent / "weights" / "tf_efficientnet_lite0.safetensors")
    ours = backbones._lite0_weights()
    assert set(ours) == set(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.data
def test_a_file_of_weights_gives_the_features_of_the_package(lite0: FeatureExtractor, data: Path) -> None:
    file = data.parent / "weights" / "tf_efficientnet_lite0.safetensors"
    other = FeatureExtractor.create("lite0", weights=str(file), size=64)
    assert torch.equal(other.pooled_features(pictures()), lite0.pooled_features(pictures()))
    assert other.content_hash == lite0.content_hash, "where weights lie decides nothing"


def test_a_row_does_not_depend_on_its_batch(lite0: FeatureExtractor) -> None:
    images = pictures(7)
    whole = lite0.pooled_features(images)
    for index in range(7):
        assert_close(lite0.pooled_features(images[index : index + 1])[0], whole[index])
    assert_close(lite0.pooled_features(images.flip(0)).flip(0), whole)
    assert_close(lite0.pooled_features(images, batch_size=3), whole)
    assert lite0.pooled_features(images[:0]).shape == (0, 512)


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [("b4", (24, 32, 56, 160, 448)), ("resnet50", (256, 512, 1024)), ("dinov2", (384, 384, 384, 384))],
)
def test_presets_have_the_taps_they_promise(backbone: str, channels: tuple[int, ...]) -> None:
    size = 28 if backbone == "dinov2" else 32
    extractor = FeatureExtractor.create(backbone, weights="random", size=size)
    assert extractor.channels == channels
    features = extractor.pooled_features(pictures(2, size))
    assert features.shape == (2, sum(channels))
    assert bool(torch.isfinite(features).all())


def test_the_papers_residual_network_is_tapped_at_its_strides() -> None:
    """Levels 1 to 3 are strides 4, 8 and 16; the stem and the last stage stay out."""
    network, _ = backbones.create_backbone("resnet50.tv_in1k", (1, 2, 3), 64, "random")
    assert network.feature_info.reduction() == [4, 8, 16]


def test_a_transformer_gives_normalised_token_means() -> None:
    """The class token is no position, and channels of huge activation must not drown the others."""
    extractor = FeatureExtractor.create("test_vit", weights="random", layers=(1, 4), size=32)
    model, images = extractor.network.model, pictures(2, 32)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (extractor.mean, extractor.std))
    wanted = []
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed((images - mean) / std)))
        for block in model.blocks[:5]:
            tokens = block(tokens)
            x = tokens[:, model.num_prefix_tokens :]
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            wanted.append(x.mean(1))
    assert model.num_prefix_tokens > 0
    assert torch.allclose(extractor.pooled_features(images), torch.cat([wanted[1], wanted[4]], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("test_resnet", 5), ("test_vit", 4), ("test_convnext", 4), ("test_mambaout", 4), ("hiera_tiny_224", 4)],
)
def test_any_network_of_timms_can_serve(name: str, layers: int) -> None:
    extractor = FeatureExtractor.create(name, weights="random", size=64 if name != "hiera_tiny_224" else None)
    assert len(extractor.layers) == layers
    features = extractor.pooled_features(pictures(1, extractor.size))
    assert features.shape == (1, extractor.width)


def test_maps_with_channels_last_are_averaged_over_positions() -> None:
    """Swin and MambaOut give (B, h, w, c): means over the wrong axes would be taken for features."""
    extractor = FeatureExtractor.create("test_mambaout", weights="random", size=64)
    with torch.no_grad():
        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (extractor.mean, extractor.std))
        maps = extractor.network((pictures() - mean) / std)
    assert maps[0].shape[-1] == extractor.channels[0]
    wanted = torch.cat([level.mean((1, 2)) for level in maps], dim=1)
    torch.testing.assert_close(extractor.pooled_features(pictures()), wanted, rtol=1e-4, atol=1e-5)
    assert extractor.feature_grid(pictures(), 4).shape == (3, extractor.width, 4, 4)


def test_a_grid_keeps_means_and_places(lite0: FeatureExtractor) -> None:
    images = pictures()
    grid = lite0.feature_grid(images, 2)
    assert grid.shape == (3, 512, 2, 2)
    torch.testing.assert_close(grid.mean((2, 3)), lite0.pooled_features(images), rtol=1e-4, atol=1e-5)


def test_gray_images_and_vectors_are_refused(small: FeatureExtractor) -> None:
    for shape in ((2, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(FaroutError, match=r"\(B, 3, H, W\)"):
            small.pooled_features(torch.zeros(shape))


# -- names and levels ---------------------------------------------------------------------------------------------


def test_unknown_names_say_what_is_near() -> None:
    with pytest.raises(FaroutError, match="resnet50"):
        FeatureExtractor.create("resnet5o")
    with pytest.raises(FaroutError, match=r"for resnet50 it has resnet50\."):
        FeatureExtractor.create("resnet50.nonsense", weights="random")


@pytest.mark.parametrize("layers", [(0, 9), (-1,), (1, 1)])
def test_unknown_levels_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(FaroutError, match=r"level|layers"):
        FeatureExtractor.create("test_resnet", weights="random", layers=layers)
    with pytest.raises(FaroutError, match="size"):
        FeatureExtractor.create("test_resnet", weights="random", size=0)


# -- weights ------------------------------------------------------------------------------------------------------


def test_random_weights_are_reproducible_and_say_so(small: FeatureExtractor) -> None:
    """A control that changes from run to run controls nothing."""
    before = torch.random.get_rng_state()
    again = FeatureExtractor.create("test_resnet", weights="random", size=32)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's own random numbers go on"
    assert again.content_hash == small.content_hash
    assert torch.equal(again.pooled_features(pictures(2, 32)), small.pooled_features(pictures(2, 32)))
    assert again.describe()["weights"] == "random (seed 0)"
    assert again.describe()["backbone"] == "test_resnet"


def test_weights_that_cannot_be_used_are_refused(tmp_path: Path, offline: None) -> None:
    def refusal(file: Path) -> str:
        with pytest.raises(StoreError) as caught:
            FeatureExtractor.create("test_resnet", weights=str(file), size=32)
        return str(caught.value)

    assert 'weights="random"' in refusal(tmp_path / "lost.pth")
    for number, words in enumerate(("these are words", "(words", "0", "}ab", "", "PK\x03\x04 cut short")):
        for name in (f"{number}.pth", f"{number}.safetensors"):
            (tmp_path / name).write_text(words)
            assert name in refusal(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    assert "no state_dict" in refusal(tmp_path / "list.pth")
    other = timm.create_model("test_efficientnet").state_dict()
    torch.save(other, tmp_path / "other.pth")
    assert "missing" in refusal(tmp_path / "other.pth")
    own = timm.create_model("test_resnet").state_dict()
    torch.save({name: torch.zeros([2 * n for n in v.shape]) for name, v in own.items()}, tmp_path / "wide.pth")
    assert "shape" in refusal(tmp_path / "wide.pth")


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.path, "executed"))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_objects_in_weights_are_never_run(how: str, tmp_path: Path) -> None:
    """Weights from a stranger must not be able to run code."""
    content = {"conv1.weight": torch.zeros(1), "args": _Trap(tmp_path / "victim")}
    file = tmp_path / "evil.pth"
    torch.save(content, file) if how == "torch" else file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(StoreError, match="state_dict"):
        FeatureExtractor.create("test_resnet", weights=str(file))
    assert not (tmp_path / "victim").exists()


def test_a_missing_hub_names_the_alternatives(offline: None) -> None:
    for name in ("resnet50", "test_resnet"):
        with pytest.raises(StoreError, match="cannot be downloaded") as caught:
            FeatureExtractor.create(name)
        for word in ("lite0", 'weights="FILE"', 'weights="random"'):
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(FaroutError, match="levels"):
        FeatureExtractor.create("test_resnet", layers=(9,))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_model_saved_for_the_hub_is_loaded_from_its_folder(form: str, tmp_path: Path, offline: None) -> None:
    """A network that was tuned on seven classes of one's own, and saved as timm saves for the hub."""
    torch.manual_seed(3)
    tuned = timm.create_model("test_resnet", num_classes=7).eval()
    timm.models.save_for_hf(tuned, tmp_path / "mine", safe_serialization=form == "safetensors")
    file = next(path for path in (tmp_path / "mine").iterdir() if path.suffix == f".{form}")
    extractor = FeatureExtractor.create("test_resnet", weights=str(file), size=32)
    assert str(file) in extractor.describe()["weights"]
    with torch.no_grad():
        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (extractor.mean, extractor.std))
        last = tuned.forward_features((pictures(2, 32) - mean) / std).mean((2, 3))
    torch.testing.assert_close(
        extractor.pooled_features(pictures(2, 32))[:, -last.shape[1] :], last, rtol=1e-4, atol=1e-5
    )
    folder = FeatureExtractor.create("test_resnet", weights=str(tmp_path / "mine"), size=32)
    assert folder.content_hash == extractor.content_hash


def test_positions_of_a_transformer_are_fitted_to_the_input(tmp_path: Path, offline: None) -> None:
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    extractor = FeatureExtractor.create("test_vit", weights=str(tmp_path / "vit.safetensors"), size=64)
    assert extractor.pooled_features(pictures(1, 64)).shape == (1, extractor.width)


# -- folders ------------------------------------------------------------------------------------------------------


def test_a_saved_extractor_needs_no_source_of_weights(small: FeatureExtractor, tmp_path: Path, offline: None) -> None:
    small.save(tmp_path / "features")
    loaded = FeatureExtractor.load(tmp_path / "features")
    assert loaded.content_hash == small.content_hash
    assert loaded.describe() == small.describe()
    assert torch.equal(loaded.pooled_features(pictures(2, 32)), small.pooled_features(pictures(2, 32)))


def test_altered_folders_are_refused(small: FeatureExtractor, tmp_path: Path) -> None:
    """A detector on other features would score nonsense without a word."""
    small.save(tmp_path / "features")
    file = tmp_path / "features" / "model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if name.endswith("weight"))
    save_file({**tensors, first: tensors[first] + 1e-3}, file)
    with pytest.raises(StoreError, match=r"model\.safetensors was changed"):
        FeatureExtractor.load(tmp_path / "features")
    store.write_folder_hashes(tmp_path / "features")
    with pytest.raises(StoreError, match="hash differs"):
        FeatureExtractor.load(tmp_path / "features")
    save_file({name: value for name, value in tensors.items() if name != first}, file)
    store.write_folder_hashes(tmp_path / "features")
    with pytest.raises(StoreError, match=f"1 tensors are missing, first {first}"):
        FeatureExtractor.load(tmp_path / "features")
    file.unlink()
    with pytest.raises(StoreError, match="missing"):
        FeatureExtractor.load(tmp_path / "features")
    shutil.rmtree(tmp_path / "features")
    with pytest.raises(StoreError, match="no folder"):
        FeatureExtractor.load(tmp_path / "features")


def test_what_decides_the_features_decides_the_hash(small: FeatureExtractor) -> None:
    changes = ({"layers": (0, 1)}, {"size": 64})
    others = [FeatureExtractor.create("test_resnet", **{"weights": "random", "size": 32, **c}) for c in changes]
    assert len({small.content_hash, *(other.content_hash for other in others)}) == 3
