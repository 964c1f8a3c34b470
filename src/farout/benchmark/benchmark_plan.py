"""Expand the specification of a benchmark into a job graph; a shared entry becomes one job per seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farout.benchmark.job_graph import Job, JobGraph, flatten_settings
from farout.benchmark.specification import SECTIONS, BenchmarkSpec, DetectorSpec
from farout.benchmark.validation import to_plain_values
from farout.benchmark.yaml_reader import random_weights_name
from farout.core.errors import FaroutError
from farout.core.names import expand_path
from farout.evaluation.trivial_baselines import NAME as TRIVIAL

__all__ = ["BenchmarkJob", "BenchmarkPlan", "plan_benchmark"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkJob(Job):
    """A job of a benchmark; `kind` is `networks`, `outliers`, `reconstructions`, `detectors` or `evaluations`.

    Attributes:
        entry: name of the network, outliers, reconstructions or detector.
        seed: of all random numbers.
        baseline_of: the detector whose random-weights baseline is fitted; None: another job.
    """

    entry: str
    seed: int
    baseline_of: str | None = None


@dataclass(frozen=True)
class BenchmarkPlan:
    """All jobs of a benchmark.

    Attributes:
        spec: the specification.
        out: folder of the benchmark.
        jobs: each after its inputs.
        missing: sources that are not available, with the reason.
        random_weights: the random-weights baseline of each detector, by name; detectors whose baselines would be equal
            share one.
        unused: entries that no detector uses, as `section.name`.
    """

    spec: BenchmarkSpec
    out: Path
    jobs: tuple[BenchmarkJob, ...]
    missing: Mapping[str, str]
    random_weights: Mapping[str, str]
    unused: tuple[str, ...]

    @property
    def graph(self) -> JobGraph:
        """The jobs with the record of what is finished in the folder."""
        return JobGraph(self.out, self.jobs)

    @property
    def scored_ood_sources(self) -> tuple[str, ...]:
        """The out-of-distribution sources that are available."""
        return tuple(source for source in self.spec.ood_sources if source not in self.missing)

    @property
    def untested(self) -> dict[str, str]:
        """The out-of-distribution sources that are not available, with the reason."""
        return {source: self.missing[source] for source in self.spec.ood_sources if source in self.missing}

    @property
    def evaluations(self) -> list[BenchmarkJob]:
        """The jobs that write scores and metrics."""
        return [job for job in self.jobs if job.kind == "evaluations"]

    def job(self, kind: str, entry: str, seed: int) -> BenchmarkJob:
        """The job of an entry."""
        return next(job for job in self.jobs if (job.kind, job.entry, job.seed) == (kind, entry, seed))


def plan_benchmark(spec: BenchmarkSpec, out: str | Path, missing: Mapping[str, str] | None = None) -> BenchmarkPlan:
    """The jobs of a specification: per seed, each detector after everything it uses, then the baselines.

    Args:
        spec: the specification.
        out: folder of the benchmark.
        missing: sources that are not available, with the reason.

    Raises FaroutError for networks and outliers that depend on each other in a circle.
    """
    missing = dict(missing or {})
    ood_sources = tuple(source for source in spec.ood_sources if source not in missing)
    baselines = _random_weights_baselines(spec)
    jobs: dict[str, BenchmarkJob] = {}
    for seed in spec.seeds:
        _add_jobs_of_seed(jobs, spec, expand_path(out), seed, ood_sources, baselines)
    used = {f"{job.kind}.{job.entry}" for job in jobs.values()}
    used |= {f"networks.{name}" for name, network in spec.networks.items() if network.folder is not None}
    named = [f"{section}.{name}" for section in SECTIONS for name in spec.section(section)]
    unused = tuple(key for key in named if key not in used)
    return BenchmarkPlan(spec, expand_path(out), tuple(jobs.values()), missing, baselines, unused)


def _add_jobs_of_seed(
    jobs: dict[str, BenchmarkJob],
    spec: BenchmarkSpec,
    out: Path,
    seed: int,
    ood_sources: tuple[str, ...],
    baselines: Mapping[str, str],
) -> None:
    runtime = {"device": spec.runtime.device, "precision": spec.runtime.precision}
    fitting = {"train": spec.train, "protocol": spec.protocol, "alpha": spec.alpha, **runtime}

    def add_job(kind: str, entry: str, settings: Mapping[str, Any], inputs: tuple[str, ...], **more: Any) -> str:
        name = f"{kind}/{entry}-{seed}"
        if name not in jobs:
            plain = to_plain_values({**settings, "seed": seed})
            output = out / kind / f"{entry}-{seed}"
            jobs[name] = BenchmarkJob(
                name=name, kind=kind, output=output, settings=plain, inputs=inputs, entry=entry, seed=seed, **more
            )
        return name

    def add_entry(section: str, entry: str, path: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Add the job of an entry after those of its dependencies; returns its name (none for an existing folder)."""
        key = f"{section}.{entry}"
        if key in path:
            circle = " -> ".join([*path[path.index(key) :], key])
            raise FaroutError(f"these depend on each other: {circle}; remove one of these dependencies")
        entry_spec = spec.section(section)[entry]
        if getattr(entry_spec, "folder", None) is not None:
            return ()
        inputs: tuple[str, ...] = ()
        for other_section, other in entry_spec.dependencies:
            inputs += add_entry(other_section, other, (*path, key))
        defaults = {**fitting, "statistics": spec.statistics, "train_limit": spec.train_limit}
        own = {name: value for name, value in to_plain_values(entry_spec).items() if value is not None}
        return (add_job(section, entry, {**defaults, **flatten_settings(own)}, inputs),)

    def add_evaluation(name: str, settings: Mapping[str, Any], inputs: tuple[str, ...]) -> None:
        scoring = {"id": spec.id, "limit": spec.limit, **settings}
        add_job("evaluations", name, scoring, inputs, sources=(spec.id, *ood_sources), completed_by="metrics.csv")

    for name in spec.detectors:
        add_evaluation(name, {}, add_entry("detectors", name))
    limits = {"baseline_limit": spec.baseline_limit, "train_limit": spec.train_limit}
    if spec.trivial_baselines:
        add_evaluation(TRIVIAL, {**fitting, **limits}, ())
    for name, baseline in baselines.items():
        if random_weights_name(name) == baseline:
            settings, detector = {**fitting, **limits, "weights": "random"}, f"detectors/{name}-{seed}"
            fitted = add_job("detectors", baseline, settings, (detector,), baseline_of=name)
            add_evaluation(baseline, {}, (fitted,))


def _random_weights_baselines(spec: BenchmarkSpec) -> dict[str, str]:
    """The random-weights baseline of each detector that has a network; equal baselines are evaluated once."""
    baselines: dict[str, str] = {}
    first_with: dict[str, str] = {}
    for name, entry in spec.detectors.items() if spec.random_weights_baselines else ():
        key = _random_weights_key(spec, name, entry)
        if key is not None:
            baselines[name] = first_with.setdefault(key, random_weights_name(name))
    return baselines


def _random_weights_key(spec: BenchmarkSpec, name: str, entry: DetectorSpec) -> str | None:
    """Equal for detectors whose random-weights baselines are equal; None if the detector has no trained network."""
    detector = entry.build_detector()
    requirements = detector.requirements
    if detector.parts:
        return None  # networks of several kinds: each part has its own baseline
    base: list[Any] = [entry.method, to_plain_values(entry.arguments), entry.limit, entry.statistics]
    if entry.diffusion is not None:
        # random weights are drawn with the standard deviations of the trained ones
        return json.dumps([*base, entry.diffusion, entry.classifier])
    if requirements.diffusion is not None:
        return json.dumps([*base, name])
    if entry.classifier is not None:
        network = spec.networks[entry.classifier]
        has_extra_class = network.exposure is not None and network.exposure.loss == "k+1"
        architecture = to_plain_values(network.model)
        return json.dumps([*base, architecture, network.source, network.limit, network.folder, has_extra_class])
    return json.dumps(base) if requirements.backbone and entry.arguments.get("weights") != "random" else None
