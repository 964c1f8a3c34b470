"""What a network sees: sizes, channels, value range, and the protocols of a fair comparison."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from farout.core.errors import FaroutError, MisleadingResultWarning, SourceError
from farout.core.schema import create_dataclass
from farout.data import preprocessing as module
from farout.data.preprocessing import Preprocessing, find_mismatches
from farout.data.sources import open_source


def image(channels: int = 3, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def test_an_image_of_the_right_size_only_changes_its_type():
    pixels = image()
    for protocol in ("native", "direct"):
        result = Preprocessing((16, 16), 3, (16, 16), protocol)(pixels)
        assert result.dtype == torch.float32
        assert torch.equal(result, pixels.float() / 255)


@pytest.mark.parametrize("protocol", ["native", "direct", "common"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("given", [1, 3])
def test_every_image_leaves_with_the_stated_shape_and_range(protocol, channels, given):
    prepared = Preprocessing((12, 20), channels, (16, 16), protocol, crop=10)(image(given, 33, 9))
    assert prepared.shape == (channels, 12, 20)
    assert prepared.min() >= 0
    assert prepared.max() <= 1


def test_native_protocol_takes_sharpness_from_foreign_images():
    sharp = image(3, 64, 64)
    native = Preprocessing((64, 64), 3, (16, 16))(sharp)
    direct = Preprocessing((64, 64), 3, (16, 16), "direct")(sharp)
    assert torch.equal(direct, sharp.float() / 255)
    assert native.diff(dim=-1).abs().mean() < 0.2 * direct.diff(dim=-1).abs().mean()


def test_shrinking_is_antialiased():
    stripes = torch.zeros(1, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 255
    shrunk = Preprocessing((8, 8), 1, (32, 32))(stripes)
    assert (shrunk - 0.5).abs().max() < 0.1  # sampling without a filter would give 0 or 1


def test_crop_is_central_and_comes_first():
    pixels = torch.zeros(1, 20, 30, dtype=torch.uint8)
    pixels[:, 8:12, 13:17] = 255
    assert torch.equal(Preprocessing((4, 4), 1, (4, 4), crop=4)(pixels), torch.ones(1, 4, 4))
    assert Preprocessing((20, 30), 1, (20, 30), crop=4)(pixels).min() == 1  # also where the sizes are right already


@pytest.mark.parametrize("shape", [(20, 37), (37, 20), (9, 5), (12, 12), (6, 100)])
def test_filling_keeps_the_aspect_and_cuts_the_centre(shape):
    """As torchvision resizes the shorter side and cuts the centre: the customary way to text-conditional models."""
    pixels = image(3, *shape)
    found = Preprocessing((12, 12), 3, (12, 12), kernel="bilinear", fill=True)(pixels)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    bilinear = transforms.InterpolationMode.BILINEAR
    cut = transforms.Compose([transforms.Resize(12, bilinear), transforms.CenterCrop(12), transforms.ToTensor()])
    torch.testing.assert_close(found, cut(picture), rtol=0, atol=1e-6)
    assert Preprocessing((10, 4), 3, (10, 4), fill=True)(pixels).shape == (3, 10, 4)


def test_what_was_stored_before_keeps_its_identity():
    plain = Preprocessing((12, 12), 3, (12, 12))
    assert set(plain.to_dict()) == {"size", "channels", "native", "protocol", "crop", "scaling", "jpeg_quality"}
    filling = Preprocessing((12, 12), 3, (12, 12), kernel="bilinear", fill=True)
    for each in (plain, filling):
        assert create_dataclass(Preprocessing, json.loads(json.dumps(each.to_dict())), "") == each


def test_common_protocol_encodes_once_after_the_native_size(monkeypatch):
    calls = []
    original = module._through_jpeg
    monkeypatch.setattr(module, "_through_jpeg", lambda p, q: calls.append(p.size) or original(p, q))
    pixels = image(3, 40, 24)
    result = Preprocessing((32, 32), 3, (16, 16), "common", jpeg_quality=50)(pixels)
    assert calls == [(16, 16)]
    small = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=50, subsampling="4:2:0")
    expected = np.array(Image.open(data).resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert torch.equal(result, torch.from_numpy(expected.copy()).float() / 255)


def test_common_protocol_also_touches_images_of_the_right_size():
    pixels = image()
    prepared = Preprocessing((16, 16), 3, (16, 16), "common")(pixels)
    assert not torch.equal(prepared, pixels.float() / 255)


def test_gray_is_replicated_and_rgb_becomes_luminance():
    gray = image(1)
    assert torch.equal(Preprocessing((16, 16), 3, (16, 16))(gray), (gray.float() / 255).expand(3, -1, -1))
    color = image(3)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    luminance = (color.float() * weights).sum(0, keepdim=True) / 255
    assert torch.allclose(Preprocessing((16, 16), 1, (16, 16))(color), luminance, atol=1.01 / 255)


def test_min_max_does_not_see_brightness_or_contrast():
    prepare = Preprocessing((16, 16), 3, (16, 16), scaling="minmax")
    pixels = image() % 100
    result = prepare(pixels)
    assert torch.allclose(prepare(pixels * 2 + 50), result, atol=1e-6)
    assert result.min() == 0
    assert result.max() == 1


def test_min_max_is_taken_over_all_channels():
    pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    pixels[1], pixels[2] = 50, 100
    result = Preprocessing((2, 2), 3, (2, 2), scaling="minmax")(pixels)
    assert result.amax((1, 2)).tolist() == [0, 0.5, 1]


def test_min_max_of_a_constant_image_is_zero_not_nan():
    constant = torch.full((3, 16, 16), 77, dtype=torch.uint8)
    assert torch.equal(Preprocessing((16, 16), 3, (16, 16), scaling="minmax")(constant), torch.zeros(3, 16, 16))


def test_a_model_gets_its_preprocessing_back():
    prepared = Preprocessing((12, 20), 1, (28, 28), "common", 24, "minmax", 75)
    assert create_dataclass(Preprocessing, json.loads(json.dumps(prepared.to_dict())), "") == prepared
    with pytest.raises(FaroutError, match="gamma"):
        create_dataclass(Preprocessing, {**prepared.to_dict(), "gamma": 2}, "config.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (0, 4)},
        {"channels": 4},
        {"protocol": "other"},
        {"scaling": "z"},
        {"jpeg_quality": 0},
        {"crop": 0},
        {"kernel": "x"},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(FaroutError, match=r"expected|100"):
        Preprocessing(**{"size": (4, 4), "channels": 3, "native": (4, 4), **wrong})


def test_floats_are_refused_before_they_are_scaled_twice():
    with pytest.raises(ValueError, match="float32"):
        Preprocessing((4, 4), 3, (4, 4))(torch.rand(3, 4, 4))


def test_for_source_takes_the_native_size_without_warning():
    source = open_source(image(1)[None].repeat(5, 1, 1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = Preprocessing.for_source(source)
    assert prepared == Preprocessing((16, 16), 1, (16, 16))


def test_for_source_names_the_factor_when_it_shrinks():
    source = open_source(image(3, 96, 192)[None])
    with pytest.warns(MisleadingResultWarning, match="96x192 pixels and are shrunk 3 times to 32x64"):
        prepared = Preprocessing.for_source(source)
    assert prepared.size == (32, 64)
    assert prepared.native == (96, 192)


def test_for_source_with_a_size_is_square_and_silent():
    source = open_source(image(3, 96, 192)[None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Preprocessing.for_source(source, size=48).size == (48, 48)


def test_for_source_of_mixed_sizes_takes_the_most_common():
    shapes = [(20, 20), (10, 12), (10, 12), (30, 30)]
    source = open_source([Image.new("L", (w, h)) for h, w in shapes] + [Image.new("RGB", (9, 9))])
    prepared = Preprocessing.for_source(source)
    assert prepared.native == (10, 12)
    assert prepared.channels == 3  # one of them is RGB
    assert Preprocessing.for_source(source, crop=10).native == (10, 10)


def test_for_source_without_a_readable_image_says_why(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(SourceError, match=r"a\.png: not an image"):
        Preprocessing.for_source(open_source(tmp_path, policy="nan"))


def test_traps_are_named_with_counts():
    fitted = Preprocessing((16, 16), 1, (16, 16))
    mixed = [Image.new("L", (16, 16)), Image.new("RGB", (16, 16)), Image.new("RGB", (32, 8))]
    size, channels = find_mismatches(open_source(mixed), fitted)
    assert "1 of 3" in size
    assert "16x16" in size
    assert "8x32" in size
    assert "2 of 3" in channels
    assert "luminance" in channels
    (gray,) = find_mismatches(open_source(mixed[:1]), Preprocessing((16, 16), 3, (16, 16)))
    assert "replicated" in gray
    assert find_mismatches(open_source(mixed[:1]), fitted) == []
    rgb = Preprocessing((16, 16), 3, (16, 16))
    assert find_mismatches(open_source(mixed[:1]), rgb, fitted_gray=True) == []
    (color,) = find_mismatches(open_source(mixed[:2]), rgb, fitted_gray=True)
    assert "1 of 2" in color
    assert "fitted ones were all gray" in color
