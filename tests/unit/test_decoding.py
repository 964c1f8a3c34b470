"""Stated conversions of image formats: what a wrong one would change silently is every score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from farout.core.errors import SourceError, UnreadableImageError
from farout.data.decoding import content_hash, decode, from_pil, scale_to_uint8, to_pil, to_uint8
from farout.data.read_settings import ReadSettings
from image_files import encode


@pytest.fixture
def colors() -> Image.Image:
    """A 4x6 (height x width) image of random colors."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))


def channels_first(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_color_formats_keep_every_pixel(colors, form):
    assert torch.equal(decode(encode(colors, form), "k").values, channels_first(colors))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_gray_stays_one_channel(colors, form):
    gray = colors.convert("L")
    assert torch.equal(decode(encode(gray, form), "k").values, torch.from_numpy(np.array(gray))[None])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_exif_orientation_is_honoured_once(colors, form):
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer must turn it a quarter clockwise
    turned = decode(encode(colors, form, exif=exif), "k").values
    assert turned.shape == (3, 6, 4)
    assert torch.equal(turned, torch.rot90(channels_first(colors), -1, (1, 2)))


def test_palette_gives_its_colors():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    expected = torch.tensor([[[10, 200]], [[20, 100]], [[30, 50]]], dtype=torch.uint8)
    assert torch.equal(decode(encode(image, "PNG"), "k").values, expected)


def test_alpha_is_composited_on_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)])
    expected = torch.tensor([[[255, 255, 204]], [[0, 255, 204]], [[0, 255, 204]]], dtype=torch.uint8)
    assert torch.equal(decode(encode(image, "PNG"), "k").values, expected)


def test_transparent_palette_color_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    result = decode(encode(image, "PNG", transparency=0), "k").values
    assert result[:, 0, 0].tolist() == [255, 255, 255]
    assert result[:, 0, 1].tolist() == [200, 100, 50]


def test_gray_with_alpha_becomes_rgb_on_white():
    image = Image.new("LA", (2, 1))
    image.putdata([(100, 255), (100, 0)])
    assert decode(encode(image, "PNG"), "k").values[:, 0].tolist() == [[100, 255]] * 3


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # full magenta and yellow is red
    red, green, blue = decode(encode(image, "TIFF"), "k").values[:, 0, 0].tolist()
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(form):
    values = np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16)
    result = decode(encode(Image.fromarray(values), form), "k")
    assert scale_to_uint8(result.values, result.value_range).tolist() == [[[0, 1, 4, 128, 255]]]


def test_32_bit_gray_requires_a_value_range():
    values = from_pil(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))
    with pytest.raises(UnreadableImageError, match=r"0 to 70000.*--value-range 0:131071"):
        scale_to_uint8(values, None)
    assert scale_to_uint8(values, (0, 70000)).tolist() == [[[0, 255]]]


def test_float_tiff_in_the_unit_range():
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert scale_to_uint8(decode(encode(image, "TIFF"), "k").values, None).tolist() == [[[0, 128, 255]]]


def test_one_bit_becomes_black_and_white():
    image = Image.new("1", (2, 1))
    image.putdata([0, 1])
    assert decode(encode(image, "PNG"), "k").values.tolist() == [[[0, 255]]]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, "k").values[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"just some text, no image", "not an image"), (b"", "empty"), (b"\x89PNG\r\n\x1a\nbroken", "")],
)
def test_what_is_no_image_names_its_key(data, reason):
    with pytest.raises(UnreadableImageError, match=f"^a/b.png: .*{reason}"):
        decode(data, "a/b.png")


def test_truncated_jpeg_is_unreadable_not_half_gray():
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, "JPEG")
    with pytest.raises(UnreadableImageError, match=r"^cut\.jpg: .*truncated"):
        decode(data[: len(data) // 2], "cut.jpg")


def test_more_pixels_than_the_limit_are_unreadable(colors):
    with pytest.raises(UnreadableImageError, match=r"^k: .*the limit is 4 \(--max-pixels\)"):
        decode(encode(colors, "PNG"), "k", ReadSettings(max_pixels=4))


def test_round_trip_through_pil(colors):
    for image in (channels_first(colors), channels_first(colors)[:1]):
        assert torch.equal(from_pil(to_pil(image)), image)


def test_floats_are_quantised_and_uint8_passes():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(to_uint8(pixels.float() / 255), pixels)
    assert torch.equal(to_uint8(pixels.double() / 255), pixels)
    assert to_uint8(pixels) is pixels


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 200.0], "from 0 to 200.*0..255"),
        ([-1.0, 1.0], "from -1 to 1.*-1..1"),
        ([-7.0, 900.0], "from -7 to 900"),
        ([0.0, float("nan")], "NaN"),
        ([0.0, float("inf")], "NaN or infinite"),
    ],
)
def test_floats_of_another_range_are_named(values, message):
    with pytest.raises(SourceError, match=message):
        to_uint8(torch.tensor(values).reshape(1, 1, 2))


def test_other_types_and_layouts_are_refused():
    with pytest.raises(SourceError, match="int64"):
        to_uint8(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(SourceError, match="move the channels"):
        to_uint8(torch.zeros(5, 8, 8, 3))


def test_hash_knows_shape_and_pixels():
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)
    assert content_hash(image) == content_hash(image.clone())
    assert content_hash(image) != content_hash(image.reshape(1, 4, 3))
    assert content_hash(image) != content_hash(image + 1)
    assert len(content_hash(image)) == 32
