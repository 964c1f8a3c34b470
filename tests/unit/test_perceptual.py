"""Perceptual distances and SSIM: zero for equal images, rising with damage, equal to well-kept libraries."""

import pytest
import torch
from skimage.metrics import structural_similarity

from farout.core.errors import MissingExtraError, StoreError
from farout.features import backbones
from farout.features.perceptual import perceptual_distance, ssim
from tolerances import assert_close

pytestmark = pytest.mark.numerics


def pictures(count: int = 3, channels: int = 3, size: int = 28) -> torch.Tensor:
    small = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=(size, size), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_distance_rises_with_damage(channels: int) -> None:
    distance, images = perceptual_distance("lite0"), pictures(channels=channels)
    features = distance.features(images)
    assert torch.equal(distance.distance(features, features), torch.zeros(3, dtype=torch.float64))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    values = [
        distance.distance(features, distance.features((images + s * noise).clamp(0, 1))) for s in (0.03, 0.1, 0.3)
    ]
    assert bool((values[0] > 0).all())
    assert bool((values[0] < values[1]).all())
    assert bool((values[1] < values[2]).all())


def test_features_do_not_depend_on_the_batch() -> None:
    distance, images = perceptual_distance("lite0"), pictures(5)
    whole = distance.features(images)
    for index in range(5):
        alone = distance.features(images[index : index + 1])
        for one, each in zip(alone, whole, strict=True):
            assert_close(one, each[index : index + 1])


def test_altered_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_SHA256", "0" * 64)
    backbones._lite0_weights.cache_clear()
    with pytest.raises(StoreError, match="pinned"):
        backbones.create_lite0()
    backbones._lite0_weights.cache_clear()


def test_lpips_without_weights_names_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package or weight file is an error, never another distance in its place."""
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(MissingExtraError, match="lite0"):
        perceptual_distance("lpips")


def test_lpips_is_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our formula on the package's network and heads gives the package's distance (AlexNet with random weights)."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    whole = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    monkeypatch.setattr(lpips, "LPIPS", lambda **_: whole)
    distance = perceptual_distance("lpips")
    one, other = pictures(size=40), pictures(size=40).flip(0)
    ours = distance.distance(distance.features(one), distance.features(other))
    with torch.no_grad():
        theirs = whole(one * 2 - 1, other * 2 - 1).flatten()
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-6)
    gray = distance.features(pictures(channels=1, size=28))
    assert gray[0].shape[-1] == whole.net(torch.zeros(1, 3, 32, 32))[0].shape[-1], "28 px are padded to 32"


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_scikit_images(channels: int) -> None:
    one, other = pictures(channels=channels).double(), pictures(channels=channels).flip(0).double()
    theirs = [
        structural_similarity(a.numpy(), b.numpy(), data_range=1.0, channel_axis=0)
        for a, b in zip(one, other, strict=True)
    ]
    # scikit-image averages over positions at least half a window from the border, as we do
    torch.testing.assert_close(ssim(one, other), torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ssim(one, one), torch.ones(3, dtype=torch.float64))


def test_ssim_of_tiny_images() -> None:
    assert ssim(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)).tolist() == [1.0, 1.0]
