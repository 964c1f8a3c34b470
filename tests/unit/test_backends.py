"""Backends give the same outputs as torch, and give way to it where they cannot."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor, nn

from farout.classifiers.model import Classifier
from farout.core.backends import Backend, NetworkRunner, check_backend, explain_unusable_backend
from farout.core.errors import FaroutError
from farout.core.runtime import Runtime
from farout.detectors import backend_choice
from farout.detectors.mahalanobis import Mahalanobis
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.schedule import NoiseSchedule
from farout.features.extractor import FeatureExtractor

CPU = torch.device("cpu")


def _skip_without(backend: Backend) -> None:
    reason = explain_unusable_backend(backend, CPU, "fp32")
    if reason:
        pytest.skip(reason)


BACKENDS = ["openvino", "onnxruntime"]
"""torch.compile is tested with one small network: it takes minutes for those of the other tests."""


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(288, 5))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        return output


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("compile", marks=pytest.mark.slow)])
def test_backends_agree_with_torch_for_any_number_of_rows(backend, caplog):
    _skip_without(backend)
    runner = NetworkRunner(_Small(), "network")
    with caplog.at_level(logging.INFO), torch.no_grad():
        for rows in (5, 1, 7, 2, 5):
            x = torch.randn(rows, 3, 8, 8)
            assert torch.allclose(runner(x, backend=backend), runner(x), atol=1e-5)
    assert f"{backend} runs the network" in caplog.text


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_changed_weights_are_used(backend):
    _skip_without(backend)
    module = _Small()
    runner, x = NetworkRunner(module, "network"), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        runner(x, backend=backend)
        for parameter in module.parameters():
            parameter.mul_(2)
        assert torch.allclose(runner(x, backend=backend), runner(x), atol=1e-4)


def test_gradients_are_recorded_by_torch():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    NetworkRunner(_Small(), "network")(x, backend="openvino").sum().backward()
    assert x.grad is not None


class _Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        # tracing records the branch of its example
        return x * float(np.asarray(x.sum().item() > 0)) if len(x) == 2 else x + 1


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_network_that_cannot_be_converted_runs_in_torch_with_a_reason(backend, caplog):
    _skip_without(backend)
    x = torch.randn(4, 3)
    with torch.no_grad():
        found = NetworkRunner(_Untraceable(), "odd network")(x, backend=backend)
    assert torch.equal(found, x + 1)
    assert "cannot run the odd network" in caplog.text


def test_unusable_backends_are_refused():
    with pytest.raises(FaroutError, match="expected auto, eager"):
        check_backend("tensorrt", CPU, "fp32")
    with pytest.raises(FaroutError, match=r"fp32 only|pip install"):
        check_backend("onnxruntime", CPU, "bf16")
    with pytest.raises(FaroutError, match=r"CPU only|pip install"):
        check_backend("openvino", torch.device("cuda"), "fp32")


def test_bf16_is_refused_where_instructions_are_restricted(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert explain_unusable_backend("openvino", CPU, "bf16")


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_agree(backend, caplog):
    _skip_without(backend)
    extractor = FeatureExtractor.create("lite0", weights="random", layers=(0, 1), size=32)
    images = torch.rand(5, 3, 32, 32)
    with caplog.at_level(logging.INFO):
        found = extractor.pooled_features(images, backend=backend)
        grid = extractor.feature_grid(images, 4, backend=backend)
    assert torch.allclose(found, extractor.pooled_features(images), atol=1e-5, rtol=1e-4)
    assert torch.allclose(grid, extractor.feature_grid(images, 4), atol=1e-4, rtol=1e-3)
    assert f"{backend} runs the backbone" in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
def test_denoisers_agree_at_all_noise_levels(backend, caplog):
    _skip_without(backend)
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    schedule = NoiseSchedule.from_diffusers_config({"num_train_timesteps": 100, "beta_schedule": "linear"})
    x, sigma = torch.randn(5, 1, 8, 8), schedule.sigma[torch.tensor([0, 20, 50, 80, 99])].float()
    with torch.no_grad(), caplog.at_level(logging.INFO):
        expected = NetworkDenoiser(network, schedule)(x, sigma)
        found = NetworkDenoiser(network, schedule, backend=backend)(x, sigma)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert f"{backend} runs the denoiser" in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
def test_classifiers_agree_with_features_and_maps(backend, caplog):
    _skip_without(backend)
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    classifier = Classifier.from_module(module, [0.5] * 3, [0.5] * 3, size=16)
    images = torch.rand(5, 3, 16, 16)
    with caplog.at_level(logging.INFO):
        found = classifier.outputs(images, maps=True, backend=backend)
    expected = classifier.outputs(images, maps=True)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.features, expected.features, atol=1e-5)
    assert found.maps is not None
    assert torch.allclose(found.maps, expected.maps, atol=1e-5)
    assert f"{backend} runs the classifier" in caplog.text


@pytest.fixture
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(140)]


def test_backend_is_chosen_by_the_number_of_images_and_kept(images, monkeypatch, tmp_path, caplog):
    _skip_without("openvino")
    runtime = Runtime(precision="fp32", cache=False, backend="auto")
    detector = Mahalanobis(weights="random", layers=(0,), size=32).fit(images, runtime=runtime)
    assert detector.backend == "eager"  # a conversion would take longer than these images

    monkeypatch.setattr(backend_choice, "_GMACS_PER_SECOND", 1e-9)
    timings = iter([2.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr(backend_choice, "_time", lambda *_: next(timings))
    expected = detector.score(images[:20]).score  # few images: no choice is made
    assert detector.backend == "eager"
    with caplog.at_level(logging.INFO):
        found = detector.score(images).score[:20]
    assert detector.backend == "openvino"
    assert "backend: openvino (1.0 ms per image against 2.0" in caplog.text
    deviation = np.std(detector.calibration_scores[detector.score_name])
    assert np.abs(found - expected).max() <= 1e-4 * deviation

    slower = copy.copy(detector)
    slower.use_backend("eager")
    slower.score(images)
    assert slower.backend == "eager"  # the conversion was slower than torch
