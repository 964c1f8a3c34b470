"""Untrained networks of a benchmark: they show whether all goes together, and what an image costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from farout.benchmark.sets import Sets
from farout.benchmark.spec import DetectorSpec, NetworkSpec, OutlierSpec, Spec
from farout.classifiers.config import ClassifierConfig
from farout.classifiers.model import Classifier
from farout.data.classes import class_names_of
from farout.data.image_source import ImageSource
from farout.detectors.base import Cost
from farout.detectors.feature_detector import FeatureDetector
from farout.diffusion import diffusers_folders as folders
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.image_to_image import ImageToImage
from farout.diffusion.model import DiffusionModel
from farout.diffusion.train import build_model
from farout.synthesis.base import SynthesisContext

__all__ = ["Rehearsal"]

_SMALL = ("tiny", "tokens")
"""Networks that are counted as they are."""
_PROBE_S, _PROBE_ROWS, _PROBE_GMACS = 1.0, 16, 4.0
"""The speed is measured for so long, in calls of at most so many rows and about so much work."""


class Rehearsal:
    """Untrained networks of a specification, each built once on the images that it is to be trained on."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.sets = spec, Sets(spec)
        self.networks: dict[str, DiffusionModel | Classifier] = {}
        self._small: dict[str, DiffusionModel] = {}
        self._gmacs: dict[str, float] = {}
        self._costs: dict[str, Cost] = {}
        self._speeds: dict[str, float] = {}
        self._backbone_speeds: dict[tuple[str, int | None], float] = {}

    def images(self, source: str | None, limit: int | None) -> ImageSource:
        """Images that something is trained on or made of, as the first seed samples them."""
        return self.sets.images(source, limit)

    def network(self, name: str) -> DiffusionModel | Classifier:
        """One of the networks, untrained, or as its folder has it."""
        if name not in self.networks:
            self.networks[name] = self._build(self.spec.networks[name])
        return self.networks[name]

    def _build(self, entry: NetworkSpec) -> DiffusionModel | Classifier:
        if entry.folder is not None:
            return Classifier.load(entry.folder) if entry.kind == "classifier" else self._stored(entry.folder)
        images = self.images(entry.source, entry.limit)
        if isinstance(entry.model, ClassifierConfig):
            return entry.model.build(images, class_names_of(images))
        return build_model(entry.model, entry.model.preprocess(images), class_names=entry.model.class_names(images))

    def _stored(self, folder: str) -> DiffusionModel:
        """A stored diffusion model; an original Stable Diffusion folder is told the classes of the images."""
        local = folders.local_folder(folder)
        names = class_names_of(self.images(None, None)) if folders.requires_class_names(local) else None
        return DiffusionModel.load(local, class_names=names)

    def check(self) -> None:
        """Lets methods and reconstructions refuse networks, images and settings; raises FaroutError."""
        for outliers in self.spec.outliers.values():
            self._check_outliers(outliers)
        for again in self.spec.reconstructions.values():
            model = self.network(again.diffusion)
            assert isinstance(model, DiffusionModel)
            ImageToImage(model, **again.trip)  # refuses what is out of range
        for entry in self.spec.detectors.values():
            diffusion, classifier = self._given(entry)
            made = entry.made()
            if made.diffusion_of == "images":
                made.check(self.images(None, entry.limit), diffusion, classifier)

    def _check_outliers(self, entry: OutlierSpec) -> None:
        made, images = entry.made(), self.images(entry.source, entry.limit)
        given, classifier = self._given(entry)
        diffusion = None if given is None else made.load_diffusion(given, images)
        runtime = self.spec.runtime.resolved()
        made.check(
            SynthesisContext.create(images, Path(), entry.count, self.spec.seeds[0], runtime, diffusion, classifier)
        )

    def _given(self, entry: DetectorSpec | OutlierSpec) -> tuple[Any, Any]:
        found = [None if name is None else self.network(name) for name in (entry.diffusion, entry.classifier)]
        return found[0], found[1]

    # -- counting ------------------------------------------------------------------------------------------------

    def gmacs(self, name: str) -> float:
        """Of one evaluation of a network."""
        if name not in self._gmacs:
            network = self.network(name)
            if isinstance(network, DiffusionModel):
                self._gmacs[name] = network.gmacs
            else:
                self._gmacs[name] = _counted(lambda: _evaluate(network, 1))
        return self._gmacs[name]

    def cost(self, name: str) -> Cost:
        """Of one image, of a detector with untrained networks; of one that trains a denoiser of features in its fit,
        its rows and the backbone.
        """
        if name not in self._costs:
            self._costs[name] = self._cost(name)
        return self._costs[name]

    def _cost(self, name: str) -> Cost:
        entry = self.spec.detectors[name]
        made = entry.made()
        if isinstance(made, FeatureDetector):
            return self._feature_cost(made)
        made.classifier = self._given(entry)[1]
        diffusion = None if entry.diffusion is None else self._stand_in(entry.diffusion)
        known = diffusion or made.classifier
        images = self.images(None, entry.limit)
        made.preprocessing = known.preprocessing if known is not None else made.build_preprocessing(images, None)
        made.use(diffusion, self.spec.runtime)
        found = made.cost()
        if diffusion is None or entry.diffusion is None:
            return found
        return Cost(found.nfe, found.gmacs + found.nfe * (self.gmacs(entry.diffusion) - diffusion.gmacs))

    def _stand_in(self, name: str) -> DiffusionModel:
        """A small network in place of a large one: both are evaluated as often."""
        if name not in self._small:
            self._small[name] = self._build_small(name)
        return self._small[name]

    def _build_small(self, name: str) -> DiffusionModel:
        entry = self.spec.networks[name]
        assert isinstance(entry.model, DiffusionConfig)
        if entry.folder is not None or entry.model.network in _SMALL:
            found = self.network(name)
            assert isinstance(found, DiffusionModel)
            return found
        images, small = self.images(entry.source, entry.limit), replace(entry.model, network="tiny")
        return build_model(small, small.preprocess(images), class_names=small.class_names(images))

    def _feature_cost(self, made: FeatureDetector) -> Cost:
        made.features = made.build_features()
        grey = torch.full((1, 3, made.backbone.size, made.backbone.size), 0.5)
        gmacs = _counted(lambda: made.backbone.pooled_features(grey, 1))
        return Cost(made.rows_per_image if "diffusion" in made.needs else 0, gmacs)

    # -- speed ---------------------------------------------------------------------------------------------------

    def speed(self, name: str) -> float:
        """GMACs a second of a network on this machine, just now."""
        if name not in self._speeds:
            network, gmacs = self.network(name), self.gmacs(name)
            network.to(self.spec.runtime.resolved().device)
            rows = max(1, min(_PROBE_ROWS, round(_PROBE_GMACS / gmacs)))
            self._speeds[name] = _speed(lambda: _evaluate(network, rows), rows * gmacs)
        return self._speeds[name]

    def detector_speed(self, name: str) -> float:
        """The same of what a detector mostly runs: its diffusion model of images, else its classifier or backbone."""
        entry = self.spec.detectors[name]
        network = entry.diffusion or entry.classifier
        if network is not None:
            return self.speed(network)
        made = entry.made()
        assert isinstance(made, FeatureDetector)
        return self._backbone_speed(made)

    def _backbone_speed(self, made: FeatureDetector) -> float:
        key = (made.config["backbone"], made.config["size"])
        if key not in self._backbone_speeds:
            backbone = made.build_features().to(self.spec.runtime.resolved().device)
            grey = torch.full((8, 3, backbone.size, backbone.size), 0.5)
            self._backbone_speeds[key] = _speed(
                lambda: backbone.pooled_features(grey), _counted(lambda: backbone.pooled_features(grey))
            )
        return self._backbone_speeds[key]


@torch.no_grad()
def _evaluate(network: DiffusionModel | Classifier, rows: int) -> None:
    shape = (network.preprocessing.channels, *network.preprocessing.size)
    images = torch.full((rows, *shape), 0.5)
    if isinstance(network, Classifier):
        network.outputs(images)
        return
    told = network.conditioning
    condition = None if told is None else told(torch.zeros(rows, dtype=torch.int64))
    network.denoiser()(network.encode(images.to(network.device)), torch.full((rows,), 1.0), condition)


def _counted(call: Callable[[], Any]) -> float:
    """Billions of multiply-accumulates of a call; what a first one builds is not counted."""
    call()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2e9


def _speed(call: Callable[[], Any], gmacs: float) -> float:
    call()
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < _PROBE_S:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        calls += 1
    return calls * gmacs / (time.perf_counter() - started)
