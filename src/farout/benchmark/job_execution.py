"""How each kind of job of a benchmark is executed; all of them continue where an earlier run was interrupted."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from farout.benchmark.benchmark_plan import BenchmarkJob, BenchmarkPlan
from farout.benchmark.error_images import write_error_images
from farout.classifiers.outlier_exposure import Exposure
from farout.classifiers.train import train_classifier
from farout.core import store
from farout.core.errors import ConstantScoresWarning, MisleadingResultWarning
from farout.core.names import find_path
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.detectors.base import Detector, load
from farout.detectors.fit_settings import FitSettings
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.train import train_diffusion
from farout.evaluation.baselines import with_random_weights
from farout.evaluation.evaluate import evaluate, write_table
from farout.evaluation.trivial_baselines import NAME as TRIVIAL
from farout.evaluation.trivial_baselines import TrivialBaselines
from farout.report.outlier_page import write_outlier_page
from farout.synthesis.reconstruct import reconstruct
from farout.training.checkpoints import discard_checkpoints, training_folder
from farout.training.config import TrainingConfig

__all__ = ["execute_job"]

_SPEED_IMAGES, _SPEED_SECONDS = 64, 3.0
"""The speed of a detector is measured on at most so many images and for about so long."""


def execute_job(plan: BenchmarkPlan, job: BenchmarkJob, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Train, generate, fit or evaluate what a job describes; returns what is added to its record.

    Args:
        plan: the benchmark.
        job: one of its jobs.
        earlier: the record of an earlier run of the job, if there was one.
    """
    is_complete = (job.output / "config.json").is_file() and not store.describe_damage(job.output)
    if job.kind in ("networks", "detectors") and is_complete:
        return {}  # complete: the run was killed between writing the folder and writing the record
    if job.kind == "networks":
        _train_network(plan, job)
    elif job.kind == "outliers":
        _synthesize_outliers(plan, job)
    elif job.kind == "reconstructions":
        _reconstruct_images(plan, job)
    elif job.kind == "detectors" and job.baseline_of is not None:
        _fit_random_weights_baseline(plan, job, job.baseline_of)
    elif job.kind == "detectors":
        _fit_detector(plan, job)
    else:
        return _evaluate_detector(plan, job, earlier or {})
    return {}


def _train_network(plan: BenchmarkPlan, job: BenchmarkJob) -> None:
    spec, entry = plan.spec, plan.spec.networks[job.entry]
    images = entry.source or spec.train
    settings: dict[str, Any] = {
        "training": FitSettings(seed=job.seed, runtime=spec.runtime).resolve_training(entry.training),
        "limit": entry.limit or spec.train_limit,
        "alpha": spec.alpha,
        "statistics": spec.statistics,
        "seed": job.seed,
        "resume": True,
    }
    if isinstance(entry.model, DiffusionConfig):
        train_diffusion(images, job.output, model=entry.model, **settings)
        return
    train_classifier(
        images,
        job.output,
        model=entry.model,
        exposure=entry.exposure or Exposure(),
        outliers=_folder_of(plan, "outliers", entry.outliers, job.seed),
        reconstructions=_folder_of(plan, "reconstructions", entry.reconstructions, job.seed),
        **settings,
    )


def _synthesize_outliers(plan: BenchmarkPlan, job: BenchmarkJob) -> None:
    entry = plan.spec.outliers[job.entry]
    images = open_source(entry.source or plan.spec.train, limit=entry.limit or plan.spec.train_limit, seed=job.seed)
    outliers = entry.build_synthesizer().synthesize(
        images,
        job.output,
        count=entry.count,
        diffusion=_folder_of(plan, "networks", entry.diffusion, job.seed),
        classifier=_folder_of(plan, "networks", entry.classifier, job.seed),
        seed=job.seed,
        resume=True,
        runtime=plan.spec.runtime,
    )
    write_outlier_page(outliers, images)


def _reconstruct_images(plan: BenchmarkPlan, job: BenchmarkJob) -> None:
    entry = plan.spec.reconstructions[job.entry]
    reconstruct(
        entry.source or plan.spec.train,
        str(_folder_of(plan, "networks", entry.diffusion, job.seed)),
        job.output,
        limit=entry.limit or plan.spec.train_limit,
        seed=job.seed,
        resume=True,
        runtime=plan.spec.runtime,
        **entry.image_to_image_settings,
    )


def _fit_detector(plan: BenchmarkPlan, job: BenchmarkJob) -> None:
    entry = plan.spec.detectors[job.entry]
    diffusion = _folder_of(plan, "networks", entry.diffusion, job.seed)
    classifier = _folder_of(plan, "networks", entry.classifier, job.seed)
    limit = entry.limit or plan.spec.train_limit
    # a diffusion model on this machine is linked, not copied into the folder of every detector
    link = find_path(diffusion) if diffusion is not None and not diffusion.startswith("hf://") else None
    _fit_and_save(plan, job, entry.build_detector(), (diffusion, classifier), limit, entry.statistics, link)


def _fit_random_weights_baseline(plan: BenchmarkPlan, job: BenchmarkJob, detector: str) -> None:
    entry = plan.spec.detectors[detector]
    fitted = load(plan.job("detectors", detector, job.seed).output, **_runtime_of_scoring(plan))
    baseline, *networks = with_random_weights(fitted)
    baseline.provenance["preset"] = entry.preset or ""
    limits = [plan.spec.baseline_limit, entry.limit or plan.spec.train_limit]
    limit = min((each for each in limits if each is not None), default=None)
    _fit_and_save(plan, job, baseline, networks, limit, entry.statistics)


def _fit_and_save(
    plan: BenchmarkPlan,
    job: BenchmarkJob,
    detector: Detector,
    networks: Any,
    limit: int | None,
    statistics: int | None,
    link: Path | None = None,
) -> None:
    checkpoints, started = training_folder(job.output), time.perf_counter()
    detector.fit(
        plan.spec.train,
        *networks,
        limit=limit,
        statistics=statistics,
        checkpoints=checkpoints,
        resume=True,
        **_fit_settings(plan, job.seed),
    )
    detector.provenance["fit_s"] = round(time.perf_counter() - started, 1)
    detector.save(job.output, link=link)
    discard_checkpoints(checkpoints, TrainingConfig())


def _evaluate_detector(plan: BenchmarkPlan, job: BenchmarkJob, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Score and evaluate; returns the speed of the detector.

    The speed is measured separately, once and in the same way for all detectors: while the sets are scored, features
    may come from the cache.
    """
    spec = plan.spec
    if job.entry == TRIVIAL:
        settings = _fit_settings(plan, job.seed)
        detector: Detector = TrivialBaselines().fit(spec.train, limit=spec.baseline_limit, **settings)
    else:
        detector = load(plan.job("detectors", job.entry, job.seed).output, **_runtime_of_scoring(plan))
    id_source, *ood_sources = job.sources
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings():  # the column `marker` says the same
        warnings.simplefilter("ignore", ConstantScoresWarning)
        warnings.filterwarnings("ignore", ".*is below one half", MisleadingResultWarning)
        evaluation = evaluate(
            detector,
            id_source,
            ood_sources,
            job.output,
            limit=spec.limit,
            standard_baselines=False,
            trivial_baselines=False,
            name=job.entry,
        )
    if detector.heat_maps is not None and job.entry in spec.detectors:
        write_error_images(detector, job.output / "scores", job.sources)
    metrics = evaluation.metrics
    images_per_s = earlier.get("images_per_s")
    if images_per_s is None:
        images = open_source(id_source, limit=_SPEED_IMAGES, seed=detector.seed, policy="nan")
        images_per_s = round(_measure_speed(detector, images), 2)
    metrics["images_per_s"] = images_per_s
    if not torch.cuda.is_available():
        metrics["peak_mib"] = float("nan")  # that of the process includes the jobs before this one
    write_table(metrics, job.output / "metrics.csv")
    return {"images_per_s": images_per_s}


def _measure_speed(detector: Detector, images: ImageSource) -> float:
    """Measured images per second, with features computed and not read from the cache."""
    runtime = detector.runtime
    detector.runtime = replace(runtime, cache=False)
    try:
        count, started = 0, time.perf_counter()
        for batch in detector.load_batches(images):
            detector.measure(batch)
            count += len(batch.keys)
            if time.perf_counter() - started > _SPEED_SECONDS:
                break
        return count / (time.perf_counter() - started)
    finally:
        detector.runtime = runtime


def _folder_of(plan: BenchmarkPlan, section: str, entry: str | None, seed: int) -> str | None:
    """The folder of a named network, outliers or reconstructions: given, or the output of its job."""
    if entry is None:
        return None
    given = plan.spec.networks[entry].folder if section == "networks" else None
    return given or str(plan.job(section, entry, seed).output)


def _fit_settings(plan: BenchmarkPlan, seed: int) -> dict[str, Any]:
    spec = plan.spec
    return {"alpha": spec.alpha, "seed": seed, "protocol": spec.protocol, "runtime": spec.runtime}


def _runtime_of_scoring(plan: BenchmarkPlan) -> dict[str, Any]:
    """The settings of the runtime that do not change results and may differ from those of the fit."""
    return {name: getattr(plan.spec.runtime, name) for name in ("batch_size", "workers", "cache")}
