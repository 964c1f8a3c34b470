"""Network calls are split by memory only, and resumed work is computed in the same blocks."""

import pytest
import torch
from torch import Tensor, nn

from farout.core import chunking
from farout.core.chunking import blocks_containing, call_in_chunks
from farout.core.errors import FaroutError
from farout.core.runtime import Runtime
from tolerances import assert_close

pytestmark = pytest.mark.numerics


class Widening(nn.Module):
    """4 values a row in and out, 4,000 in between; remembers the rows of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 4000), nn.Linear(4000, 4)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.narrow(self.wide(x))


@pytest.fixture
def network() -> Widening:
    torch.manual_seed(0)
    return Widening().requires_grad_(False)


def test_a_call_holds_what_fits_the_budget(network: Widening, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 4)
    expected = network(x)
    network.rows.clear()
    monkeypatch.setattr(chunking, "_CACHE_BUDGET", 40 * 4 * 4000)
    assert_close(call_in_chunks(network, network, x), expected)
    assert network.rows == [1, 34, 33, 33], "measured on one row, then calls of nearly equal size"
    network.rows.clear()
    call_in_chunks(network, network, x)
    assert network.rows == [34, 33, 33], "measured once"


def test_calls_of_large_networks_have_few_rows(network: Widening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_CACHE_BUDGET", 1)
    monkeypatch.setattr(chunking, "_CPU_BUDGET", 2 * 4 * 4000)
    call_in_chunks(network, network, torch.randn(5, 4))
    assert network.rows == [1, 2, 2, 1]
    monkeypatch.setattr(chunking, "_CPU_BUDGET", 1)
    network.rows.clear()
    call_in_chunks(network, network, torch.randn(2, 4))
    assert network.rows == [1, 1], "a row that fits nothing is still computed"


@pytest.mark.parametrize(("batch_size", "rows"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (64, [5])])
def test_a_given_batch_size_is_the_limit(network: Widening, batch_size: int, rows: list[int]) -> None:
    call_in_chunks(network, network, torch.randn(5, 4), batch_size=batch_size)
    assert network.rows == rows


def test_no_rows_and_one_row_need_no_measurement(network: Widening) -> None:
    assert call_in_chunks(network, network, torch.empty(0, 4)).shape == (0, 4)
    assert call_in_chunks(network, network, torch.randn(1, 4)).shape == (1, 4)
    assert network.rows == [0, 1]


def test_the_split_depends_on_shapes_only(network: Widening) -> None:
    """Otherwise a second run of a command in one process, or after another one, could give other bytes."""
    x = torch.randn(3000, 4)
    call_in_chunks(network, network, x[:5])
    network.rows.clear()
    first = call_in_chunks(network, network, x)
    rows = list(network.rows)
    network.rows.clear()
    assert torch.equal(call_in_chunks(network, network, x), first)
    assert network.rows == rows


@pytest.mark.parametrize("batch_size", [0, -3])
def test_impossible_sizes_are_refused(batch_size: int) -> None:
    with pytest.raises(FaroutError, match=f"batch_size is {batch_size}; expected auto, or at least 1"):
        Runtime(batch_size=batch_size)


def test_blocks_have_fixed_boundaries() -> None:
    assert blocks_containing(range(7), 3, 7) == [range(3), range(3, 6), range(6, 7)]
    assert blocks_containing([5], 3, 7) == [range(3, 6)]
    assert blocks_containing({6, 1}, 3, 7) == [range(3), range(6, 7)]
    assert blocks_containing([], 3, 7) == []
