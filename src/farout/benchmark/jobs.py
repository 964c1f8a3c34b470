"""How each kind of job is done; all of them go on where an earlier run was interrupted."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from farout.benchmark.pictures import write_pictures
from farout.benchmark.plan import RECORD, Job, Plan
from farout.benchmark.spec import DetectorSpec, NetworkSpec
from farout.classifiers.train import train_classifier
from farout.core import store
from farout.core.errors import ConstantScoresWarning, TrapWarning
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.detectors.base import Detector, load
from farout.detectors.fit_settings import FitSettings
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.train import train_diffusion
from farout.evaluation.baselines import TRIVIAL, TrivialControls
from farout.evaluation.comparison import Beside, random_twin
from farout.evaluation.evaluate import evaluate_detector, written
from farout.report.outlier_page import write_outlier_page
from farout.synthesis.reconstruct import reconstruct
from farout.training.checkpoints import discard_checkpoints, training_folder
from farout.training.config import TrainingConfig

__all__ = ["Jobs"]

_ALONE = Beside(companions=False, trivial=False)
_SPEED_IMAGES, _SPEED_S = 64, 3.0
"""Images that a detector's speed is measured on at most, and for about how long."""


class Jobs:
    """Does the jobs of a plan, one after the other."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.spec = plan, plan.spec

    def do(self, job: Job) -> float | None:
        """Does a job and writes its record; returns the seconds that it took, None where its result stood there."""
        kinds: dict[str, Callable[[Job], dict[str, float] | None]] = {
            "networks": self._network,
            "outliers": self._outliers,
            "reconstructions": self._reconstructions,
            "detectors": self._detector,
            "rated": self._rated,
        }
        whole = job.room in ("networks", "detectors") and (job.folder / "config.json").is_file()
        started = time.perf_counter()
        # folders of networks and detectors appear when they are finished
        found = None if whole else kinds[job.room](job)
        seconds = None if whole else round(time.perf_counter() - started, 1)
        about = {"job": job.id, "seconds": seconds, "sources": list(job.sources), "versions": store.versions()}
        store.write_json(job.folder / RECORD, {**about, **(found or {})})
        return seconds

    def _path(self, section: str, name: str | None, seed: int) -> str | None:
        """The folder of what an entry of the specification names."""
        if name is None:
            return None
        given = self.spec.networks[name].folder if section == "networks" else None
        return given or str(self.plan.job(section, name, seed).folder)

    # -- networks and images -------------------------------------------------------------------------------------

    def _network(self, job: Job) -> None:
        entry, spec = self.spec.networks[job.name], self.spec
        if entry.folder is not None:
            return
        images = entry.source or spec.train
        common: dict[str, Any] = {
            "training": FitSettings(seed=job.seed, runtime=spec.runtime).resolve_training(entry.training),
            "limit": entry.limit or spec.train_limit,
            "alpha": spec.alpha,
            "statistics": spec.statistics,
            "seed": job.seed,
            "resume": True,
        }
        if isinstance(entry.model, DiffusionConfig):
            train_diffusion(images, job.folder, model=entry.model, **common)
        else:
            train_classifier(images, job.folder, model=entry.model, **self._beside(entry, job.seed), **common)

    def _beside(self, entry: NetworkSpec, seed: int) -> dict[str, Any]:
        """What a classifier learns from beside its images."""
        names = {"outliers": entry.outliers, "reconstructions": entry.reconstructions}
        return {"exposure": entry.exposure, **{key: self._path(key, name, seed) for key, name in names.items()}}

    def _outliers(self, job: Job) -> None:
        entry = self.spec.outliers[job.name]
        limit = entry.limit or self.spec.train_limit
        images = open_source(entry.source or self.spec.train, limit=limit, seed=job.seed)
        made = entry.made().synthesize(
            images,
            job.folder,
            count=entry.count,
            diffusion=self._path("networks", entry.diffusion, job.seed),
            classifier=self._path("networks", entry.classifier, job.seed),
            seed=job.seed,
            resume=True,
            runtime=self.spec.runtime,
        )
        write_outlier_page(made, images)

    def _reconstructions(self, job: Job) -> None:
        entry = self.spec.reconstructions[job.name]
        reconstruct(
            entry.source or self.spec.train,
            str(self._path("networks", entry.diffusion, job.seed)),
            job.folder,
            limit=entry.limit or self.spec.train_limit,
            seed=job.seed,
            resume=True,
            runtime=self.spec.runtime,
            **entry.trip,
        )

    # -- detectors -----------------------------------------------------------------------------------------------

    def _detector(self, job: Job) -> None:
        if job.control_of is not None:
            self._control(job, job.control_of)
            return
        entry = self.spec.detectors[job.name]
        diffusion = self._path("networks", entry.diffusion, job.seed)
        classifier = self._path("networks", entry.classifier, job.seed)
        link = Path(diffusion) if diffusion is not None and not diffusion.startswith("hf://") else None
        self._fit(entry.made(), entry, job, entry.limit or self.spec.train_limit, (diffusion, classifier), link)

    def _control(self, job: Job, of: str) -> None:
        """The same method with random weights, fitted on fewer images."""
        entry = self.spec.detectors[of]
        twin, *networks = random_twin(load(self.plan.job("detectors", of, job.seed).folder, **self._runtime))
        twin.provenance["preset"] = entry.preset or ""
        limits = (self.spec.control_limit, entry.limit or self.spec.train_limit)
        limit = min((each for each in limits if each is not None), default=None)
        self._fit(twin, entry, job, limit, networks)

    def _fit(
        self,
        made: Detector,
        entry: DetectorSpec,
        job: Job,
        limit: int | None,
        networks: Any,
        link: Path | None = None,
    ) -> None:
        checkpoints = training_folder(job.folder)
        about = {"statistics": entry.statistics, "checkpoints": checkpoints, "resume": True, **self._settings(job.seed)}
        started = time.perf_counter()
        made.fit(self.spec.train, *networks, limit=limit, **about)
        made.provenance["fit_s"] = round(time.perf_counter() - started, 1)
        made.save(job.folder, link=link)
        discard_checkpoints(checkpoints, TrainingConfig())

    def _settings(self, seed: int) -> dict[str, Any]:
        spec = self.spec
        return {"alpha": spec.alpha, "seed": seed, "protocol": spec.protocol, "runtime": spec.runtime}

    @property
    def _runtime(self) -> dict[str, Any]:
        """What of the runtime never matters to results, and so may differ from the fitted one."""
        return {name: getattr(self.spec.runtime, name) for name in ("batch_size", "workers", "cache")}

    # -- rating --------------------------------------------------------------------------------------------------

    def _rated(self, job: Job) -> dict[str, float]:
        """Scores and rates; the speed is measured apart, once and alike for all, for features may be in the cache."""
        if job.name == TRIVIAL:
            limit = self.spec.control_limit
            detector: Detector = TrivialControls().fit(self.spec.train, limit=limit, **self._settings(job.seed))
        else:
            detector = load(self.plan.job("detectors", job.name, job.seed).folder, **self._runtime)
        inside, *outside = job.sources
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        told: dict[str, Any] = {"limit": self.spec.limit, "name": job.name}
        with warnings.catch_warnings():  # the column `marker` says these
            warnings.simplefilter("ignore", ConstantScoresWarning)
            warnings.filterwarnings("ignore", ".*is below one half", TrapWarning)
            table = evaluate_detector(detector, inside, outside, job.folder, beside=_ALONE, **told)
        if detector.makes_maps and job.name in self.spec.detectors:
            write_pictures(detector, job.folder / "scores", job.sources)
        speed = job.record.get("images_per_s")
        if speed is None:
            speed = round(_images_per_s(detector, detector.open(inside, limit=_SPEED_IMAGES)), 2)
        table["images_per_s"] = speed
        if not torch.cuda.is_available():
            table["peak_mib"] = float("nan")  # of the process, which has done other jobs before
        written(table, job.folder / "metrics.csv")
        return {"images_per_s": speed}


def _images_per_s(detector: Detector, source: ImageSource) -> float:
    """Images measured in a second, on a few in-distribution images, without features from the cache."""
    kept, detector.runtime = detector.runtime, replace(detector.runtime, cache=False)
    try:
        count, started = 0, time.perf_counter()
        for batch in detector.batches(source):
            detector.measure(batch)
            count += len(batch.keys)
            if time.perf_counter() - started > _SPEED_S:
                break
        return count / (time.perf_counter() - started)
    finally:
        detector.runtime = kept
