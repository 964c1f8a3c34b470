"""`farout fit`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from farout.cli.terminal import print_text
from farout.core import store
from farout.core.devices import num_processes
from farout.core.errors import FaroutError, StoreError
from farout.core.names import find_path
from farout.core.profiling import timed
from farout.core.runtime import Runtime
from farout.data.read_settings import ReadSettings
from farout.detectors import DETECTORS
from farout.detectors.base import Detector
from farout.detectors.fit_settings import FitSettings
from farout.detectors.saving import describe_detector
from farout.diffusion.config import DiffusionConfig
from farout.training.checkpoints import discard_checkpoints, training_folder
from farout.training.config import TrainingConfig

__all__ = ["fit", "print_detector"]

logger = logging.getLogger(__name__)


def fit(
    method: str,
    source: str,
    *,
    out: str,
    diffusion: str | None = None,
    classifier: str | None = None,
    link: bool = False,
    preset: str | None = None,
    profile: bool = False,
    arguments: dict[str, Any],
    settings: FitSettings,
    reading: ReadSettings,
    runtime: Runtime,
    model: DiffusionConfig | None = None,
    training: TrainingConfig | None = None,
) -> Detector:
    """Fit a detector to normal images.

    Args:
        method: name of the detector, see `farout list detectors`.
        source: normal images: a named set, folder, glob, file, URL, or hf://owner/name:split.
        out: folder of the detector.
        diffusion: folder of a diffusion model, or hf://owner/name, for methods that use one; default: train one.
        classifier: folder of a classifier, for methods that use one; default: train one, on images with labels.
        link: store the path of the diffusion model instead of a copy.
        preset: preset that `arguments` started from.
        profile: print the seconds of each stage after the run, such as reading, decoding and the network
            (docs/performance.md).
        arguments: settings of the method.
        settings: settings of the fit.
        reading: how image files are read.
        runtime: how networks are run.
        model: settings of the diffusion model that is trained if none is given.
        training: settings of that training.
    """
    if link and (diffusion is None or diffusion.startswith("hf://")):
        raise FaroutError("--link requires --diffusion FOLDER: there is no model folder to link to")
    if num_processes() > 1:
        raise FaroutError("fit runs in one process; to train in several, use `farout train diffusion` first")
    store.check_replaceable(out, "detector")
    if store.kind_of(out) == "detector":
        earlier = store.read_config(out, "detector").get("method", method)
        if earlier != method:
            raise StoreError(f"{out} contains a fitted {earlier} detector; give another folder or remove it")
        logger.warning("%s contains a detector, which is replaced when the new one is fitted", out)
    with timed("loading"):
        detector: Detector = DETECTORS[method].load()(**arguments)
    detector.provenance["preset"] = preset or ""
    checkpoints = settings.checkpoints or training_folder(out)
    settings = replace(
        settings,
        checkpoints=checkpoints,
        runtime=runtime,
        reading=reading,
        diffusion_config=model,
        training=training,
    )
    started = time.perf_counter()
    detector.fit(source, diffusion, classifier, **vars(settings))
    detector.provenance["fit_s"] = round(time.perf_counter() - started, 1)
    detector.save(out, link=find_path(str(diffusion)) if link else None)
    discard_checkpoints(checkpoints, training or TrainingConfig())
    return detector


def print_detector(detector: Detector, arguments: Mapping[str, Any]) -> None:
    """Prints the number of images that the detector was fitted on, its score, its false-alarm rate and its folder."""
    about = describe_detector(detector)
    counts = f"{about['statistics_images']} statistics and {about['calibration_images']} calibration images"
    settings = f"score {detector.score_name}, alpha {detector.alpha}"
    print_text(f"{about['method']} fitted: {counts}, {settings}; written to {arguments['out']}")
