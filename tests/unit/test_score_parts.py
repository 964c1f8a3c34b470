"""Parts of scored sets: what is written is read back, on every kind of storage, and damage is noticed."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from farout.core import storage
from farout.core.errors import StoreError
from farout.core.storage import FilePath
from farout.detectors.base import Scores
from farout.scoring.score_parts import ScoredPart, list_parts, read_part, remove_part, write_part

ENVIRONMENT = {"device": "cpu", "precision": "fp32", "cpu": "AVX2", "versions": {"farout": "0.1.0"}}


def a_part(start: int = 8) -> ScoredPart:
    """Three images, of which one cannot be read."""
    score = np.array([0.1 + 0.2, np.nan, 1e-17])
    scores = Scores(
        keys=("a%2Cb", "broken", "ü"),
        score=score,
        p_value=np.array([0.05, np.nan, 1.0]),
        is_ood=np.array([True, False, False]),
        status=("ok", "unreadable", "ok"),
        indicators={"knn": score},
    )
    return ScoredPart(range(start, start + 3), scores, {"broken": "not an image"}, "c0ffee", ENVIRONMENT)


@pytest.fixture(params=["folder", "store"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> FilePath:
    name = str(tmp_path) if request.param == "folder" else f"memory://{tmp_path.name}"
    return storage.as_file_path(name)


def test_a_part_is_read_back_as_it_was_written(out: FilePath) -> None:
    write_part(out, a_part())
    found = read_part(out, range(8, 11))
    pd.testing.assert_frame_equal(found.scores.to_frame(), a_part().scores.to_frame())
    assert found.unreadable == {"broken": "not an image"}
    assert (found.content, found.environment) == ("c0ffee", ENVIRONMENT)
    remove_part(out, 8)
    assert not storage.list_files(out)


def test_the_table_of_a_part_says_why_an_image_has_no_score(tmp_path: Path) -> None:
    """It may be read on its own, by programs that read parquet."""
    write_part(tmp_path, a_part())
    table = pd.read_parquet(tmp_path / "parts" / "000000008.parquet")
    assert table["reason"].tolist() == ["", "not an image", ""]
    assert table["is_ood"].tolist() == [True, None, False]
    assert table.columns.tolist() == ["key", "score", "p_value", "is_ood", "status", "reason", "knn"]


def test_a_part_without_its_second_file_is_not_complete(out: FilePath) -> None:
    write_part(out, a_part(0))
    write_part(out, a_part(1_000_000_000))
    write_part(out, a_part(8))
    storage.remove(out / "parts" / "000000008.json")
    assert list_parts(out) == {0, 1_000_000_000}


def test_the_same_part_is_written_with_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_part(tmp_path / name, a_part())
    for file in ("000000008.parquet", "000000008.json"):
        assert (tmp_path / "one" / "parts" / file).read_bytes() == (tmp_path / "two" / "parts" / file).read_bytes()


def test_a_changed_part_is_not_read(out: FilePath) -> None:
    path = out / "parts" / "000000008.parquet"
    write_part(out, a_part())
    data = storage.read_bytes(path)
    storage.write_bytes(path, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match="changed"):
        read_part(out, range(8, 11))
    storage.remove(path)
    with pytest.raises(StoreError, match="000000008"):
        read_part(out, range(8, 11))


def test_a_part_of_other_boundaries_is_not_read(out: FilePath) -> None:
    write_part(out, a_part())
    with pytest.raises(StoreError, match="3 images, expected 4"):
        read_part(out, range(8, 12))
