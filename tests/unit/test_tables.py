"""Measurements and scores come back from their tables as they went in."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from farout.core.errors import FaroutError, StoreError
from farout.detectors.results import Measurements, Scores


def test_grids_and_vectors_round_trip() -> None:
    values = torch.arange(2 * 3 * 2 * 4, dtype=torch.float32).reshape(2, 3, 2, 4)
    values[1, 2, 0, 3] = float("nan")
    grid = Measurements(("b/1", "a"), values, (10.0, 50.0, 200.0), ("mse", "x", "y", "z"))
    again = Measurements.from_table(grid.to_table())
    assert (again.keys, again.levels, again.metrics) == (grid.keys, grid.levels, grid.metrics)
    torch.testing.assert_close(again.values, values, equal_nan=True, rtol=0, atol=0)
    assert grid.finite().tolist() == [True, False]
    long = Measurements(("b", "a"), vectors={"f": torch.rand(2, 5), "g": torch.rand(2, 1)})
    back = Measurements.from_table(long.to_table())
    assert back.keys == long.keys
    assert all(torch.equal(back.vectors[name], vector) for name, vector in long.vectors.items())
    assert back.select([1]).keys == ("a",)
    joined = Measurements.join([long, back])
    assert joined.vectors["f"].shape == (4, 5)


def test_a_cut_table_is_refused() -> None:
    grid = Measurements(("a", "b"), torch.zeros(2, 1, 1, 3), (1.0,), ("x", "y", "z"))
    with pytest.raises(StoreError, match="incomplete"):
        Measurements.from_table(grid.to_table().slice(0, 5))
    with pytest.raises(StoreError, match="key"):
        Measurements.from_table(pa.table({"name": ["a"]}))


def test_anyones_table_is_read() -> None:
    plain = Scores.from_frame(
        pd.DataFrame({"key": ["a", "b"], "score": [1.0, np.nan], "mine": [3, 4], "text": ["x", "y"]})
    )
    assert plain.status == ("ok", "not a number")
    assert list(plain.indicators) == ["mine"]
    assert np.isnan(plain.p_value).all()
    with pytest.raises(FaroutError, match="score"):
        Scores.from_frame(pd.DataFrame({"key": ["a"]}))
