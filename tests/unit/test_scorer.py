"""The scorer: tables of images of any kind in, the scores of the folder command out."""

from __future__ import annotations

import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from farout import KNN, PCA, Scorer, load
from farout.core.errors import FaroutError, StoreError
from farout.data.read_settings import ReadSettings
from farout.detectors.base import Detector
from tolerances import SCORE_TOLERANCE


def assert_scores_agree(actual: object, expected: object, detector: Detector) -> None:
    scale = np.std(detector.calibration_scores[detector.score_name])
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=SCORE_TOLERANCE * scale)


def picture(number: int) -> Image.Image:
    values = np.random.default_rng(number).normal(120, 30, (12, 10, 3)).clip(0, 255)
    return Image.fromarray(values.astype(np.uint8))


def encode(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorer") / "detector"
    PCA(size=8).fit([picture(number) for number in range(60)], statistics=30, alpha=0.1).save(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer(folder)


def test_the_scores_are_those_of_the_detector(scorer: Scorer) -> None:
    numbers = range(100, 109)
    expected = scorer.detector.score([picture(number) for number in numbers])
    scored = scorer({"key": [f"k{number}" for number in numbers], "image": [encode(number) for number in numbers]})
    assert list(scored)[:6] == ["key", "score", "p_value", "is_ood", "status", "reason"]
    assert list(scored)[6:] == list(expected.indicators)
    assert list(scored["key"]) == [f"k{number}" for number in numbers]
    assert_scores_agree(scored["score"], expected.score, scorer.detector)
    np.testing.assert_allclose(scored["p_value"], expected.p_value)
    assert list(scored["is_ood"]) == list(expected.is_ood)
    assert set(scored["status"]) == {"ok"}
    assert set(scored["reason"]) == {""}


def test_any_kind_of_image_has_the_same_score(scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(7))
    image = picture(7)
    array = np.asarray(image)
    cell = {"bytes": encode(7), "path": None}
    kinds = [image, array, array.transpose(2, 0, 1), encode(7), bytearray(encode(7)), cell, str(path), path]
    scores = scorer.score(kinds, keys=["same"] * len(kinds))
    assert scores["key"].to_pylist() == ["same"] * len(kinds)
    assert_scores_agree(scores["score"].to_numpy(), np.full(len(kinds), scores["score"][0].as_py()), scorer.detector)


@pytest.mark.parametrize("kind", ["encoded", "struct", "lists", "tensor"])
def test_tables_of_pyarrow(scorer: Scorer, kind: str) -> None:
    arrays = np.stack([np.asarray(picture(number)) for number in range(4)])
    columns = {
        "encoded": pa.array([encode(number) for number in range(4)]),
        "struct": pa.array([{"bytes": encode(number), "path": "x"} for number in range(4)]),
        "lists": pa.array(arrays.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
        "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(arrays),
    }
    table = pa.table({"image": columns[kind], "other": [1, 2, 3, 4]})
    scored = scorer(table)
    assert isinstance(scored, pa.Table)
    assert scored["key"].to_pylist() == ["0", "1", "2", "3"]
    expected = scorer.detector.score([picture(number) for number in range(4)]).score
    assert_scores_agree(scored["score"].to_numpy(), expected, scorer.detector)
    again = scorer(table.to_batches()[0])
    assert again.equals(scored)


def test_a_data_frame_of_paths(scorer: Scorer, tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.png"))
        picture(number).save(paths[-1])
    scored = scorer(pd.DataFrame({"path": [*paths, str(tmp_path / "absent.png")]}, index=[5, 6, 7, 8]))
    assert isinstance(scored, pd.DataFrame)
    assert list(scored["key"][:3]) == paths
    assert list(scored["status"]) == ["ok", "ok", "ok", "unreadable"]
    assert scored["reason"][3]
    assert scored["is_ood"].isna().tolist() == [False, False, False, True]


def test_what_is_no_image_is_one_unreadable_row(scorer: Scorer) -> None:
    images = [encode(1), None, b"no image", encode(2)[:60], np.zeros((2, 2, 9)), {"other": 1}, 3.5, encode(1)]
    scored = scorer.score(images)
    status = scored["status"].to_pylist()
    assert status == ["ok", *["unreadable"] * 6, "ok"]
    assert all(scored["reason"].to_pylist()[1:-1])
    assert scored["is_ood"].null_count == 6
    assert np.isnan(scored["score"].to_numpy()).sum() == 6
    assert np.isnan(scored["p_value"].to_numpy()).sum() == 6
    assert scored["score"][0] == scored["score"][7]
    only = scorer.score([b"no image"])
    assert only.schema == scored.schema


def test_values_without_a_usual_range_are_not_guessed(scorer: Scorer) -> None:
    floats = np.asarray(picture(0)).astype(np.float32)
    scored = scorer.score([floats, floats / 255])
    assert scored["status"].to_pylist() == ["unreadable", "ok"]
    assert "no usual range" in scored["reason"][0].as_py()
    declared = Scorer(scorer.detector, reading=ReadSettings(value_range=(0, 255))).score([floats])
    expected = scorer.score([picture(0)])
    assert_scores_agree(declared["score"].to_numpy(), expected["score"].to_numpy(), scorer.detector)


def test_an_empty_table_has_the_same_columns(scorer: Scorer) -> None:
    empty = scorer(pa.table({"image": pa.array([], pa.binary())}))
    assert len(empty) == 0
    assert empty.schema == scorer.score([encode(0)]).schema


def test_every_image_is_decoded_once(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    from farout.data import decoding

    decoded = []
    original = decoding.from_pil
    monkeypatch.setattr(decoding, "from_pil", lambda image: decoded.append(1) or original(image))
    scorer.score([encode(number) for number in range(10)])
    assert len(decoded) == 10


def test_it_is_pickled_by_path_and_loads_once_in_a_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from farout.scoring import scorer as module

    loads = []
    original = module.load
    monkeypatch.setattr(module, "load", lambda path, **runtime: loads.append(path) or original(path, **runtime))
    module._load_once.cache_clear()
    first = Scorer(folder)
    data = pickle.dumps(first)
    assert len(data) < 1000
    assert not loads, "nothing is loaded before it is used"
    copies = [pickle.loads(data) for _ in range(3)]  # noqa: S301
    scores = [copy.score([encode(3)])["score"][0].as_py() for copy in copies]
    assert len(set(scores)) == 1
    assert len(loads) == 1
    with pytest.raises(FaroutError, match="save the detector"):
        pickle.dumps(Scorer(first.detector))


def test_a_folder_that_was_fitted_again_is_refused_or_loaded_again(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    images = [picture(number) for number in range(60)]
    PCA(size=8).fit(images, statistics=30, alpha=0.1).save(folder)
    before = Scorer(folder)
    score = before.score([encode(3)])["score"][0].as_py()
    data = pickle.dumps(before)
    PCA(size=6).fit(images, statistics=30, alpha=0.1).save(folder)
    assert Scorer(folder).score([encode(3)])["score"][0].as_py() != score
    of_before = pickle.loads(data)  # noqa: S301
    for _ in range(2):  # also when the error of the first call was caught
        with pytest.raises(StoreError, match="another detector"):
            of_before.score([encode(3)])


def test_the_url_of_a_detector_is_refused_with_advice() -> None:
    for use in (Scorer, load):
        with pytest.raises(FaroutError, match="copy its folder to this machine"):
            use("s3://bucket/detector")


def test_threads_share_it(folder: Path) -> None:
    scorer = Scorer(folder)
    expected = scorer.score([encode(number) for number in range(16)])["score"].to_numpy()
    barrier = threading.Barrier(4)

    def score(part: int) -> np.ndarray:
        barrier.wait()
        return scorer.score([encode(number) for number in range(part * 4, part * 4 + 4)])["score"].to_numpy()

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(score, range(4)))
    assert_scores_agree(np.concatenate(parts), expected, scorer.detector)


def test_errors_name_what_is_wrong(scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="columns photo; expected 'image' or 'path'"):
        scorer({"photo": [encode(0)]})
    with pytest.raises(FaroutError, match="got list"):
        scorer([encode(0)])  # type: ignore[type-var]
    with pytest.raises(FaroutError, match="1 rows and the keys 2"):
        scorer({"image": [encode(0)], "key": ["a", "b"]})
    with pytest.raises(FaroutError, match="has not been fitted"):
        Scorer(KNN())
    with pytest.raises(StoreError, match="no folder"):
        Scorer(tmp_path / "absent").score([encode(0)])
    with pytest.raises(FaroutError, match="one score per image"):
        Scorer(scorer.detector, reading=ReadSettings(frames="all"))
    with pytest.raises(FaroutError, match=r"farout\.load"):
        Scorer(scorer.detector, device="cpu")
