"""What a benchmark has to do, in an order in which each job finds what it needs; what is named once is made once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farout.benchmark.reading import random_name
from farout.benchmark.spec import SECTIONS, DetectorSpec, Spec
from farout.benchmark.typed import plain
from farout.core import store
from farout.core.errors import FaroutError
from farout.evaluation.baselines import TRIVIAL

__all__ = ["RECORD", "Job", "Plan", "make_plan"]

RECORD = "job.json"
"""Written into a job's folder when it is done."""
_RATED = "rated"


@dataclass(frozen=True)
class Job:
    """One thing to do.

    Attributes:
        room: `networks`, `outliers`, `reconstructions`, `detectors` or `rated`.
        name: within the room.
        seed: of all that is drawn.
        folder: of what comes of it, `room/name-seed` in the benchmark's folder.
        needs: the jobs that come before, by their `id`.
        control_of: of a control with random weights, the detector that it is made of.
        sources: what is scored, the in-distribution source first; of `rated` only.
    """

    room: str
    name: str
    seed: int
    folder: Path
    needs: tuple[str, ...] = ()
    control_of: str | None = None
    sources: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Its folder within the benchmark's."""
        return f"{self.room}/{self.name}-{self.seed}"

    @property
    def record(self) -> dict[str, Any]:
        """What was written when it was done; empty before."""
        path = self.folder / RECORD
        return store.read_json(path) if path.is_file() else {}

    @property
    def done(self) -> bool:
        """Whether it is done, with the same sources. Without its `metrics.csv` a rating is done again, from scores."""
        rated = self.room != _RATED or (self.folder / "metrics.csv").is_file()
        return rated and bool(self.record) and self.record["sources"] == list(self.sources)


@dataclass(frozen=True)
class Plan:
    """All jobs of a benchmark.

    Attributes:
        spec: what is compared.
        out: the benchmark's folder.
        jobs: in order.
        absent: sources that cannot be had here, and why.
        controls: by detector, the name of its control with random weights; detectors whose controls would be the same
            share one.
        unused: what the specification names and no detector needs, as section and name.
    """

    spec: Spec
    out: Path
    jobs: tuple[Job, ...]
    absent: Mapping[str, str] = field(default_factory=dict)
    controls: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def present(self) -> tuple[str, ...]:
        """The out-of-distribution sources that are scored."""
        return tuple(source for source in self.spec.sources if source not in self.absent)

    @property
    def rated(self) -> list[Job]:
        """The jobs that leave scores and metrics."""
        return [job for job in self.jobs if job.room == _RATED]

    @property
    def untested(self) -> dict[str, str]:
        """The out-of-distribution sources that are not scored, and why."""
        return {source: self.absent[source] for source in self.spec.sources if source in self.absent}

    def job(self, room: str, name: str, seed: int) -> Job:
        """One of the jobs."""
        wanted = f"{room}/{name}-{seed}"
        return next(job for job in self.jobs if job.id == wanted)


def make_plan(spec: Spec, out: str | Path, absent: Mapping[str, str] | None = None) -> Plan:
    """The jobs of a specification: for each seed, each detector with all that it needs before it, then the controls.

    Raises FaroutError for networks and outliers that need each other in a circle.
    """
    absent = dict(absent or {})
    present = tuple(source for source in spec.sources if source not in absent)
    controls = _controls(spec)
    jobs: dict[str, Job] = {}
    for seed in spec.seeds:
        _Walk(spec, Path(out), seed, (spec.id, *present), jobs).all(controls)
    used = {(job.room, job.name) for job in jobs.values()}
    unused = [f"{section}.{name}" for section in SECTIONS for name in spec.section(section)]
    unused = [each for each in unused if tuple(each.split(".", 1)) not in used]
    return Plan(spec, Path(out), tuple(jobs.values()), absent, controls, tuple(unused))


class _Walk:
    """Adds the jobs of one seed, each after those that it needs."""

    def __init__(self, spec: Spec, out: Path, seed: int, sources: tuple[str, ...], jobs: dict[str, Job]) -> None:
        self.spec, self.out, self.seed, self.sources, self.jobs = spec, out, seed, sources, jobs
        self.open: list[str] = []

    def all(self, controls: Mapping[str, str]) -> None:
        """Every detector, the trivial controls, and the controls with random weights, each once."""
        for name in self.spec.detectors:
            self.rated(name, self.named("detectors", name))
        if self.spec.trivial:
            self.add(_RATED, TRIVIAL, (), sources=self.sources)
        for name, control in controls.items():
            if random_name(name) == control:
                fitted = self.named("detectors", name)
                self.rated(control, self.add("detectors", control, (fitted,), control_of=name))

    def rated(self, name: str, fitted: str) -> None:
        """Scores and rates a fitted detector."""
        self.add(_RATED, name, (fitted,), sources=self.sources)

    def named(self, section: str, name: str) -> str:
        """What an entry of the specification asks for, after all that it needs; its id."""
        if f"{section}.{name}" in self.open:
            circle = " -> ".join([*self.open[self.open.index(f"{section}.{name}") :], f"{section}.{name}"])
            raise FaroutError(f"these depend on each other: {circle}; remove one of these dependencies")
        self.open.append(f"{section}.{name}")
        needs = tuple(self.named(*needed) for needed in self.spec.section(section)[name].needs())
        self.open.pop()
        return self.add(section, name, needs)

    def add(self, room: str, name: str, needs: tuple[str, ...], **more: Any) -> str:
        """A job, unless it is there; its id."""
        job = Job(room, name, self.seed, self.out / room / f"{name}-{self.seed}", needs, **more)
        self.jobs.setdefault(job.id, job)
        return job.id


def _controls(spec: Spec) -> dict[str, str]:
    """The control with random weights of each detector that has a network; of several that would be the same, one."""
    found: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, entry in spec.detectors.items() if spec.random_weights else ():
        key = _control_key(spec, name, entry)
        if key is not None:
            found[name] = first.setdefault(key, random_name(name))
    return found


def _control_key(spec: Spec, name: str, entry: DetectorSpec) -> str | None:
    """What decides the control of a detector; None where there is none: nothing in it is learnt by a network."""
    made = entry.made()
    base: list[Any] = [entry.method, plain(entry.arguments), entry.limit, entry.statistics]
    if entry.diffusion is not None:
        # weights are drawn with the deviations of the trained ones
        return json.dumps([*base, entry.diffusion, entry.classifier])
    if "diffusion" in made.needs:
        return json.dumps([*base, name])
    if entry.classifier is not None:
        network = spec.networks[entry.classifier]
        extra = network.exposure is not None and network.exposure.loss == "k+1"
        return json.dumps([*base, plain(network.model), network.source, network.limit, network.folder, extra])
    return json.dumps(base) if "features" in made.needs and entry.arguments.get("weights") != "random" else None
