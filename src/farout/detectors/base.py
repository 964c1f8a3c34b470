"""Detectors: what users call. What a method implements is in `interface`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from farout.core import store
from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.image_source import ImageSource, Policy
from farout.data.sources import open_source
from farout.detectors import saving
from farout.detectors.calibration import calibrate, check_scores, is_out, p_values
from farout.detectors.cost import Cost, measure_cost
from farout.detectors.interface import DetectorInterface
from farout.detectors.results import Measurements, Scores

if TYPE_CHECKING:
    from farout.diffusion.model import DiffusionModel
    from farout.features.feature_diffusion import FeatureDiffusion

__all__ = ["Cost", "Detector", "Measurements", "Runtime", "Scores", "load"]


class Detector(DetectorInterface):
    """A method that gives every image an OOD score (higher = more anomalous), a p-value and a flag."""

    def fit(self, images: Any, diffusion: Any = None, classifier: Any = None, **settings: Any) -> Self:
        """Fits to normal images: uses given models, trains what is missing, then statistics and calibration.

        Args:
            images: any image source.
            diffusion: a `DiffusionModel` or its folder; None: one is trained where the method needs it.
            classifier: a `Classifier` or its folder; None: one is trained where the method needs it and the images
                have labels.
            **settings: see `FitSettings`.

        Raises:
            FaroutError: for images or models that do not go together.
        """
        from farout.detectors.fit_settings import FitSettings  # not needed to score
        from farout.detectors.fitting import fit

        return fit(self, images, diffusion, classifier, FitSettings(**settings))

    def score(self, images: Any, *, limit: int | None = None, policy: Policy = "nan") -> Scores:
        """Scores every image of a source, in its order.

        Args:
            images: any image source.
            limit: a seeded sample of this many images.
            policy: for an unreadable image: `nan` (a row without score), `skip` (no row) or `raise`.
        """
        self.check_fitted()
        source, size, parts = self.open(images, limit=limit, policy=policy), self.batch_size, []
        with task("scoring", len(source)) as bar:
            for position, batch in zip(range(0, len(source), size), self.batches(source), strict=True):
                keys = source.keys[position : position + size]
                measured = self.measure(batch) if batch.keys else None
                parts.append(self.rescore_all(keys, measured, skip=source.policy == "skip"))
                bar.advance(len(keys))
        scores = Scores.join(parts)
        check_scores(scores.score[np.array(scores.status) != "unreadable"], source.name)
        return scores

    def open(self, images: Any, *, limit: int | None = None, policy: Policy = "nan") -> ImageSource:
        """The source to be scored; an unreadable image gets a row without score."""
        return open_source(images, policy=policy, limit=limit, seed=self.seed)

    def rescore(self, measurements: Measurements) -> Scores:
        """Scores from stored measurements; no network runs."""
        self.check_fitted()
        finite = measurements.finite().numpy()
        computed = {name: value.double().numpy() for name, value in self.compute_scores(measurements).items()}
        indicators = {name: np.where(finite & np.isfinite(v), v, np.nan) for name, v in computed.items()}
        score = indicators[self.score_name]
        p = p_values(score, self.calibration_scores[self.score_name])
        status = tuple("ok" if good else "not a number" for good in np.isfinite(score))
        return Scores(measurements.keys, score, p, is_out(p, self.alpha), status, indicators, measurements)

    def rescore_all(self, keys: tuple[str, ...], measurements: Measurements | None, *, skip: bool) -> Scores:
        """Scores of `keys`; those without measurements could not be read: they are left out (`skip`), or get a row
        without score, which is never normal.
        """
        scores = None if measurements is None else self.rescore(measurements)
        if scores is not None and (skip or scores.keys == keys):
            return scores
        return Scores.with_gaps(() if skip else keys, scores, list(self.calibration_scores))

    def reconfigured(self, **choices: Any) -> Self:
        """A fitted detector with other choices (score, levels to use, …), refitted and recalibrated from the stored
        measurements; no network runs.

        Raises FaroutError for arguments that decide what is measured.
        """
        wrong = sorted(set(choices) - self.choices)
        if wrong:
            hint = f"choices are {', '.join(sorted(self.choices))}; for others fit again"
            raise FaroutError(f"{', '.join(wrong)} cannot be changed after the fact; {hint}")
        self.check_fitted()
        twin = type(self)(**{**self.config, **choices})
        twin.features, twin.classifier = self.features, self.classifier
        for name in (
            *("preprocessing", "alpha", "seed", "provenance", "statistics"),
            *("statistics_hashes", "calibration_hashes", "link"),
        ):
            setattr(twin, name, getattr(self, name))
        twin.use(self.diffusion, self.runtime)
        twin.restore(self.state())
        twin.fit_statistics(self.statistics)
        calibrate(twin, self.calibration)
        return twin

    def train(self, images: ImageSource, settings: Any) -> DiffusionModel | FeatureDiffusion:
        """The diffusion model that a method needs and was not given, trained on `images`."""
        from farout.detectors.network_training import train_missing_diffusion

        return train_missing_diffusion(self, images, settings)

    def cost(self) -> Cost:
        """Network evaluations and multiply-accumulates of one image, counted on one grey image."""
        return measure_cost(self)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides a score: configuration, fitted arrays, calibration, models."""
        plain = {"config": self.config, "seed": self.seed, "preprocessing": self.preprocessing.to_dict()}
        for name in ("diffusion", "features", "classifier"):
            network = getattr(self, name)
            plain[name] = network.content_hash if network is not None else ""
        plain["alpha"] = self.alpha
        arrays = {**self.state(), **{f"calibration.{name}": v for name, v in self.calibration_scores.items()}}
        fitted = store.hash_tensors({name: torch.as_tensor(np.ascontiguousarray(v)) for name, v in arrays.items()})
        return hashlib.sha256((json.dumps(plain, sort_keys=True, default=list) + fitted).encode()).hexdigest()

    def save(self, folder: str | Path, *, link: Path | None = None) -> None:
        """Writes the detector with its models, measurements and calibration.

        `link`: a folder that has the diffusion model already; its absolute and relative path and its hash are written
        instead of a copy.
        """
        saving.save(self, Path(folder), link or self.link)


def load(folder: str | Path, **runtime: Any) -> Detector:
    """Loads a fitted detector; `runtime` overrides device, precision, batch_size, workers or cache.

    Raises StoreError for a folder that is missing, incomplete, altered or of another kind.
    """
    detector: Detector = saving.load(Path(folder), runtime)
    return detector
