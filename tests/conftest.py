"""Shared fixtures: one thread and fp32, so that numbers do not depend on the machine's processor."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy is imported, here and in what tests start

import pytest
import torch

from farout.core import devices
from image_files import pixels, write_parquet
from object_store import serve_s3

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def full_precision() -> Iterator[None]:
    """`auto` means fp32, also where the processor computes in bf16 natively."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_has_native_bf16", lambda device: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither read nor fill the user's cache of features."""
    os.environ["FAROUT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on real image sets run only where FAROUT_DATA names them."""
    if not os.environ.get("FAROUT_DATA"):
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason="FAROUT_DATA is not set"))


@pytest.fixture(scope="module")
def cheap_perceptual() -> Iterator[None]:
    """The reconstruction detector without its perceptual network, where a test is about something else."""
    from farout.detectors.reconstruction import metrics

    def mean_absolute_error(images: torch.Tensor, reconstructions: torch.Tensor, *_: object) -> torch.Tensor:
        originals = images.repeat_interleave(len(reconstructions) // len(images), 0)
        return (reconstructions - originals).abs().flatten(1).mean(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "perceptual_distances", mean_absolute_error)
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server, which the environment names; started once, by the first test that requires it."""
    with serve_s3() as address:
        yield address


_BUCKETS = itertools.count()


@pytest.fixture
def bucket(s3_server: str) -> str:
    """A new bucket, `s3://…`."""
    import s3fs

    name = f"bucket-{next(_BUCKETS)}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def data() -> Path:
    """The folder of real image sets."""
    return Path(os.environ["FAROUT_DATA"])


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose `data` is FAROUT_DATA, with one set of 20 images in four classes."""
    monkeypatch.setenv("FAROUT_DATA", str(tmp_path / "data"))
    labels, names = [i % 4 for i in range(20)], ["shirt", "bag", "boot", "hat"]
    write_parquet(tmp_path / "data" / "fashion_mnist" / "train.parquet", pixels(20), labels, names)
    write_parquet(tmp_path / "data" / "fashion_mnist" / "test.parquet", pixels(4, seed=1), labels[:4], names)
    return tmp_path
