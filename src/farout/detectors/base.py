"""Detectors as users call them; `interface` defines what a method implements."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from farout.core.errors import FaroutError
from farout.core.names import expand_path, find_path
from farout.core.profiling import count_images, timed
from farout.core.progress import task
from farout.core.remote_files import is_url
from farout.data.image_source import Policy
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.detectors import saving
from farout.detectors.backend_choice import choose_backend
from farout.detectors.calibration import (
    check_fitted,
    compute_p_values,
    flag_outliers,
    score_threshold,
    warn_about_scores,
)
from farout.detectors.cost import Cost, measure_cost
from farout.detectors.interface import DetectorInterface
from farout.detectors.results import Measurements, Scores

__all__ = ["Detector", "Measurements", "Scores", "find_detector", "load"]


class Detector(DetectorInterface):
    """A method that gives every image an OOD score (higher = more anomalous), a p-value and a flag.

    Attributes:
        config: the arguments of the constructor.
        preprocessing: turns an image of any size into a tensor (C, H, W) for the networks.
        diffusion, classifier, features: the networks, None where the method uses none.
        alpha: false-alarm rate of `is_ood`.
        statistics, calibration: measurements of the statistics images and of the calibration images.
        calibration_scores: scores of the calibration images by indicator, sorted.
        provenance: preset, source and sizes of the fit.
    """

    def fit(self, images: Any, diffusion: Any = None, classifier: Any = None, **settings: Any) -> Self:
        """Fit to normal images: train the networks that are required and not given, then statistics and calibration.

        Args:
            images: any image source.
            diffusion: a `DiffusionModel` or its folder; None: one is trained where the method requires it.
            classifier: a `Classifier` or its folder; None: one is trained where the method requires it and the images
                have labels.
            **settings: see `FitSettings`.

        Raises:
            FaroutError: for images or models that do not go together.
        """
        from farout.detectors.fit_settings import FitSettings  # scoring does not import the settings of training
        from farout.detectors.fitting import fit

        fit(self, images, diffusion, classifier, FitSettings(**settings))
        return self

    def score(
        self,
        images: Any,
        *,
        limit: int | None = None,
        policy: Policy = "nan",
        reading: ReadSettings = DEFAULT_READING,
    ) -> Scores:
        """Score every image of a source, in its order.

        Args:
            images: any image source.
            limit: a seeded sample of this many images.
            policy: for an unreadable image: `nan` (a row without score), `skip` (no row) or `raise`.
            reading: how image files are read; without a value range, that of the fitted images is used.
        """
        check_fitted(self)
        source = self.open_images(images, policy=policy, limit=limit, reading=reading)
        choose_backend(self, len(source))
        parts = [Scores.empty(self.calibration_scores)]
        with task("scoring", len(source)) as bar:
            for batch in self.load_batches(source):
                count_images(len(batch.keys))
                if batch.keys:
                    with timed("network"):
                        measurements = self.measure(batch)
                    parts.append(self.score_measurements(measurements))
                bar.advance(len(batch.keys))
        source.warn_about_reading()
        scores = Scores.join(parts)
        warn_about_scores(scores.score, source.name)
        return scores if source.policy == "skip" else scores.reindex(source.keys)

    @timed("statistics")
    def score_measurements(self, measurements: Measurements) -> Scores:
        """Compute scores from measurements; no network runs."""
        check_fitted(self)
        finite = measurements.is_finite().numpy()
        indicators = {}
        for name, value in self.compute_scores(measurements).items():
            score = value.double().numpy()
            indicators[name] = np.where(finite & np.isfinite(score), score, np.nan)
        score = indicators[self.score_name]
        calibration = self.calibration_scores[self.score_name]
        p_value = compute_p_values(score, calibration)
        status = tuple(np.where(np.isnan(score), "not a number", "ok").tolist())
        is_ood = flag_outliers(p_value, self.alpha)
        return Scores(
            keys=measurements.keys,
            score=score,
            p_value=p_value,
            is_ood=is_ood,
            status=status,
            indicators=indicators,
            measurements=measurements,
            calibration=calibration,
            calibration_threshold=score_threshold(calibration, self.alpha),
        )

    def with_scoring(self, **arguments: Any) -> Self:
        """Return a detector with other scoring arguments (see `scoring_arguments`), such as `score`.

        Statistics and calibration are fitted again from the stored measurements; no network runs. Raises FaroutError
        for arguments that change the measurements.
        """
        from farout.detectors.fitting import copy_with_scoring  # scoring does not import the settings of training

        return copy_with_scoring(self, arguments)

    def cost(self) -> Cost:
        """Count network evaluations and multiply-accumulates of one image."""
        return measure_cost(self)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides a score: configuration, networks, statistics and calibration."""
        return saving.compute_fingerprint(self)

    @timed("writing")
    def save(self, folder: str | Path, *, link: Path | None = None) -> None:
        """Write the detector with its networks, measurements and statistics.

        Args:
            folder: a new folder, or that of a detector, which is replaced.
            link: a folder that contains the diffusion model: its path and hash are written instead of a copy.
        """
        saving.save(self, expand_path(folder), link or self.linked_model)


@timed("loading")
def load(folder: str | Path, **runtime: Any) -> Detector:
    """Load a fitted detector; `runtime` overrides device, precision, batch_size, workers or cache.

    Raises StoreError for a folder that is missing, incomplete, altered or of another kind.
    """
    detector: Detector = saving.load(find_detector(folder), runtime)
    return detector


def find_detector(folder: str | Path) -> Path:
    """Return the path of a detector's folder as `find_path` does; raises FaroutError for a URL."""
    if is_url(folder):
        raise FaroutError("the detector is given by a URL; copy its folder to this machine, and give that folder")
    return find_path(folder)
