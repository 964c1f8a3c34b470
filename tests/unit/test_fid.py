"""Distances of sets: the arithmetic of others, zero where nothing differs, and the names that numbers may bear."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from farout.cli import main
from farout.core.errors import FaroutError, MisleadingResultWarning, MissingExtraError, StoreError
from farout.evaluation import fid
from farout.evaluation.fid import frechet_distance, kernel_distance, set_distance
from small import pictures


def drawn(count: int, dimension: int = 12, *, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dimension, dimension))
    return generator.normal(size=(count, dimension)) @ mixing + shift


# -- arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(200, 300), (8, 9)], ids=["full", "singular"])
def test_frechet_is_torchmetrics(counts: tuple[int, int]) -> None:
    compute = pytest.importorskip("torchmetrics.image.fid")._compute_fid
    first, second = drawn(counts[0]), drawn(counts[1], seed=1, shift=0.5) * 1.3
    pairs = [(torch.from_numpy(part.mean(0)), torch.from_numpy(np.cov(part, rowvar=False))) for part in (first, second)]
    theirs = float(compute(*pairs[0], *pairs[1]))
    # their root of a singular product carries the rounding of its zero eigenvalues
    assert frechet_distance(first, second) == pytest.approx(theirs, rel=1e-9 if counts[0] > 12 else 1e-4)


def test_frechet_is_scipys_root() -> None:
    first, second = drawn(200), drawn(300, seed=1, shift=0.5)
    one, other = (np.cov(part, rowvar=False) for part in (first, second))
    root = scipy.linalg.sqrtm(one @ other).real
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(one + other - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_known_gaussians() -> None:
    """Shifted by d: d squared; scaled by s: (1 - s)^2 of the variances' sum."""
    features = drawn(500)
    assert frechet_distance(features, features + 2) == pytest.approx(12 * 4, rel=1e-9)
    centred = features - features.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(
        4 * np.trace(np.cov(centred, rowvar=False)), rel=1e-9
    )


def test_a_set_against_itself_is_zero() -> None:
    for count in (5, 400):
        features = drawn(count)
        assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
        assert frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-6)


def test_halves_are_near_and_others_far() -> None:
    features = drawn(4000)
    near = frechet_distance(features[:2000], features[2000:])
    assert near < 0.02 * np.trace(np.cov(features, rowvar=False))
    assert frechet_distance(features[:2000], drawn(2000, seed=5, shift=2.0)) > 20 * near
    mean, std = kernel_distance(features[:2000], features[2000:], subsets=20, subset_size=200)
    assert abs(mean) < 3 * std
    far, _ = kernel_distance(features[:2000], drawn(2000, seed=5, shift=1.0), subsets=20, subset_size=200)
    assert far > mean + 3 * std


def test_kernel_distance_is_torchmetrics() -> None:
    compute = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    first, second = drawn(60), drawn(60, seed=1, shift=0.2)
    theirs = float(compute(torch.from_numpy(first), torch.from_numpy(second)))
    mean, std = kernel_distance(first, second, subsets=3, subset_size=60)
    assert mean == pytest.approx(theirs, rel=1e-9)
    assert std == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_kernel_distance_is_unbiased() -> None:
    """Small subsets give the same mean as large ones; a biased estimate would grow."""
    first, second = drawn(3000), drawn(3000, seed=1, shift=0.5)
    large, _ = kernel_distance(first, second, subsets=20, subset_size=1000)
    small, _ = kernel_distance(first, second, subsets=1500, subset_size=20)
    assert small == pytest.approx(large, rel=0.2)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(FaroutError, match="two images"):
        frechet_distance(drawn(1), drawn(5))
    with pytest.raises(FaroutError, match="shapes"):
        frechet_distance(drawn(5), drawn(5, 3))
    with pytest.raises(FaroutError, match="subsets of 6 cannot be drawn"):
        kernel_distance(drawn(5), drawn(5), subset_size=6)


# -- sources --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    pictures(root / "one", 24)
    pictures(root / "two", 24, seed=1)
    pictures(root / "far", 24, low=0, spread=255, seed=2)
    return root


def test_sets_of_images(root: Path, tmp_path: Path) -> None:
    """The built-in backbone, whose distance is not called FID; few images are warned of."""
    with pytest.warns(MisleadingResultWarning, match="FD-lite0 of 24 and 24 images in 512 dimensions is biased"):
        near = set_distance(root / "one", root / "two", out=tmp_path / "d.json")
    assert (near.frechet_name, near.kernel_name) == ("FD-lite0", "KD-lite0")
    written = json.loads((tmp_path / "d.json").read_text())
    assert written["frechet"] == near.frechet
    assert written["generated"] == 24
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert set_distance(root / "one", root / "one").frechet == pytest.approx(0, abs=1e-6)
        far = set_distance(root / "one", root / "far")
        assert far.frechet > 2 * near.frechet
        assert far.kernel > near.kernel
        assert set_distance(root / "one", root / "two", limit=10).generated == 10


class _MeanColor(nn.Module):
    """Stands for Inception: bytes in, features out."""

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1] == 3
        return torch.cat([pixels.float().mean((2, 3)), pixels.float().std((2, 3))], 1)[:, 2:4]


def test_inception_is_called_fid(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "_load_inception", _MeanColor)
    found = set_distance(root / "one", root / "two", features="inception")
    assert (found.frechet_name, found.kernel_name, found.dimension) == ("FID", "KID", 2)
    set_distance(root / "one", root / "two", features="inception", precision="auto", out=root / "d.json")
    assert json.loads((root / "d.json").read_text())["precision"] == "fp32"
    with pytest.raises(FaroutError, match=r"in fp32.* features=lite0 for bf16"):
        set_distance(root / "one", root / "two", features="inception", precision="bf16")


def test_what_fid_wants_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingExtraError, match=r"farout\[fid\].*lite0"):
        set_distance(root / "one", root / "two", features="inception")
    offline = type("Offline", (), {"__init__": lambda self, **settings: (_ for _ in ()).throw(OSError("no route"))})
    monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", offline)
    with pytest.raises(StoreError, match=r"no route.*features=lite0"):
        set_distance(root / "one", root / "two", features="inception")
    with pytest.raises(FaroutError, match="lite0 or inception"):
        set_distance(root / "one", root / "two", features="clip")  # type: ignore[arg-type]


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fid", str(root / "one"), str(root / "far"), "--device", "cpu", "--out", str(tmp_path / "d.json")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "FD-lite0" in printed
    assert "FID" not in printed
    assert (tmp_path / "d.json").is_file()
