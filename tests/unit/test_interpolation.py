"""InterpolatedImages: their ends, their sphere, and inversions that get better with the order of the method."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farout.cli import main
from farout.core.errors import FaroutError, SourceError, StoreError
from farout.data.sources import open_source
from farout.diffusion.denoiser import GaussianDenoiser
from farout.diffusion.interpolation import Interpolator, slerp
from farout.diffusion.model import DiffusionModel
from farout.diffusion.schedule import NoiseSchedule
from farout.report.interpolation import write_interpolations
from small import conditional, model, pictures, without_null
from tolerances import assert_close, assert_same_images

pytestmark = pytest.mark.numerics


def gaussian_model() -> DiffusionModel:
    """Gaussian images of 8 x 8 pixels around gray, whose exact denoiser is known."""
    root = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 16
    network = model(data_range=(-1.0, 1.0))
    network.schedule = NoiseSchedule("linear", 1e-4, 0.02)
    exact = GaussianDenoiser(torch.zeros(64), root @ root.T + 0.02 * torch.eye(64))
    network.denoiser = lambda batch_size="auto", precision="fp32": exact  # type: ignore[method-assign]
    return network


def images(count: int, seed: int = 0) -> Tensor:
    return 0.5 + 0.1 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)


# -- slerp ----------------------------------------------------------------------------------------------------------


def test_slerp_has_an_angle_for_every_row() -> None:
    first = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    second = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(slerp(first, second, torch.zeros(3)), first)
    torch.testing.assert_close(slerp(first, second, torch.ones(3)), second)
    shares = torch.tensor([0.2, 0.5, 0.8])
    together = slerp(first, second, shares)
    alone = torch.cat([slerp(first[i : i + 1], second[i : i + 1], shares[i : i + 1]) for i in range(3)])
    assert_close(together, alone)


def test_slerp_stays_on_the_sphere() -> None:
    first, second = (torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    first, second = first / first.norm(dim=1, keepdim=True), second / second.norm(dim=1, keepdim=True)
    for share in (0.1, 0.5, 0.9):
        between = slerp(first, second, torch.full((5,), share))
        torch.testing.assert_close(between.norm(dim=1), torch.ones(5))
        angle, whole = ((first * each).sum(1).clamp(-1, 1).acos() for each in (between, second))
        torch.testing.assert_close(angle, share * whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(slerp(first, 2 * first, torch.full((5,), 0.5)), 1.5 * first)
    assert bool(torch.isfinite(slerp(first, -first, torch.full((5,), 0.5))).all())


# -- inversion ------------------------------------------------------------------------------------------------------


def round_trip(solver: str, steps: int) -> float:
    interpolator = Interpolator(gaussian_model(), solver, steps, images_between=3)
    x0 = interpolator.model.encode(images(4))
    return float((interpolator.decode(interpolator.invert(x0)) - x0).square().mean().sqrt())


@pytest.mark.slow
def test_inversion_gets_better_with_the_order() -> None:
    """The card's claim: higher-order rules invert better; and more steps do, faster so for the higher order."""
    first, second, fourth = (round_trip(solver, 20) for solver in ("ddim", "pndm2", "pndm4"))
    assert first > 2 * second > 4 * fourth
    assert round_trip("ndm1", 20) > 2 * round_trip("ndm4", 20)
    assert round_trip("ddim", 40) < first / 1.5
    assert round_trip("pndm2", 40) < second / 2.5


def test_inverted_noise_is_normal() -> None:
    """Data of the model's own distribution become standard normal noise."""
    network = gaussian_model()
    exact = network.denoiser()
    drawn = torch.randn(400, 64, generator=torch.Generator().manual_seed(3)).double() * exact.eigenvalues.sqrt()
    x0 = (drawn @ exact.basis.T).float().reshape(400, 1, 8, 8)
    noise = Interpolator(network, "pndm4", 50).invert(x0)
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)


# -- interpolations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["pndm4", "ddim", "dpm_solver_2m", "ndm4", "probability_flow"])
def test_the_ends(solver: str) -> None:
    """t = 0 is the image itself, the largest level the other image's decoded inversion."""
    interpolator = Interpolator(gaussian_model(), solver, steps=20, images_between=4)
    first, second = images(2), images(2, seed=1)
    found = interpolator(first, second)
    assert found.first.shape == (2, 6, 1, 8, 8)
    assert interpolator.levels == (0, 199, 399, 599, 799, 999)
    torch.testing.assert_close(found.first[:, 0], first)
    torch.testing.assert_close(found.second[:, 0], second)
    decoded = interpolator.model.decode(interpolator.decode(interpolator.invert(interpolator.model.encode(second))))
    torch.testing.assert_close(found.first[:, -1], decoded, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.symmetric[:, -1], decoded, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.symmetric[:, 0], found.second[:, -1], atol=1e-5, rtol=0)


def test_the_way_leads_from_one_to_the_other() -> None:
    interpolator = Interpolator(gaussian_model(), steps=50, images_between=9)
    first, second = images(3), images(3, seed=1)
    found = interpolator(first, second)
    for way in (found.first, found.symmetric):
        away = (way - first[:, None]).flatten(2).norm(dim=2).mean(0)
        assert bool((away.diff() > -1e-4).all())
        near = (way - second[:, None]).flatten(2).norm(dim=2).mean(0)
        assert float(near[-1]) < 0.2 * float(near[0])


def test_pairs_do_not_depend_on_the_batch() -> None:
    interpolator = Interpolator(model(), "pndm2", steps=6, images_between=2)
    both = interpolator(images(2), images(2, seed=1))
    alone = interpolator(images(2)[1:], images(2, seed=1)[1:])
    # an inversion and what is decoded of it amplify rounding; a quarter of a gray level
    torch.testing.assert_close(both.first[1:], alone.first, atol=1e-3, rtol=0)
    torch.testing.assert_close(both.symmetric[1:], alone.symmetric, atol=1e-3, rtol=0)


def test_pairs_are_interpolated_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Interpolator.__call__

    def counting(self: Interpolator, first: Tensor, second: Tensor) -> object:
        calls.append(len(first))
        return original(self, first, second)

    monkeypatch.setattr(Interpolator, "__call__", counting)
    source = pictures(tmp_path / "images", 10)
    settings = {"pairs": 3, "solver": "ddim", "steps": 4, "images_between": 2}
    write_interpolations(model(), source, tmp_path / "together", **settings)
    assert calls == [3]
    write_interpolations(model(), source, tmp_path / "apart", batch_size=2, **settings)
    assert calls == [3, 1, 1, 1]
    pairs = [json.loads((tmp_path / name / "config.json").read_text())["pairs"] for name in ("together", "apart")]
    assert pairs[0] == pairs[1]
    assert_same_images(tmp_path / "apart", tmp_path / "together")


def test_what_cannot_be_interpolated() -> None:
    plain = model()
    with pytest.raises(FaroutError, match="no null condition"):
        Interpolator(without_null())
    with pytest.raises(FaroutError, match=r"9 images between the ends of 10 steps leave 1 step .*pndm4 warms up"):
        Interpolator(plain, "pndm4", steps=10, images_between=9)
    with pytest.raises(FaroutError, match="10 images do not fit between the ends of 10 steps; give 11"):
        Interpolator(plain, "ddim", steps=10, images_between=10)
    with pytest.raises(FaroutError, match="no solver"):
        Interpolator(plain, "euler")
    found = Interpolator(conditional(), "ddim", steps=4, images_between=1)(images(1), images(1, seed=1))
    assert bool(torch.isfinite(found.symmetric).all())


# -- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_of_interpolations(tmp_path: Path) -> None:
    source = pictures(tmp_path / "images", 10)
    done = write_interpolations(model(), source, tmp_path / "out", pairs=2, solver="ddim", steps=6, images_between=2)
    assert (done.pairs, done.images) == (2, 12)
    assert math.isfinite(done.reconstruction_error)
    found = open_source(tmp_path / "out")
    assert found.class_names == ("asymmetric_1", "asymmetric_2", "symmetric")
    assert len(found) == 12
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len({key for pair in config["pairs"] for key in pair}) == 4
    page = (tmp_path / "out" / "page.html").read_text()
    assert page.count("<img") == 2 * 3 * 4
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<script", page)
    assert not list((tmp_path / "out").glob(".working"))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source = pictures(tmp_path / "images", 4)
    settings = {"solver": "ddim", "steps": 4, "images_between": 1}
    with pytest.raises(SourceError, match="4 images, 3 pairs require 6"):
        write_interpolations(model(), source, tmp_path / "out", pairs=3, **settings)
    with pytest.raises(StoreError, match="not replaced"):
        write_interpolations(model(), source, source, pairs=1, **settings)
    with pytest.raises(FaroutError, match="pairs must be 1"):
        write_interpolations(model(), source, tmp_path / "out", pairs=0, **settings)
    for _ in range(2):
        write_interpolations(model(), source, tmp_path / "out", pairs=1, **settings)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pictures(tmp_path / "images", 4)
    model().save(tmp_path / "m")
    words = ["interpolate", str(tmp_path / "m"), str(source), "--out", str(tmp_path / "o"), "--device", "cpu"]
    assert main([*words, "--pairs", "1", "--steps", "8", "--images-between", "1"]) == 0
    assert "page.html" in capsys.readouterr().out
    assert main([*words, "--pairs", "1", "--steps", "8", "--images-between", "7"]) == 1
    assert "warms up" in capsys.readouterr().err
