"""Where the hub cannot be reached, its libraries use what was downloaded before, and fail at once for the rest."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from farout.core import hub
from farout.core.errors import SourceError, StoreError
from farout.data.sources import open_source
from farout.diffusion.model import DiffusionModel
from farout.features.backbones import create_backbone


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "_TIMEOUT_S", 0.2)
        yield


def test_missing_weights_and_sets_are_named_at_once(offline: None) -> None:
    begins = time.monotonic()
    with pytest.raises(StoreError, match=r"of resnet18 \(timm/resnet18.*127.0.0.1:9 cannot be reached: .*weights="):
        create_backbone("resnet18", (1,), 32, None)
    with pytest.raises(StoreError, match=r"hf://farout-tests/nothing cannot be downloaded .*give the folder"):
        DiffusionModel.load("hf://farout-tests/nothing")
    with pytest.raises(SourceError, match=r"hf://farout-tests/nothing:test cannot be loaded .*cannot be reached"):
        open_source("hf://farout-tests/nothing:test")
    assert time.monotonic() - begins < 60  # one of them took 80 s


def test_a_server_that_does_not_answer_is_not_waited_for(silent_server: None) -> None:
    begins = time.monotonic()
    assert "127.0.0.1" in hub.find_hub_obstacle()
    assert time.monotonic() - begins < 10


def test_the_offline_mode_of_users_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.find_hub_obstacle() == "HF_HUB_OFFLINE is set"


def test_the_mode_is_restored(offline: None) -> None:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with hub.hub_access() as obstacle:
        assert obstacle
        assert constants.HF_HUB_OFFLINE is True
    assert before == constants.HF_HUB_OFFLINE
