"""Images with more than 8 bits, floating-point values, several frames, and special formats."""

from __future__ import annotations

import io
import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import farout
from farout.core.errors import FaroutError, LeftOutWarning, MisleadingResultWarning, UnreadableImageError
from farout.core.schema import create_dataclass
from farout.data.decoding import FORMATS, decode, image_suffixes, scale_to_uint8
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing
from farout.data.read_settings import ReadSettings
from farout.data.sources import open_source


def write_gray(folder: Path, values: list[np.ndarray], suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for index, array in enumerate(values):
        Image.fromarray(array).save(folder / f"{index:03d}{suffix}")
    return folder


def ramp_of_12_bits(count: int = 4) -> list[np.ndarray]:
    """Images of the values 0, 24, ..., 4056: 170 different gray levels."""
    values = np.arange(0, 4080, 24, dtype=np.uint16).reshape(10, 17)
    return [np.roll(values, shift) for shift in range(count)]


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, format=form, **options)
    return data.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_12_bit_values_in_16_bit_files_keep_their_gray_levels(tmp_path: Path, suffix: str) -> None:
    source = open_source(write_gray(tmp_path / "x", ramp_of_12_bits(), suffix))
    assert len(source[0].unique()) == 170
    assert source.value_range == (0, 4095)
    expected = torch.from_numpy(np.rint(ramp_of_12_bits()[0] / 4095 * 255).astype(np.uint8))[None]
    assert torch.equal(source[0], expected)


def test_int32_tiff_of_8_bit_values_is_read_as_8_bits(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    source = open_source(write_gray(tmp_path / "x", [values], ".tif"))
    assert source[0].flatten().tolist() == list(range(256))


def test_16_bit_values_use_the_whole_range(tmp_path: Path) -> None:
    values = np.array([[0, 257, 40000, 65535]], dtype=np.uint16)
    source = open_source(write_gray(tmp_path / "x", [values]))
    assert source[0].flatten().tolist() == [0, 1, 156, 255]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.warn_about_reading()


@pytest.mark.parametrize(
    ("values", "declared", "expected"),
    [
        (np.array([[0.0, 127.0, 255.0]], dtype=np.float32), "0:255", [0, 127, 255]),
        (np.array([[-1000.0, 1000.0, 3000.0]], dtype=np.float32), "-1000:3000", [0, 128, 255]),
        (np.array([[-2000, 1000, 5000]], dtype=np.int32), (-1000, 3000), [0, 128, 255]),
    ],
)
def test_values_without_a_usual_range_require_one(
    tmp_path: Path, values: np.ndarray, declared: str | tuple[float, float], expected: list[int]
) -> None:
    folder = write_gray(tmp_path / "x", [values], ".tif")
    with pytest.raises(UnreadableImageError, match=r"have no usual range; give it, for example --value-range"):
        open_source(folder)[0]
    assert open_source(folder, reading=ReadSettings(value_range=declared))[0].flatten().tolist() == expected


def test_dark_images_of_a_set_with_larger_values_are_not_scaled_alone(tmp_path: Path) -> None:
    values = [np.array([[0.0, 0.5]], dtype=np.float32), np.array([[0.0, 200.0]], dtype=np.float32)]
    source = open_source(write_gray(tmp_path / "x", values, ".tif"))
    with pytest.raises(UnreadableImageError, match=r"from 0 to 200 have no usual range.*--value-range 0:255"):
        source[0]


def test_a_signed_image_does_not_change_the_range_of_the_others(tmp_path: Path) -> None:
    folder = write_gray(tmp_path / "x", ramp_of_12_bits())
    Image.fromarray(np.array([[-39, 100]], dtype=np.int32)).save(folder / "signed.tif")
    source = open_source(folder, policy="skip")
    assert [content is None for content in source.content_hashes()] == [False] * 4 + [True]
    assert source.value_range == (0, 4095)


def test_nan_pixels_are_unreadable(tmp_path: Path) -> None:
    folder = write_gray(tmp_path / "x", [np.array([[np.nan, 0.5]], dtype=np.float32)], ".tif")
    with pytest.raises(UnreadableImageError, match="NaN"):
        open_source(folder)[0]


@pytest.mark.parametrize("text", ["", "5", "1:0", "0:0", "a:b", "0:nan", "0:inf", "0:1:2"])
def test_wrong_value_ranges_are_refused(text: str) -> None:
    with pytest.raises(FaroutError, match="value range"):
        ReadSettings(value_range=text)


def test_detectors_score_images_in_the_range_that_they_were_fitted_with(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    deep = [np.clip(generator.normal(2000, 600, (16, 16)), 0, 4000).astype(np.uint16) for _ in range(80)]
    detector = farout.PCA(size=32).fit(write_gray(tmp_path / "good", deep[:60]), statistics=30)
    assert detector.preprocessing.value_range == (0, 4095)
    detector.save(tmp_path / "detector")
    loaded = farout.load(tmp_path / "detector")
    eight = [np.rint(array / 4095 * 255).astype(np.uint8) for array in deep[60:]]
    as_16 = loaded.score(write_gray(tmp_path / "new16", deep[60:]))
    as_8 = loaded.score(write_gray(tmp_path / "new8", eight))
    assert np.allclose(as_16.score, as_8.score)


def test_a_detector_of_8_bit_images_warns_of_12_bit_values(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    eight = [generator.integers(0, 256, (16, 16), dtype=np.uint8) for _ in range(60)]
    detector = farout.PCA(size=32).fit(write_gray(tmp_path / "good", eight), statistics=30)
    deep = write_gray(tmp_path / "new", ramp_of_12_bits())
    with pytest.warns(MisleadingResultWarning, match=r"values from 0 to 4056, a small part of .* 0:65535"):
        detector.score(deep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.score(deep, reading=ReadSettings(value_range="0:4095"))


def test_values_beyond_the_estimated_range_are_clipped_with_a_warning(tmp_path: Path) -> None:
    images = ramp_of_12_bits(512)
    images[1] = np.full((10, 17), 9000, dtype=np.uint16)  # the estimate reads every second image
    source = open_source(write_gray(tmp_path / "x", images))
    assert source[1].unique().tolist() == [255]
    assert source.value_range == (0, 4095)
    with pytest.warns(MisleadingResultWarning, match=r"1 images have values outside the value range 0:4095"):
        source.warn_about_reading()


def test_the_value_range_is_part_of_a_preprocessing() -> None:
    preprocessing = Preprocessing((8, 8), 1, (8, 8), value_range=(0.0, 4095.0))
    stored = json.loads(json.dumps(preprocessing.to_dict()))
    assert create_dataclass(Preprocessing, stored, "config.json") == preprocessing
    with pytest.raises(FaroutError, match="value range"):
        Preprocessing((8, 8), 1, (8, 8), value_range=(5.0, 1.0))


def test_tiff_tags_state_the_range() -> None:
    image = Image.fromarray(np.array([[0, 1000]], dtype=np.uint16))
    data = encode(image, "TIFF", tiffinfo={281: 1023})
    assert decode(data, "k").value_range == (0, 1023)
    assert decode(encode(image, "TIFF"), "k").value_range is None


def test_16_bit_color_png_keeps_16_bits() -> None:
    values = torch.arange(48, dtype=torch.int32).reshape(3, 4, 4).mul(80).to(torch.uint16)
    decoded = decode(_png_16(values.numpy()), "k")
    assert decoded.values.dtype == torch.uint16
    assert torch.equal(decoded.values.int(), values.int())


def _png_16(values: np.ndarray) -> bytes:
    """Encode (3, H, W) uint16 as a PNG file of 16 bits a channel, which Pillow cannot write."""
    import zlib

    _, height, width = values.shape
    rows = values.transpose(1, 2, 0).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_16_bit_color_tiff_keeps_16_bits() -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.arange(0, 48000, 1000, dtype=np.uint16).reshape(4, 4, 3)
    data = io.BytesIO()
    tifffile.imwrite(data, values, photometric="rgb")
    decoded = decode(data.getvalue(), "k")
    assert np.array_equal(decoded.values.numpy(), values.transpose(2, 0, 1))


def encode_tiff(values: np.ndarray, **options: object) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    data = io.BytesIO()
    tifffile.imwrite(data, values, **options)
    return data.getvalue()


def test_big_endian_tiff_equals_little_endian() -> None:
    values = np.array([[0, 1000], [2000, 65535]], dtype=np.uint16)
    decoded = decode(encode_tiff(values.astype(">u2"), byteorder=">"), "k")
    assert decoded.values.dtype == torch.uint16
    assert np.array_equal(decoded.values[0].numpy(), values)


@pytest.mark.parametrize("kind", ["int8", "int64", "float16", "float64"])
def test_tiff_of_types_that_pillow_does_not_have(kind: str) -> None:
    values = np.array([[0, 1], [2, -3]]).astype(kind)
    assert decode(encode_tiff(values), "k").values[0].tolist() == [[0, 1], [2, -3]]


def test_float_color_tiff() -> None:
    values = np.linspace(0, 1, 48, dtype=np.float32).reshape(4, 4, 3)
    decoded = decode(encode_tiff(values, photometric="rgb"), "k")
    assert np.array_equal(decoded.values.numpy(), values.transpose(2, 0, 1))


def test_16_bit_cmyk_tiff_is_not_taken_for_rgb_with_alpha() -> None:
    with pytest.raises(UnreadableImageError, match="in SEPARATED; expected RGB"):
        decode(encode_tiff(np.ones((4, 4, 4), np.uint16), photometric="separated"), "k")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_color_is_turned_like_8_bit_color(orientation: int) -> None:
    values = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    exif = Image.Exif()
    exif[274] = orientation
    png = io.BytesIO()
    Image.fromarray(values).save(png, "PNG", exif=exif)
    expected = decode(png.getvalue(), "k").values
    tags = [(274, "H", 1, orientation, True)]
    tiff = encode_tiff(values.astype(np.uint16), photometric="rgb", extratags=tags)
    assert torch.equal(decode(tiff, "k").values.to(torch.uint8), expected)


def test_dicom_with_a_palette_has_its_colors() -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(io.BytesIO(dicom(pydicom, np.array([[0, 1], [2, 1]], dtype=np.uint16))))
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    for name, shades in (("Red", [0, 255, 9]), ("Green", [0, 0, 8]), ("Blue", [50, 0, 7])):
        dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [3, 0, 16])
        setattr(dataset, f"{name}PaletteColorLookupTableData", np.array(shades, np.uint16).tobytes())
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    decoded = decode(file.getvalue(), "k.dcm").values
    assert decoded[:, 0, 0].tolist() == [0, 0, 50]
    assert decoded[:, 0, 1].tolist() == [255, 0, 0]
    assert decoded[:, 1, 0].tolist() == [9, 8, 7]


def test_dicom_is_rescaled_and_its_window_is_the_range(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    data = dicom(pydicom, np.array([[0, 1024], [2048, 4095]], dtype=np.uint16))
    decoded = decode(data, "scan.dcm")
    assert decoded.values.flatten().tolist() == [-1024, 0, 1024, 3071]
    assert decoded.value_range == (-160.0, 239.0)  # center 40, width 400
    assert scale_to_uint8(decoded.values, decoded.value_range).flatten().tolist() == [0, 102, 255, 255]
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.dcm").write_bytes(data)
    declared = open_source(tmp_path / "scans", reading=ReadSettings(value_range="-1024:3071"))
    assert declared[0].flatten().tolist() == [0, 64, 128, 255]


def dicom(pydicom: object, pixels: np.ndarray) -> bytes:
    """A CT image with rescale and window."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    dataset.WindowCenter, dataset.WindowWidth = "40", "400"
    dataset.PixelData = pixels.tobytes()
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_exr_requires_a_range(tmp_path: Path) -> None:
    OpenEXR = pytest.importorskip("OpenEXR")
    values = np.array([[0.0, 2.0], [4.0, 8.0]], dtype=np.float32)
    folder = tmp_path / "x"
    folder.mkdir()
    with OpenEXR.File({}, {"RGB": np.stack([values] * 3, axis=-1)}) as file:
        file.write(str(folder / "a.exr"))
    assert open_source(folder, reading=ReadSettings(value_range="0:8"))[0][0].flatten().tolist() == [0, 64, 128, 255]
    with pytest.raises(UnreadableImageError, match=r"--value-range 0:255"):
        open_source(folder)[0]


def test_heic_is_read_with_its_extra(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    folder = tmp_path / "x"
    folder.mkdir()
    Image.new("RGB", (32, 32), (200, 40, 40)).save(folder / "a.heic", quality=100)
    assert open_source(folder)[0].float().mean(dim=(1, 2)).sub(torch.tensor([200, 40, 40])).abs().max() < 6


@pytest.mark.parametrize("suffix", [".avif", ".jpe", ".tga", ".ico", ".mpo", ".apng", ".jp2", ".dds", ".qoi", ".webp"])
def test_formats_of_the_installed_pillow_are_read(tmp_path: Path, suffix: str) -> None:
    form = next(name for name, suffixes in FORMATS.items() if suffix in suffixes)
    Image.init()
    if suffix not in image_suffixes() or form not in Image.SAVE:
        pytest.skip("this Pillow lacks the format, or cannot write it")
    folder = tmp_path / "x"
    folder.mkdir()
    Image.new("RGB", (32, 32), (200, 40, 40)).save(folder / f"a{suffix}", format=form)
    source = open_source(folder)
    assert source.keys == (f"a{suffix}",)
    assert source[0].shape == (3, 32, 32)


def write_stack(path: Path, count: int) -> None:
    frames = [Image.new("L", (8, 8), 10 * index) for index in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def test_frames_are_left_out_with_a_count_or_read(tmp_path: Path) -> None:
    write_stack(tmp_path / "scan.tif", 20)
    first = open_source(tmp_path)
    assert [int(image.max()) for image in first] == [0]
    with pytest.warns(LeftOutWarning, match=r"19 frames after the first of 1 file\(s\) are left out"):
        first.warn_about_reading()
    every = open_source(tmp_path, reading=ReadSettings(frames="all"))
    assert every.keys == tuple(f"scan.tif#{index}" for index in sorted(range(20)))
    assert [int(image.max()) for image in every] == [10 * index for index in range(20)]
    assert every.further_frames == {}


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animations_have_frames(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    source: ImageSource = open_source(tmp_path, reading=ReadSettings(frames="all"))
    assert len(source) == 3
    assert [int(image.float().mean(dim=(1, 2)).argmax()) for image in source] == [0, 2, 1]


def test_postscript_is_not_decoded() -> None:
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(UnreadableImageError, match="not an image in a format that farout reads"):
        decode(data, "innocent.png")


def test_special_files_are_unreadable_at_once(tmp_path: Path) -> None:
    import os

    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    source = open_source(tmp_path, policy="nan")
    assert source.content_hashes()[1:] == (None, None)
    assert "named pipe" in source.unreadable["pipe.png"]
    assert "device" in source.unreadable["zero.png"]


def test_large_files_are_unreadable(tmp_path: Path) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "a.bmp")
    with pytest.raises(UnreadableImageError, match=r"more than 1,000 bytes \(--max-bytes\)"):
        open_source(tmp_path, reading=ReadSettings(max_bytes=1000))[0]
