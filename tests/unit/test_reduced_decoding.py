"""Large images are decoded in a reduced size: what is equal, what is nearly equal, and what stays as it was."""

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import farout
from farout.core.errors import FaroutError, UnreadableImageError
from farout.data import decoding
from farout.data.decoding import content_hash, decode, from_pil
from farout.data.preprocessing import Preprocessing
from farout.data.sources import open_source
from farout.detectors.fitting import recalibrate
from farout.detectors.mahalanobis import Mahalanobis
from farout.scoring.folder import read_scores, score_folder
from farout.scoring.scorer import Scorer
from small import CPU

HEIGHT, WIDTH = 540, 720
REDUCED = Preprocessing(size=(64, 64), channels=3, native=(HEIGHT, WIDTH), reduced_decoding=True)
FULL = Preprocessing(size=(64, 64), channels=3, native=(HEIGHT, WIDTH))


@cache
def photograph(seed: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Shapes of all sizes, as in a photograph: noise at several scales."""
    draws = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for side in (3, 12, 48, 192):
        noise = Image.fromarray(draws.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) / side**0.5
    return Image.fromarray((255 * (total - total.min()) / (total.max() - total.min())).astype(np.uint8))


def encode(image: Image.Image, form: str = "JPEG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(12):
        (folder / f"{number:02d}.jpg").write_bytes(encode(photograph(number), quality=90))
    return folder


def prepared(data: object, preprocessing: Preprocessing) -> torch.Tensor:
    return preprocessing(open_source([data]).read_pixels(0, preprocessing.least_size))


def difference(data: object) -> float:
    """Mean absolute difference by reduced decoding, in gray levels of 255."""
    return float((prepared(data, REDUCED) - prepared(data, FULL)).abs().mean()) * 255


FORMS = {
    "JPEG": lambda image: encode(image, quality=90),
    "progressive": lambda image: encode(image, quality=90, progressive=True),
    "4:4:4": lambda image: encode(image, quality=95, subsampling="4:4:4"),
    "gray": lambda image: encode(image.convert("L"), quality=90),
    "CMYK": lambda image: encode(image.convert("CMYK"), quality=90),
    "PNG": lambda image: encode(image, "PNG", compress_level=1),
    "palette": lambda image: encode(image.convert("P"), "PNG", compress_level=1),
    "alpha": lambda image: encode(image.convert("RGBA"), "PNG", compress_level=1),
    "WebP": lambda image: encode(image, "WEBP", quality=90, method=0),
    "array": np.asarray,
    "16 bits": lambda image: encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_prepared_image_is_that_of_full_decoding_up_to_a_gray_level(form: str) -> None:
    assert difference(FORMS[form](photograph(0))) < 1.0


def test_a_jpeg_file_is_decoded_in_the_reduced_size() -> None:
    decoded = decode(encode(photograph(0)), "x", least_size=(100, 100))
    assert decoded.values.shape == (3, HEIGHT // 4, WIDTH // 4)
    assert decoded.full_size == (HEIGHT, WIDTH)
    odd = decode(encode(photograph(0, 541, 723)), "x", least_size=(100, 100))
    assert odd.values.shape == (3, 136, 181)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = encode(photograph(1), quality=90, exif=exif)
    full, reduced = decode(data, "x"), decode(data, "x", least_size=(200, 200))
    upright = Image.fromarray(full.values.permute(1, 2, 0).numpy())
    assert reduced.full_size == (upright.height, upright.width)
    assert reduced.values.shape[1:] == full.values[:, ::2, ::2].shape[1:]
    expected = from_pil(upright.reduce(2)).float()
    assert (reduced.values.float() - expected).abs().mean() < 2


@pytest.mark.parametrize("cut", [300, 2_000, 20_000])
def test_a_truncated_file_is_unreadable_for_the_same_reason(cut: int) -> None:
    data = encode(photograph(0))[:cut]
    reasons = []
    for least_size in (None, (50, 50)):
        with pytest.raises(UnreadableImageError) as error:
            decode(data, "x", least_size=least_size)
        reasons.append(str(error.value))
    assert reasons[0] == reasons[1]


def test_damaged_files_are_read_or_unreadable_alike() -> None:
    data, draws = encode(photograph(0)), np.random.default_rng(0)
    for _ in range(6):
        damaged = bytearray(data)
        for position in draws.integers(20, len(data), 30):
            damaged[position] = draws.integers(256)
        readable = []
        for least_size in (None, (50, 50)):
            try:
                decode(bytes(damaged), "x", least_size=least_size)
            except UnreadableImageError:
                readable.append(False)
            else:
                readable.append(True)
        assert readable[0] == readable[1]


def test_images_that_are_not_large_are_read_in_native_size() -> None:
    image = photograph(0, 512, 512)
    assert np.array_equal(prepared(encode(image), REDUCED), prepared(encode(image), REDUCED))
    read = open_source([encode(image)]).read(0, (16, 16))
    assert read.pixels.shape == (3, 512, 512)
    assert read.identity == content_hash(read.pixels)


def test_the_native_size_stays_where_a_step_requires_it() -> None:
    image = encode(photograph(0))
    sides = {"size": (64, 64), "channels": 3, "native": (HEIGHT, WIDTH), "reduced_decoding": True}
    for settings in ({"protocol": "common"}, {"crop": 500}, {"kernel": "nearest"}):
        full = Preprocessing(**{**sides, **settings, "reduced_decoding": False})
        assert torch.equal(prepared(image, Preprocessing(**sides, **settings)), prepared(image, full))
    # images that are larger than the native size are reduced before the JPEG encoding, to twice that size at least
    assert Preprocessing(**{**sides, "native": (96, 96), "protocol": "common"}).least_size == (192, 192)
    assert Preprocessing(**{**sides, "native": (96, 96)}).least_size == (192, 192)
    assert Preprocessing(**{**sides, "protocol": "direct"}).least_size == (128, 128)
    assert REDUCED.least_size == REDUCED.first_size == (128, 171)


def test_a_large_file_is_identified_by_its_bytes_and_an_array_by_its_pixels(tmp_path: Path) -> None:
    data = encode(photograph(0))
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "b.jpg").write_bytes(data)
    (tmp_path / "c.jpg").write_bytes(encode(photograph(0), quality=80))
    native = open_source(tmp_path)
    source = native.with_reduced_decoding(True)
    first, second, third = source.content_hashes()
    assert first == second != third
    assert source.read(0, (50, 50)).identity == source.identity(0) == first
    assert open_source([data]).read(0, (90, 90)).identity == first
    pixels = native[0]
    assert native.content_hash(0) == content_hash(pixels) != first, "without reduced decoding"
    assert open_source([pixels]).with_reduced_decoding(True).content_hash(0) == content_hash(pixels)
    assert native.shapes() == source.shapes()


def test_what_was_read_before_does_not_change_the_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(photograph(0)))
    fresh, used = open_source(tmp_path), open_source(tmp_path)
    used[0], used.with_reduced_decoding(True).thumbnail(0)
    assert torch.equal(fresh.read_pixels(0, (80, 80)), used.read_pixels(0, (80, 80)))
    assert torch.equal(used[0], decode(encode(photograph(0)), "x").values)


FIT = {"alpha": 0.3, "runtime": CPU, "statistics": 6}


@pytest.mark.filterwarnings("ignore::farout.core.errors.TooFewImagesWarning")
def test_a_fit_and_all_ways_to_score_decode_alike(photographs: Path, tmp_path: Path) -> None:
    detector = Mahalanobis(weights="random", size=32).fit(photographs, **FIT)
    assert detector.preprocessing.reduced_decoding
    detector.save(tmp_path / "detector")
    loaded = farout.load(tmp_path / "detector", device="cpu", precision="fp32")
    assert loaded.preprocessing == detector.preprocessing
    expected = loaded.score(photographs).score
    keys = [path.name for path in sorted(photographs.iterdir())]
    rows = Scorer(loaded)({"key": keys, "image": [(photographs / key).read_bytes() for key in keys]})
    assert np.allclose(rows["score"], expected, rtol=1e-5)
    score_folder(loaded, photographs, tmp_path / "scores")
    assert np.allclose(read_scores(tmp_path / "scores").score, expected, rtol=1e-5)
    score_folder(loaded, photographs, tmp_path / "scores")  # finished: compares the content of the images
    table = {"image": [np.asarray(photograph(0)), encode(photograph(0), "PNG", compress_level=1)]}
    assert np.allclose(*Scorer(loaded)(table)["score"], rtol=1e-5), "the same pixels"
    with pytest.raises(FaroutError, match="calibrate on others"):
        recalibrate(loaded, open_source(photographs).subset([keys.index(key) for key in loaded.statistics.keys]))


@pytest.mark.filterwarnings("ignore::farout.core.errors.TooFewImagesWarning")
def test_a_detector_that_was_saved_before_keeps_full_decoding(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Mahalanobis(weights="random", size=32).fit(photographs, reduced_decoding=False, **FIT)
    detector.save(tmp_path / "detector")
    config = json.loads((tmp_path / "detector" / "config.json").read_text())
    assert "reduced_decoding" not in config["preprocessing"], "as of older versions"
    monkeypatch.setattr(decoding, "_decode_reduced", None)  # called by nothing
    old = farout.load(tmp_path / "detector", device="cpu", precision="fp32")
    first = open_source(photographs)[0]
    expected = old.score(photographs).score[0]
    assert np.isclose(old.score([first]).score[0], expected, rtol=1e-6), "the decoded pixels give the score of the file"
    old_hashes = {content_hash(image) for image in open_source(photographs)}
    assert old.calibration_hashes | old.statistics_hashes <= old_hashes
