"""Volume-preserving maps: inverse, unit Jacobian determinant, number of parameters, and cost."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from farout.core.errors import FaroutError
from farout.synthesis import SYNTHESIZERS
from farout.synthesis.ncis.volume_preserving import ClassRotations, OrthogonalLayers, VolumePreservingNetwork

pytestmark = pytest.mark.numerics

MAPS = ["matrix_exp", "cayley"]


def network(dim: int, orthogonal_map: str = "matrix_exp", classes: int = 3, layers: int = 4) -> VolumePreservingNetwork:
    torch.manual_seed(0)
    return VolumePreservingNetwork(dim, classes, layers=layers, orthogonal_map=orthogonal_map)


def moved(dim: int, orthogonal_map: str) -> VolumePreservingNetwork:
    """After some updates of every parameter."""
    net = network(dim, orthogonal_map)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(8, dim), torch.arange(8) % 3)[:, -1].square().mean().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("dim", [2, 5, 32])
def test_the_inverse_undoes_the_map(dim: int, orthogonal_map: str) -> None:
    x, labels = torch.randn(20, dim), torch.arange(20) % 3
    for net in (network(dim, orthogonal_map), moved(dim, orthogonal_map)):
        with torch.no_grad():
            z = net(x, labels)
            assert (net.inverse(z, labels) - x).abs().max() < 1e-4
            assert (net(net.inverse(x, labels), labels) - x).abs().max() < 1e-4
        assert (z - x).abs().max() > 0.1, "the map is not the identity"


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("dim", [2, 5, 8])
def test_the_jacobian_determinant_is_one(dim: int, orthogonal_map: str) -> None:
    """Otherwise densities of the embedding and of the flat space would differ."""
    net = moved(dim, orthogonal_map).double()
    for label in range(3):
        labels = torch.tensor([label])
        x = torch.randn(1, dim, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda v, y=labels: net(v, y)[0], x)[:, 0]
        assert torch.linalg.det(jacobian).item() == pytest.approx(1, abs=1e-5)


def test_the_map_depends_on_the_class_and_is_not_linear() -> None:
    net = moved(6, "matrix_exp")
    x = 30 * torch.randn(4, 6)  # near zero young sigmoids are almost straight
    with torch.no_grad():
        first, second = (net(x, torch.full((4,), label)) for label in (0, 1))
        middle = net((x[:1] + x[1:2]) / 2, torch.zeros(1, dtype=torch.long))
    assert (first - second).abs().max() > 1e-3
    assert (middle - (first[:1] + first[1:2]) / 2).abs().max() > 1e-3


def test_the_published_number_of_parameters() -> None:
    """Counted on the meta device, without computing matrix exponentials of 768 x 768."""
    with torch.device("meta"):
        net = VolumePreservingNetwork(768, 100, layers=4, orthogonal_map="matrix_exp")
    assert sum(parameter.numel() for parameter in net.parameters()) == 36_162_816
    halves = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert halves == {"rotations": 5 * 590_592, "couplings": 4 * 8_264_064, "table": 153_600}
    same = network(7, "cayley"), network(7, "matrix_exp")
    assert len({sum(parameter.numel() for parameter in one.parameters()) for one in same}) == 1


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_layers_are_initialized_as_different_rotations(orthogonal_map: str) -> None:
    torch.manual_seed(0)
    layers = OrthogonalLayers(3, 24, orthogonal_map)
    weight = layers.weight.detach().double()
    assert (weight @ weight.mT - torch.eye(24)).abs().max() < 1e-5
    assert torch.linalg.det(weight).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert layers.bias.abs().max() <= 24**-0.5
    assert not torch.allclose(weight[0], weight[1]), "layers differ"
    torch.manual_seed(0)
    lower = torch.empty(3, 24, 24).uniform_(-torch.pi, torch.pi).double().tril(-1)
    assert torch.allclose(weight, torch.matrix_exp(lower - lower.mT), atol=1e-4), "both maps start at the same matrices"


def test_matrices_are_computed_once_and_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(6)
    calls = []
    kind = type(net.rotations.parametrizations.weight[0])
    monkeypatch.setattr(kind, "forward", lambda self, x, old=kind.forward: calls.append(1) or old(self, x))
    x, labels = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    net(x, labels)
    assert len(calls) == 1, "all layers at once"
    calls.clear()
    with parametrize.cached():
        net.inverse(net(x, labels), labels).sum().backward()
    assert len(calls) == 1, "forward and inverse share them"


def test_weights_go_to_another_network() -> None:
    for orthogonal_map in MAPS:
        net = moved(5, orthogonal_map)
        torch.manual_seed(9)
        twin = VolumePreservingNetwork(5, 3, orthogonal_map=orthogonal_map)
        twin.load_state_dict(net.state_dict())
        x, labels = torch.randn(4, 5), torch.arange(4) % 3
        assert torch.equal(net(x, labels), twin(x, labels))


def test_rotations_are_principal_axes() -> None:
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 4) * torch.tensor([0.1, 3.0, 1.0, 0.3]) + labels[:, None] * 5
    turned = ClassRotations.fit(x, labels, 3)
    assert isinstance(turned, nn.Module)
    z = turned(x, labels)
    assert torch.allclose(turned.inverse(z, labels), x, atol=1e-4)
    for label in range(3):
        covariance = z[labels == label].T.cov()
        assert covariance.diagonal().diff().max() < 0, "by decreasing variance"
        assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-4
        assert z[labels == label].mean(0).abs().max() < 1e-4
        assert abs(abs(torch.linalg.det(turned.axes[label]).item()) - 1) < 1e-5


def test_invalid_arguments_are_refused() -> None:
    for wrong in ({"dim": 1}, {"classes": 0}, {"layers": 0}):
        with pytest.raises(FaroutError, match="at least 2 dimensions"):
            VolumePreservingNetwork(**{"dim": 4, "classes": 2, **wrong})
    with pytest.raises(FaroutError, match="expected matrix_exp or cayley"):
        VolumePreservingNetwork(4, 2, orthogonal_map="householder")


def test_networks_are_not_registered_as_methods() -> None:
    assert not {"volume_preserving", "_manifold"} & set(SYNTHESIZERS)
