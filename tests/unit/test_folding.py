"""Folding takes work away and leaves the features."""

import pytest
import torch
from torch import Tensor, nn

from farout.features.batch_norm_folding import fold_batch_norm
from farout.features.extractor import FeatureExtractor

pytestmark = pytest.mark.numerics


def shaken(network: nn.Module) -> nn.Module:
    """Statistics that a fresh normalisation does not have."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_(0, 0.2)
    return network.eval()


def normalisations(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", ["lite0", "test_resnet", "test_mambaout"])
def test_features_stay_and_normalisations_go(name: str) -> None:
    torch.manual_seed(0)
    network = shaken(FeatureExtractor.create(name, weights="random", size=64).network)
    twin = fold_batch_norm(network, 64)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for before, after in zip(network(images), twin(images), strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))
    before, after = normalisations(network), normalisations(twin)
    assert after < before or (before == 0 and twin is network)


class Twice(nn.Module):
    """What the convolution gives is read beside its normalisation too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> list[Tensor]:
        made = self.conv(x)
        return [made, self.norm(made)]


def test_a_convolution_that_is_read_elsewhere_stays() -> None:
    torch.manual_seed(0)
    network = shaken(Twice())
    assert fold_batch_norm(network, 16) is network


def test_saved_weights_and_their_hash_know_nothing_of_it(tmp_path) -> None:
    extractor = FeatureExtractor.create("test_resnet", weights="random", size=32)
    before, names = extractor.content_hash, list(extractor.network.state_dict())
    images = torch.rand(2, 3, 32, 32)
    found = extractor.pooled_features(images)
    extractor.save(tmp_path / "backbone")
    again = FeatureExtractor.load(tmp_path / "backbone")
    assert again.content_hash == before
    assert list(again.network.state_dict()) == names
    assert torch.equal(again.pooled_features(images), found)
