"""Classifiers: one pass, networks by name, foreign modules and weights, folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from farout.classifiers.augment import random_crop, random_flip, random_resized_crop
from farout.classifiers.model import Classifier
from farout.classifiers.networks import NetworkSpec
from farout.core import store
from farout.core.errors import FaroutError, StoreError
from farout.data.preprocessing import Preprocessing
from small import classifier, model
from tolerances import assert_close

pytestmark = pytest.mark.numerics

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def images(count: int = 5, channels: int = 1, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def named(network: str, side: int = 16, channels: int = 3, classes: int = 4, **spec: object) -> Classifier:
    torch.manual_seed(0)
    clf = NetworkSpec(network, classes, channels, (side, side), **spec)
    preprocessing = Preprocessing(size=(side, side), channels=channels, native=(side, side))
    return Classifier(clf.build(), MEAN[:channels], STD[:channels], preprocessing, network=clf)


class Functional(nn.Module):
    """A network as people write them: it pools by a function, and its layers have names of their own."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.answer = nn.Linear(6, classes, bias=False)
        self.unused = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(functional.relu(self.norm(self.body(x))).mean((2, 3)))


class OpenOOD(nn.Module):
    """The small-stem ResNet-18 as OpenOOD writes it: `shortcut` and `fc`, pooling of 4 x 4 maps."""

    def __init__(self, classes: int = 4, head: str = "fc") -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        width = 64
        for number, (planes, stride) in enumerate([(64, 1), (128, 2), (256, 2), (512, 2)], start=1):
            layer = nn.Sequential(_Block(width, planes, stride), _Block(planes, planes, 1))
            setattr(self, f"layer{number}", layer)
            width = planes
        setattr(self, head, nn.Linear(512, classes))
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x)))))))
        return getattr(self, self.head)(x.mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, width: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or width != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(width, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


def stirred(module: nn.Module) -> nn.Module:
    """With running statistics that are not those of a fresh network."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
            layer.running_var.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return module.eval()


# one pass


def test_one_pass_gives_logits_features_and_maps() -> None:
    clf = named("resnet18")
    given = clf.outputs(images(5, 3, 16), maps=True)
    assert given.logits.shape == (5, 4)
    assert given.features.shape == (5, 512)
    assert given.maps is not None
    assert given.maps.shape == (5, 512, 2, 2)
    torch.testing.assert_close(given.maps.mean((2, 3)), given.features)
    torch.testing.assert_close(clf.head(given.features), given.logits)
    normalised = (images(5, 3, 16) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(given.logits, clf.module(normalised), rtol=1e-4, atol=1e-5)
    assert clf.outputs(images(5, 3, 16)).maps is None


@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_the_batch_does_not_matter(cut: int) -> None:
    clf, given = classifier(), images(9)
    whole = clf.outputs(given, maps=True)
    parts = [clf.outputs(part, maps=True) for part in given.split(cut)]
    for name in ("logits", "features", "maps"):
        assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert clf.outputs(given[:0]).logits.shape == (0, 3)


def test_batch_norm_keeps_its_statistics_whatever_the_mode() -> None:
    clf, given = classifier(), images(9)
    before = {name: value.clone() for name, value in clf.module.state_dict().items()}
    expected = clf.outputs(given).logits
    clf.module.train()
    assert torch.equal(clf.outputs(given).logits, expected)
    assert clf.module.training, "the mode is the caller's"
    assert all(torch.equal(value, before[name]) for name, value in clf.module.state_dict().items())


def test_logits_have_gradients_in_images_and_weights() -> None:
    clf, given = classifier(), images().requires_grad_()
    clf.logits(given).max(1).values.sum().backward()
    assert given.grad is not None
    assert bool((given.grad != 0).any())
    assert clf.head.weight.grad is not None
    assert torch.allclose(clf.logits(given), clf.outputs(given).logits, atol=1e-5)


def test_other_sizes_are_resized_and_other_channels_refused() -> None:
    clf = classifier()
    assert clf.outputs(images(2, 1, 20)).logits.shape == (2, 3)
    with pytest.raises(FaroutError, match=r"takes images \(B, 1, H, W\), got \(2, 3, 8, 8\)"):
        clf.outputs(images(2, 3))
    with pytest.raises(FaroutError, match="takes images"):
        clf.logits(images(2)[0])


# networks by name


@pytest.mark.parametrize(
    ("network", "width", "maps"),
    [("resnet34", 512, True), ("wrn16_2", 128, True), ("wrn40_2", 128, True), ("convnext_atto", 320, True)],
)
def test_networks_by_name(network: str, width: int, maps: bool) -> None:
    clf = named(network, side=32)
    assert (clf.width, clf.classes, clf.has_maps) == (width, 4, maps)
    assert clf.outputs(images(2, 3, 32)).features.shape == (2, width)
    assert named(network, side=32, channels=1).outputs(images(2, 1, 32)).logits.shape == (2, 4)


@pytest.mark.slow
def test_stems_differ_in_what_they_keep_of_small_images() -> None:
    small, large = named("resnet18", stem="small"), named("resnet18", stem="imagenet")
    assert small.outputs(images(1, 3, 16), maps=True).maps.shape[2:] == (2, 2)
    assert large.outputs(images(1, 3, 16), maps=True).maps.shape[2:] == (1, 1)
    assert named("resnet50").width == 2048


def test_a_transformer_has_no_maps_and_says_so() -> None:
    clf = named("vit_tiny_patch16_224", side=16)
    assert clf.outputs(images(2, 3, 16)).features.shape == (2, 192)
    with pytest.raises(FaroutError, match="maps"):
        clf.outputs(images(2, 3, 16), maps=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "resnet19"}, r"no network 'resnet19'.*resnet18"),
        ({"name": "wrn16_1", "stem": "imagenet"}, "has no stem"),
        ({"name": "resnet18", "stem": "large"}, "has no stem"),
        ({"name": "resnet18", "classes": 1}, "2 or more"),
        ({"name": "resnet18", "channels": 2}, "1 or 3"),
    ],
)
def test_networks_that_are_not_there(spec: dict[str, object], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        NetworkSpec(**{"classes": 4, **spec})


# any torch module


def test_any_module_is_a_classifier() -> None:
    module = stirred(Functional())
    clf = Classifier.from_module(module, MEAN, STD, size=8, head="answer", class_names="abcd")
    assert (clf.classes, clf.width, clf.class_names) == (4, 6, ("a", "b", "c", "d"))
    given = clf.outputs(images(3, 3))
    torch.testing.assert_close(given.features @ clf.head.weight.T, given.logits)
    assert not clf.has_maps


def test_a_module_that_cannot_be_built_again_is_not_saved(tmp_path: Path) -> None:
    clf = Classifier.from_module(Functional(), MEAN, STD, size=8, head="answer")
    with pytest.raises(FaroutError, match="pass network="):
        clf.save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_named_module_can_be_saved(tmp_path: Path) -> None:
    """Whatever its names and its pooling are, if it computes what the named network computes."""
    module = stirred(OpenOOD())
    clf = Classifier.from_module(module, MEAN, STD, size=16, network="resnet18")
    assert clf.network is not None
    assert clf.network.stem == "small"
    clf.save(tmp_path / "c")
    expected = Classifier.from_module(module, MEAN, STD, size=16).outputs(images(3, 3, 16)).logits
    torch.testing.assert_close(Classifier.load(tmp_path / "c").outputs(images(3, 3, 16)).logits, expected)
    with pytest.raises(FaroutError, match="is not the network wrn16_1"):
        Classifier.from_module(module, MEAN, STD, size=16, network="wrn16_1")


def test_a_residual_network_of_timms_can_be_saved(tmp_path: Path) -> None:
    """Only those of torchvision have a choice of stems."""
    torch.manual_seed(0)
    module = stirred(timm.create_model("resnet10t", num_classes=4))
    clf = Classifier.from_module(module, MEAN, STD, size=32, network="resnet10t")
    clf.save(tmp_path / "c")
    expected = clf.outputs(images(2, 3, 32)).logits
    torch.testing.assert_close(Classifier.load(tmp_path / "c").outputs(images(2, 3, 32)).logits, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "body"}, "not a linear layer.*answer"),
        ({"head": "unused"}, "not that of its layer 'unused'"),
        ({}, "not that of its layer 'unused'"),  # the last one registered
        ({"head": "answer", "class_names": "abc"}, "3 class names for a network of 4"),
        ({"head": "answer", "channels": 1}, "mean"),
        ({"head": "answer", "std": (0.1, 0, 0.1)}, "positive"),
        ({"head": "answer", "channels": 1, "mean": [0.5], "std": [0.5]}, "does not take images"),
    ],
)
def test_modules_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    given = {"mean": MEAN, "std": STD, "size": 8, **changes}
    with pytest.raises(FaroutError, match=message):
        Classifier.from_module(Functional(), given.pop("mean"), given.pop("std"), **given)


def test_a_module_without_logits_is_refused() -> None:
    with pytest.raises(FaroutError, match="no linear layer"):
        Classifier.from_module(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), MEAN, STD, size=8)
    with pytest.raises(FaroutError, match=r"expected logits \(B, classes\)"):
        Classifier.from_module(nn.Linear(8, 4), MEAN, STD, size=8)


# foreign weights


@pytest.mark.parametrize("kind", ["ckpt", "safetensors", "wrapped"])
@pytest.mark.parametrize("head", ["fc", "linear"])
def test_openood_checkpoints(tmp_path: Path, kind: str, head: str) -> None:
    module = stirred(OpenOOD(head=head))
    tensors = module.state_dict()
    if kind == "safetensors":
        path = tmp_path / "best.safetensors"
        save_file(tensors, path)
    else:
        path = tmp_path / "best.ckpt"
        prefixed = {f"module.{name}": value for name, value in tensors.items()}
        torch.save({"state_dict": prefixed} if kind == "wrapped" else tensors, path)
    clf = Classifier.from_weights(path, network="resnet18", mean=MEAN, std=STD, size=16)
    assert clf.classes == 4
    expected = Classifier.from_module(module, MEAN, STD, size=16, head=head).outputs(images(3, 3, 16)).logits
    torch.testing.assert_close(clf.outputs(images(3, 3, 16)).logits, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "resnet34"}, "missing, first layer1.2"),
        ({"network": "wrn16_1"}, "missing, first block1"),
        ({"classes": 10}, r"fc.weight has shape \(4, 512\), expected \(10, 512\)"),
        ({"channels": 1, "mean": [0.5], "std": [0.5]}, r"conv1.weight has shape \(64, 3, 3, 3\)"),
        ({"stem": "imagenet"}, r"conv1.weight has shape .*stem"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    torch.save(OpenOOD().state_dict(), tmp_path / "best.ckpt")
    with pytest.raises(StoreError, match=message):
        Classifier.from_weights(
            tmp_path / "best.ckpt", **{"network": "resnet18", "mean": MEAN, "std": STD, "size": 16, **changes}
        )


def test_weights_files_that_are_none(tmp_path: Path) -> None:
    def load(path: Path) -> Classifier:
        return Classifier.from_weights(path, network="resnet18", mean=MEAN, std=STD, size=16)

    with pytest.raises(StoreError, match="no weights file"):
        load(tmp_path / "none.pth")
    (tmp_path / "words.pth").write_text("these are words")
    with pytest.raises(StoreError, match=r"words\.pth"):
        load(tmp_path / "words.pth")
    torch.save({"net": OpenOOD(), "epoch": 3}, tmp_path / "objects.pt")
    with pytest.raises(StoreError, match="objects"):
        load(tmp_path / "objects.pt")
    headless = {name: value for name, value in OpenOOD().state_dict().items() if not name.startswith("fc")}
    torch.save(headless, tmp_path / "headless.pt")
    with pytest.raises(StoreError, match="no last layer"):
        load(tmp_path / "headless.pt")
    broken = OpenOOD().state_dict()
    broken["layer3.0.conv1.weight"][0] = float("nan")
    torch.save(broken, tmp_path / "nan.pt")
    with pytest.raises(StoreError, match=r"not all numbers: layer3\.0\.conv1\.weight"):
        load(tmp_path / "nan.pt")


# folders


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    clf = classifier()
    clf.trained_on, clf.provenance = frozenset({"a" * 32}), {"seed": 3}
    clf.save(tmp_path / "c")
    again = Classifier.load(tmp_path / "c")
    for name in ("content_hash", "class_names", "mean", "std", "preprocessing", "trained_on", "provenance", "network"):
        assert getattr(again, name) == getattr(clf, name), name
    one, two = clf.outputs(images(), maps=True), again.outputs(images(), maps=True)
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.maps, two.maps)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        "config.json", "hashes.json", "model.safetensors", "trained_on.txt", "README.md"
    }  # fmt: skip
    assert "wrn16_1" in (tmp_path / "c" / "README.md").read_text()


def test_the_hash_is_of_all_that_decides_a_logit() -> None:
    clf = classifier()
    hashes = {clf.content_hash, classifier(classes=4).content_hash}
    clf.mean = (0.4,)
    hashes.add(clf.content_hash)
    clf.class_names = ("x", "y", "z")
    hashes.add(clf.content_hash)
    with torch.no_grad():
        clf.module.bn1.running_mean[0] += 1e-3
    hashes.add(clf.content_hash)
    assert len(hashes) == 5


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no folder"):
        Classifier.load(tmp_path / "nowhere")
    model().save(tmp_path / "diffusion")
    with pytest.raises(StoreError, match="expected a classifier"):
        Classifier.load(tmp_path / "diffusion")
    clf = classifier()
    with pytest.raises(StoreError, match="not replaced"):
        clf.save(tmp_path / "diffusion")
    clf.save(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "mean": [0.1]}))
    with pytest.raises(StoreError, match=r"config\.json was changed"):
        Classifier.load(tmp_path / "c")
    store.write_folder_hashes(tmp_path / "c")
    with pytest.raises(StoreError, match="hash differs"):
        Classifier.load(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").write_text("words")
    store.write_folder_hashes(tmp_path / "c")
    with pytest.raises(StoreError, match="cannot be read as safetensors"):
        Classifier.load(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(StoreError, match="missing"):
        Classifier.load(tmp_path / "c")


# augmentation


def test_crops_are_shifts_and_flips_are_mirrors() -> None:
    given, draws = images(200, 3), torch.Generator().manual_seed(0)
    padded = functional.pad(given, [2] * 4)
    seen = set()
    for image, whole in zip(random_crop(given, 2, draws), padded, strict=True):
        places = [(y, x) for y in range(5) for x in range(5) if torch.equal(image, whole[:, y : y + 8, x : x + 8])]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 25
    flipped = random_flip(given, draws)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, given, strict=True)]
    assert all(torch.equal(a, b) or m for a, b, m in zip(flipped, given, mirrored, strict=True))
    assert 70 < sum(mirrored) < 130
    assert random_crop(given, 0, draws) is given


def test_augmentation_follows_the_generator_alone() -> None:
    given = images(6)
    for change in (lambda x, g: random_crop(x, 2, g), random_flip, random_resized_crop):
        first, again, other = (change(given, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_resized_crops_are_parts_of_the_image() -> None:
    """On a ramp, a crop's values tell its place and its size."""
    side = 16
    ramp = (torch.arange(side) + 0.5) / side
    both = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side)])
    cropped = random_resized_crop(both.repeat(500, 1, 1, 1), torch.Generator().manual_seed(0))
    assert cropped.min() >= 0
    assert cropped.max() <= 1
    width = (cropped[:, 0, 0, -2] - cropped[:, 0, 0, 1]) * side / (side - 3)
    height = (cropped[:, 1, -2, 0] - cropped[:, 1, 1, 0]) * side / (side - 3)
    area, ratio = (width * height), (width / height)
    assert 0.07 < area.min() < 0.12
    assert area.max() < 1.01
    assert ratio.min() > 0.74
    assert ratio.max() < 1.34
    assert abs(cropped[:, 0].mean() - 0.5) < 0.03
    whole = random_resized_crop(both[None], torch.Generator(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    torch.testing.assert_close(whole[0], both)


def test_a_control_with_fresh_weights() -> None:
    clf = classifier()
    fresh = clf.with_random_weights(1)
    assert (fresh.mean, fresh.class_names, fresh.trained_on) == (clf.mean, clf.class_names, frozenset())
    assert not torch.equal(fresh.outputs(images()).logits, clf.outputs(images()).logits)
    assert fresh.content_hash == clf.with_random_weights(1).content_hash
    with pytest.raises(FaroutError, match="fresh weights"):
        Classifier.from_module(Functional(), MEAN, STD, size=8, head="answer").with_random_weights()
