"""Check with untrained networks that the methods of a benchmark accept their networks, images and settings.

Training takes hours; a mistake that a method would only refuse afterwards is found before any work starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farout.benchmark.image_sets import ImageSets
from farout.benchmark.specification import BenchmarkSpec, DetectorSpec, NetworkSpec, OutlierSpec
from farout.classifiers.config import ClassifierConfig
from farout.classifiers.model import Classifier
from farout.data.classes import class_names_of
from farout.diffusion import diffusers_folders
from farout.diffusion.image_to_image import ImageToImage
from farout.diffusion.model import DiffusionModel
from farout.diffusion.train import build_model
from farout.synthesis.base import SynthesisContext

__all__ = ["check_compatibility"]


def check_compatibility(spec: BenchmarkSpec, sets: ImageSets) -> None:
    """Build every network untrained, and let every method check what it is given.

    Raises FaroutError for networks, images and settings that do not fit together.
    """
    networks: dict[str, DiffusionModel | Classifier] = {
        name: _build_untrained(entry, sets) for name, entry in spec.networks.items()
    }

    def networks_of(entry: DetectorSpec | OutlierSpec) -> tuple[Any, Any]:
        diffusion = None if entry.diffusion is None else networks[entry.diffusion]
        return diffusion, None if entry.classifier is None else networks[entry.classifier]

    for outliers in spec.outliers.values():
        synthesizer, images = outliers.build_synthesizer(), sets.training_images(outliers.source, outliers.limit)
        diffusion, classifier = networks_of(outliers)
        generator = None if diffusion is None else synthesizer.load_diffusion(diffusion, images)
        runtime = spec.runtime.resolve_auto()
        synthesizer.check(
            SynthesisContext.create(images, Path(), outliers.count, spec.seeds[0], runtime, generator, classifier)
        )
    for reconstructions in spec.reconstructions.values():
        model = networks[reconstructions.diffusion]
        assert isinstance(model, DiffusionModel)
        ImageToImage(model, **reconstructions.image_to_image_settings)  # refuses settings out of range
    for detector_spec in spec.detectors.values():
        detector = detector_spec.build_detector()
        if detector.requirements.diffusion != "features":
            detector.check_networks(sets.training_images(None, detector_spec.limit), *networks_of(detector_spec))


def _build_untrained(entry: NetworkSpec, sets: ImageSets) -> DiffusionModel | Classifier:
    """A network with random weights, or the stored one if its folder is given."""
    if entry.folder is not None and entry.kind == "classifier":
        return Classifier.load(entry.folder)
    if entry.folder is not None:
        folder = diffusers_folders.local_folder(entry.folder)
        # an original Stable Diffusion folder is conditioned on the classes of the images
        uses_prompts = diffusers_folders.requires_class_names(folder)
        return DiffusionModel.load(folder, class_names=class_names_of(sets.training_images()) if uses_prompts else None)
    images = sets.training_images(entry.source, entry.limit)
    if isinstance(entry.model, ClassifierConfig):
        return entry.model.build(images, class_names_of(images))
    return build_model(entry.model, entry.model.preprocess(images), class_names=entry.model.class_names(images))
