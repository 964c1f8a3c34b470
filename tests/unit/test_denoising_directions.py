"""The denoising card's ablation directions, on classes whose exact denoiser is known: no training, no luck.

Ten classes differ in ten directions of an 8x8 image and share the rest; OOD images are half-way between two classes.
Not asserted: that t = 300 is ahead of t = 120. With an exact denoiser it is not (.93 against .94 here).
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from farout.classifiers.model import Classifier
from farout.data.preprocessing import Preprocessing
from farout.detectors.denoising import Denoising
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.model import DiffusionModel
from farout.diffusion.schedule import NoiseSchedule
from farout.evaluation.metrics import auroc

pytestmark = pytest.mark.filterwarnings(
    "ignore:it is not known which images:farout.core.errors.MisleadingResultWarning"
)

CLASSES, PIXELS, SPREAD = 10, 64, 0.3
BASIS = torch.linalg.qr(torch.randn(PIXELS, PIXELS, generator=torch.Generator().manual_seed(0)))[0]
CENTRES = 1.5 * torch.eye(CLASSES, PIXELS)
SCHEDULE = NoiseSchedule("linear", 1e-4, 0.02)


def drawn(count: int, seed: int, *, out: bool = False) -> Tensor:
    """Images (count, 1, 8, 8) of the classes; with `out` half-way between two of them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    others = (labels + torch.randint(1, CLASSES, (count,), generator=generator)) % CLASSES
    centres = (CENTRES[labels] + CENTRES[others]) / 2 if out else CENTRES[labels]
    places = centres + SPREAD * torch.randn(count, PIXELS, generator=generator)
    return ((places @ BASIS.T) / 2 + 0.5).clamp(0, 1).reshape(count, 1, 8, 8)


class ExactNetwork(nn.Module):
    """The expected clean image of a mixture of Gaussians, under one class or, by the null row, under all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Embedding(CLASSES + 1, CLASSES + 1, _weight=torch.eye(CLASSES + 1))
        self.config = {"block_out_channels": (1,), "in_channels": 1, "out_channels": 1}

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        rows = self.class_embedding(class_labels)
        prior = rows[:, :CLASSES] + rows[:, CLASSES:] / CLASSES
        sigma = SCHEDULE.sigma_of(t).float()[:, None]
        places = (x.flatten(1) * (1 + sigma**2).sqrt()) @ BASIS
        variance = SPREAD**2 + sigma**2
        logits = prior.log() - (places[:, None] - CENTRES).square().sum(2) / (2 * variance)
        centres = logits.softmax(1) @ CENTRES
        clean = centres + SPREAD**2 / variance * (places - centres)
        return (clean @ BASIS.T).reshape(x.shape)


def linear_classifier() -> Classifier:
    """How far along each class's direction; its features look at six others too."""
    features, last = nn.Linear(PIXELS, 16, bias=False), nn.Linear(16, CLASSES, bias=False)
    features.weight.data, last.weight.data = BASIS[:, :16].T.contiguous(), torch.eye(CLASSES, 16)
    return Classifier.from_module(nn.Sequential(nn.Flatten(), features, last), [0.5], [0.5], size=8, channels=1)


@functools.cache
def areas(**settings: object) -> dict[str, float]:
    """AUROC in each space."""
    network = ExactNetwork()
    preprocessing = Preprocessing(size=(8, 8), channels=1, native=(8, 8))
    conditioning = ClassVectors(network, [str(number) for number in range(CLASSES)], has_null=True)
    model = DiffusionModel(network, SCHEDULE, preprocessing, prediction="sample", conditioning=conditioning)
    detector = Denoising(**settings)  # type: ignore[arg-type]
    detector.fit(drawn(60, 1), model, linear_classifier(), alpha=0.1, statistics=30)
    inside, outside = (detector.score(images).indicators for images in (drawn(200, 2), drawn(200, 3, out=True)))
    return {name: auroc(inside[name], outside[name]) for name in ("logit", "feature", "pixel")}


def test_logits_and_features_have_a_higher_auroc_than_pixels() -> None:
    found = areas()
    assert found["logit"] > 0.9
    assert found["logit"] == pytest.approx(found["feature"], abs=0.03)
    assert min(found["logit"], found["feature"]) > found["pixel"] + 0.1


def test_the_class_condition_raises_the_auroc() -> None:
    """Without it, in-distribution images drift to other classes too."""
    assert areas()["logit"] > areas(condition="none")["logit"] + 0.05


def test_four_draws_raise_the_auroc() -> None:
    assert areas()["logit"] > areas(draws=1)["logit"] + 0.02


def test_the_fast_default_is_as_good_as_the_papers_path() -> None:
    paper = Denoising.presets["paper"]
    assert areas()["logit"] > areas(**paper)["logit"] - 0.01
