"""A benchmark from its plan to its tables."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from farout.benchmark.estimate import Estimate, estimates
from farout.benchmark.folder import check_folder, open_folder
from farout.benchmark.jobs import Jobs
from farout.benchmark.layout import Board, boards, latex, markdown
from farout.benchmark.page import write_bench_page
from farout.benchmark.plan import Job, Plan
from farout.benchmark.rehearsal import Rehearsal
from farout.benchmark.sets import Sets, check_present
from farout.benchmark.table import MARKERS, group_means, leads, marked, rated_sides
from farout.core import store
from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.evaluation.evaluate import written
from farout.evaluation.scored_datasets import PAIRED

__all__ = ["Done", "Preview", "Report", "preview", "report", "run_bench"]

_PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Done:
    """A job that is done: number `number` of `total`, in so many seconds; None: it was there."""

    job: Job
    number: int
    total: int
    seconds: float | None


@dataclass(frozen=True)
class Report:
    """The tables that were written; boards: those for readers; missing: jobs that are not done yet."""

    plan: Plan
    metrics: pd.DataFrame
    groups: pd.DataFrame
    boards: tuple[Board, ...]
    missing: tuple[Job, ...]
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Preview:
    """What a plan would do.

    Attributes:
        plan: the jobs.
        estimates: by the id of the job; empty where the benchmark cannot be run here.
        obstacle: why it cannot be run here; empty where it can.
    """

    plan: Plan
    estimates: dict[str, Estimate]
    obstacle: str = ""

    def seconds(self, job: Job) -> float:
        """A rough time; none for a job that is done."""
        return 0.0 if job.done else self.estimates[job.id].seconds


def preview(plan: Plan) -> Preview:
    """What a plan would do here, and about how long it would take; nothing is written.

    Raises FaroutError for networks and images that do not go together, StoreError for a folder of other settings.
    """
    check_folder(plan.out, plan.spec)
    try:
        check_present(plan.spec, plan.absent)
    except FaroutError as error:
        return Preview(plan, {}, obstacle=str(error))
    rehearsal = Rehearsal(plan.spec)
    rehearsal.check()
    return Preview(plan, estimates(plan, rehearsal))


def run_bench(plan: Plan) -> Iterator[Done | Report]:
    """Does what is not done yet, job by job, and writes the tables.

    Raises:
        FaroutError: before any work, for networks and images that do not go together or are not here.
        StoreError: where the folder holds something else, or a benchmark with other settings.
    """
    check_present(plan.spec, plan.absent)
    check_folder(plan.out, plan.spec)
    left = [job for job in plan.jobs if not job.done]
    if left:
        Rehearsal(plan.spec).check()
    open_folder(plan.out, plan.spec)
    jobs = Jobs(plan)
    with task(f"benchmark {plan.spec.name}", len(plan.jobs), unit="jobs", item=None) as bar:
        for number, job in enumerate(plan.jobs, start=1):
            seconds = jobs.do(job) if job in left else None
            bar.advance(note=job.id)
            yield Done(job, number, len(plan.jobs), seconds)
    yield report(plan)


def report(plan: Plan) -> Report:
    """Writes the tables of all that is rated so far; no network runs.

    `metrics.csv` and `metrics.parquet`: all rows; `groups.csv`: means; `rated/*/paired.csv`: who is ahead of whom;
    `results.md`, `results.tex`; `provenance.json`; `page.html`.

    Raises FaroutError where nothing is rated yet; StoreError for a folder of other settings.
    """
    rated = [job for job in plan.rated if job.done]
    if not rated:
        raise FaroutError(f"nothing is evaluated in {plan.out} yet; run the benchmark first")
    open_folder(plan.out, plan.spec)
    sets = Sets(plan.spec)
    facts = _facts(plan, sets)
    opened = {seed: [sets.scored(each, seed) for each in (plan.spec.id, *plan.present)] for seed in plan.spec.seeds}
    sides = [(job, rated_sides(job, opened[job.seed])) for job in rated]
    ahead = leads(sides)
    ahead["group"] = ahead["ood"].map(plan.spec.group)
    metrics = marked(plan, sides, facts, ahead)
    groups = group_means(plan, metrics)
    _write_provenance(plan, facts)
    tables = boards(plan, metrics, groups)
    paths = _write_tables(plan, metrics, groups, tables)
    for job in rated:
        own = ahead[(ahead["first"] == job.name) & (ahead["seed"] == job.seed)]
        written(own[PAIRED], job.folder / "paired.csv")
    missing = tuple(job for job in plan.jobs if not job.done)
    return Report(plan, metrics, groups, tuple(tables), missing, (*paths, write_bench_page(plan.out)))


def _write_tables(plan: Plan, metrics: pd.DataFrame, groups: pd.DataFrame, tables: Sequence[Board]) -> tuple[Path, ...]:
    out = plan.out
    written(metrics, out / "metrics.csv")
    with store.atomic_file(out / "metrics.parquet") as temporary:
        metrics.to_parquet(temporary, index=False)
    written(groups, out / "groups.csv")
    texts = {"results.md": markdown, "results.tex": latex}
    for name, make in texts.items():
        with store.atomic_file(out / name) as temporary:
            temporary.write_text(make(plan, metrics, tables, _machine()), encoding="utf-8")
    names = ("metrics.csv", "metrics.parquet", "groups.csv", *texts, _PROVENANCE)
    return tuple(out / name for name in names)


def _facts(plan: Plan, sets: Sets) -> dict[str, dict[str, Any]]:
    """What is known of every source that is here; what an earlier run found is not looked for again."""
    path = plan.out / _PROVENANCE
    known = store.read_json(path).get("sources", {}) if path.is_file() else {}
    wanted = dict.fromkeys([plan.spec.train, plan.spec.id, *plan.present])
    return {source: known.get(source) or sets.facts(source).to_dict() for source in wanted}


def _write_provenance(plan: Plan, facts: dict[str, dict[str, Any]]) -> None:
    seconds = {job.id: job.record.get("seconds") for job in plan.jobs if job.done}
    content = {
        "bench": plan.spec.name,
        "command": shlex.join(sys.argv),
        "versions": store.versions(),
        "machine": _machine(),
        "seconds": seconds,
        "sources": facts,
        "untested": plan.untested,
        "controls": dict(plan.controls),
        "markers": MARKERS,
        "missing": [job.id for job in plan.jobs if not job.done],
    }
    store.write_json(plan.out / _PROVENANCE, content)


def _machine() -> str:
    """Processor, threads and accelerator in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads{accelerator}, torch {torch.__version__}"
