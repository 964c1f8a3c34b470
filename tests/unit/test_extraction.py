"""Features extracted beforehand are those that detectors read; the command line fills, lists and clears the cache."""

import json
from pathlib import Path

import pytest
import torch

from farout.cli import main
from farout.core.chunking import BatchSize
from farout.core.errors import FaroutError, StoreError
from farout.data.batching import iterate_batches
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing
from farout.data.sources import open_source
from farout.detectors.mahalanobis import Mahalanobis
from farout.features.cache_folder import list_cached_features
from farout.features.extraction import CachedFeatures, extract_features
from farout.features.extractor import FeatureExtractor
from image_files import pixels
from small import pictures
from tolerances import assert_close

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor.create("test_resnet", weights="random", size=32)


def test_the_cache_returns_what_was_computed(extractor: FeatureExtractor, tmp_path: Path) -> None:
    """Whatever was there before, and in whatever batches and order it is read."""
    source = open_source(pixels(30, channels=3))
    ready = Preprocessing.for_source(source, size=32, channels=3)
    plain = torch.cat([extractor.pooled_features(batch.images) for batch in iterate_batches(source, ready, 30)])

    def again(part: ImageSource, size: int) -> torch.Tensor:
        made = CachedFeatures(extractor, ready, "auto", "fp32", tmp_path).batches(part, size, 2)
        return torch.cat([batch.features for batch in made if batch.features is not None])

    again(source.subset(range(0, 30, 3)), 5)
    first = again(source, 7)
    assert_close(first, plain)
    assert torch.equal(again(source.subset(list(reversed(range(30)))), 30), first.flip(0))


def test_settings_that_decide_features_part_them(extractor: FeatureExtractor, tmp_path: Path) -> None:
    def folder(batch_size: BatchSize = "auto", precision: str = "fp32", **preprocessing: object) -> Path:
        ready = Preprocessing(**{"size": (32, 32), "channels": 3, "native": (8, 8), **preprocessing})
        return CachedFeatures(extractor, ready, batch_size, precision, tmp_path).cache.folder

    apart = [
        folder(),
        folder(precision="bf16"),
        folder(native=(9, 9)),
        folder(protocol="direct"),
        folder(protocol="common"),
        folder(protocol="common", jpeg_quality=80),
    ]
    assert len(set(apart)) == len(apart)
    assert folder(batch_size=4) == folder(), "it changes nothing but rounding"
    assert folder(protocol="direct", native=(9, 9)) == folder(protocol="direct"), "which does not look at it"
    assert folder(jpeg_quality=80) == folder()


def test_a_fit_reads_what_the_command_line_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The point of the command: the long work is done before, once."""
    folder, far = pictures(tmp_path / "good", 60), pictures(tmp_path / "far", 9, low=0, spread=255, seed=5)
    monkeypatch.setenv("FAROUT_CACHE", str(tmp_path / "cache"))
    settings = ["--backbone", "test_resnet", "--weights", "random", "--layers", "1", "2", "--size", "32"]
    assert main(["features", "extract", str(folder), *settings]) == 0
    printed = capsys.readouterr().out
    assert "60 computed, 0 already stored" in printed
    assert "images/s" in printed
    assert str(tmp_path / "cache") in printed
    assert main(["features", "extract", str(folder), *settings, "--limit", "20"]) == 0
    assert "0 computed, 20 already stored" in capsys.readouterr().out
    assert main(["features", "extract", str(far), *settings, "--native", "8", "8"]) == 0

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the backbone ran")

    monkeypatch.setattr(FeatureExtractor, "pooled_features", refuse)
    detector = Mahalanobis(backbone="test_resnet", weights="random", layers=(1, 2), size=32)
    detector.fit(folder, alpha=0.1, statistics=30)
    assert len(detector.score(far)) == 9
    detector.runtime = type(detector.runtime)(**{**vars(detector.runtime), "cache": False})
    with pytest.raises(AssertionError, match="the backbone ran"):
        detector.score(far)


def test_the_command_line_lists_and_clears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAROUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["features", "list"]) == 0
    assert "no features are stored" in capsys.readouterr().out
    folder = pictures(tmp_path / "good", 6)
    (folder / "bad.png").write_text("no picture")
    words = ["features", "extract", str(folder), "--backbone", "test_resnet", "--weights", "random"]
    assert main([*words, "--layers", "1", "2", "--size", "32", "--protocol", "direct"]) == 0
    printed = capsys.readouterr().out
    assert "6 computed" in printed
    assert "1 unreadable" in printed
    assert "bad.png" in printed
    assert main([*words, "--policy", "raise"]) == 1
    assert "bad.png" in capsys.readouterr().err
    assert main(["features", "list"]) == 0
    printed = capsys.readouterr().out
    (kind,) = [kind for kind in list_cached_features() if kind.images]
    name = kind.folder.name
    for text in (name, "test_resnet 1 2", "random", "32", "direct", "fp32 cpu", " 6 ", "limit 20.0 GiB", "last use"):
        assert text in printed, text
    assert f"{kind.last_used:%Y-%m-%d %H:%M}" in " ".join(printed.split())
    old = kind.folder.with_name("0123456789abcdef")
    old.mkdir()
    (old / "rows.npy").write_bytes(b"rows of an older version")
    assert main(["features", "list"]) == 0
    printed = capsys.readouterr().out
    assert "not read any more: 0123456789abcdef" in printed
    assert main(["features", "clear", "--unused-days", "1"]) == 0
    assert "0 images" in capsys.readouterr().out
    assert main(["features", "clear", old.name]) == 0
    assert not old.exists()
    capsys.readouterr()
    settings = json.loads((kind.folder / "settings.json").read_text())
    assert settings["about"]["weights"] == "random (seed 0)"
    assert main(["features", "clear", "nonsense"]) == 1
    assert main(["features", "clear", name]) == 0
    assert "(6 images" in capsys.readouterr().out
    assert list_cached_features() == [kind for kind in list_cached_features() if kind.folder.name != name]


def test_an_extraction_that_could_not_be_kept_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unlike a score, it would be in vain."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FAROUT_CACHE", str(tmp_path / "file"))
    folder = pictures(tmp_path / "good", 3)
    words = ["features", "extract", str(folder), "--backbone", "test_resnet", "--weights", "random", "--size", "32"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "FAROUT_CACHE" in error
    assert error.count("\n") == 1


def test_an_extraction_larger_than_the_limit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last images would push out its first ones."""
    monkeypatch.setenv("FAROUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAROUT_CACHE_LIMIT", "1kB")
    folder = pictures(tmp_path / "good", 3)
    with pytest.raises(StoreError, match=r"features of 3 images take .* limit of the cache is 1000 bytes"):
        extract_features(folder, backbone="test_resnet", weights="random", size=32)


def test_wrong_settings_of_an_extraction_are_named() -> None:
    with pytest.raises(FaroutError, match="batch_size"):
        extract_features(torch.rand(2, 3, 8, 8), batch_size=0)
    with pytest.raises(FaroutError, match="native"):
        extract_features(torch.rand(2, 3, 8, 8), native=(8,))  # type: ignore[arg-type]
