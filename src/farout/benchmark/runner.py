"""Run a benchmark from its plan to its tables."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from farout.benchmark.benchmark_plan import BenchmarkJob, BenchmarkPlan
from farout.benchmark.compatibility import check_compatibility
from farout.benchmark.image_sets import ImageSets, check_required_sets
from farout.benchmark.job_execution import execute_job
from farout.benchmark.job_graph import FinishedJob, Job, JobStates
from farout.benchmark.metrics import (
    MARKERS,
    collect_metrics,
    mean_by_group,
    paired_differences,
    read_scored_datasets,
)
from farout.benchmark.page import write_benchmark_page
from farout.benchmark.result_tables import ResultTable, make_tables, to_latex, to_markdown
from farout.benchmark.yaml_reader import to_yaml
from farout.core import store
from farout.core.errors import FaroutError, StoreError
from farout.core.schema import check_content
from farout.evaluation.evaluate import write_table
from farout.evaluation.scored_datasets import DIFFERENCE_COLUMNS

__all__ = ["BenchmarkReport", "DryRun", "preview_benchmark", "run_benchmark", "write_report"]

_SPEC_FILE = "bench.yaml"
_PROVENANCE_FILE = "provenance.json"


@dataclass(frozen=True)
class BenchmarkReport:
    """The tables of the finished evaluations.

    Attributes:
        plan: the benchmark.
        metrics: a row per detector, indicator, set and seed.
        groups: means over sets and seeds.
        tables: for readers.
        unfinished: jobs that are not finished yet.
        paths: the files that were written.
    """

    plan: BenchmarkPlan
    metrics: pd.DataFrame
    groups: pd.DataFrame
    tables: tuple[ResultTable, ...]
    unfinished: tuple[Job, ...]
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        plan: the benchmark.
        states: which jobs are finished or outdated.
        obstacle: why the benchmark cannot be run on this machine; empty if it can.
    """

    plan: BenchmarkPlan
    states: JobStates
    obstacle: str = ""


def preview_benchmark(plan: BenchmarkPlan) -> DryRun:
    """Check a benchmark and report which jobs a run would execute; nothing is written.

    Raises FaroutError for networks and images that do not fit together, StoreError for a folder of something else.
    """
    _check_folder(plan)
    states = plan.graph.states()
    try:
        check_required_sets(plan.spec, plan.missing)
    except FaroutError as error:
        return DryRun(plan, states, obstacle=str(error))
    check_compatibility(plan.spec, ImageSets(plan.spec))
    return DryRun(plan, states)


def run_benchmark(plan: BenchmarkPlan, *, redo: bool = False) -> Iterator[FinishedJob | BenchmarkReport]:
    """Execute the jobs that are not finished, one by one, and write the tables.

    Args:
        plan: the benchmark.
        redo: delete results that were computed with other settings, instead of refusing them.

    Raises:
        FaroutError: before any work, for networks and images that do not fit together or are not available, and for
            results with other settings.
        StoreError: if the folder contains something else.
    """
    check_required_sets(plan.spec, plan.missing)
    _check_folder(plan)
    graph = plan.graph
    if redo:
        graph.delete_outdated()
    jobs = {job.name: job for job in plan.jobs}
    if jobs.keys() - graph.check().finished:
        check_compatibility(plan.spec, ImageSets(plan.spec))
    _write_spec(plan)

    def execute(job: Job, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
        return execute_job(plan, jobs[job.name], earlier)

    yield from graph.run(f"benchmark {plan.spec.name}", execute)
    yield write_report(plan)


def write_report(plan: BenchmarkPlan) -> BenchmarkReport:
    """Write the tables of all finished evaluations; no network runs.

    `metrics.csv` and `metrics.parquet`: all rows; `groups.csv`: means; `evaluations/*/differences.csv`: paired
    differences to the other detectors; `results.md`, `results.tex`; `provenance.json`; `page.html`.

    Raises FaroutError if nothing is evaluated yet, and for results with other settings; StoreError if the folder
    contains something else.
    """
    _check_folder(plan)
    finished = plan.graph.check().finished
    evaluations = [job for job in plan.evaluations if job.name in finished]
    if not evaluations:
        raise FaroutError(f"nothing is evaluated in {plan.out} yet; run the benchmark first")
    _write_spec(plan)
    sets = ImageSets(plan.spec)
    facts = _collect_facts(plan, sets)
    sources = (plan.spec.id, *plan.scored_ood_sources)
    opened = {seed: [sets.scored_images(source, seed) for source in sources] for seed in plan.spec.seeds}
    scored = [(job, read_scored_datasets(job, opened[job.seed])) for job in evaluations]

    differences = paired_differences(scored)
    differences["ood_group"] = differences["ood"].map(plan.spec.group_of)
    metrics = collect_metrics(plan, scored, facts, differences)
    groups = mean_by_group(plan, metrics)
    tables = make_tables(plan, metrics, groups)
    unfinished = tuple(job for job in plan.jobs if job.name not in finished)
    _write_provenance(plan, facts, unfinished)
    paths = _write_tables(plan, metrics, groups, tables)
    for job in evaluations:
        of_job = differences[(differences["first"] == job.entry) & (differences["seed"] == job.seed)]
        write_table(of_job[DIFFERENCE_COLUMNS], job.output / "differences.csv")
    page = write_benchmark_page(plan.out)
    return BenchmarkReport(plan, metrics, groups, tuple(tables), unfinished, (*paths, page))


def _check_folder(plan: BenchmarkPlan) -> None:
    """Raise StoreError if the folder contains something else than a benchmark."""
    out = plan.out
    if out.exists() and not (out / _SPEC_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} exists and is not the folder of a benchmark; give another one")


def _write_spec(plan: BenchmarkPlan) -> None:
    with store.atomic_file(plan.out / _SPEC_FILE) as temporary:
        temporary.write_text(to_yaml(plan.spec), encoding="utf-8")


def _write_tables(
    plan: BenchmarkPlan, metrics: pd.DataFrame, groups: pd.DataFrame, tables: Sequence[ResultTable]
) -> tuple[Path, ...]:
    out = plan.out
    write_table(metrics, out / "metrics.csv")
    with store.atomic_file(out / "metrics.parquet") as temporary, temporary.open("wb") as file:
        metrics.to_parquet(file, index=False)  # pyarrow opens only paths in UTF-8
    write_table(groups, out / "groups.csv")
    texts = {
        "results.md": to_markdown(plan, metrics, tables, _describe_machine()),
        "results.tex": to_latex(plan, metrics, tables, _describe_machine()),
    }
    for name, text in texts.items():
        with store.atomic_file(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    names = ("metrics.csv", "metrics.parquet", "groups.csv", *texts, _PROVENANCE_FILE)
    return tuple(out / name for name in names)


def _collect_facts(plan: BenchmarkPlan, sets: ImageSets) -> dict[str, dict[str, Any]]:
    """Facts about every available source; those that an earlier run has written are not computed again."""
    path = plan.out / _PROVENANCE_FILE
    content = store.read_json(path) if path.is_file() else {}
    check_content(content.get("sources", {}), dict[str, dict[str, Any]], f"{path}: sources")
    known = content.get("sources", {})
    sources = dict.fromkeys([plan.spec.train, plan.spec.id, *plan.scored_ood_sources])
    return {source: known.get(source) or sets.facts(source).to_dict() for source in sources}


def _write_provenance(
    plan: BenchmarkPlan, facts: dict[str, dict[str, Any]], unfinished: Sequence[BenchmarkJob]
) -> None:
    records = plan.graph.records
    content = {
        "bench": plan.spec.name,
        "command": shlex.join(sys.argv),
        "versions": store.versions(),
        "machine": _describe_machine(),
        "seconds": {name: record["seconds"] for name, record in records.items() if "seconds" in record},
        "sources": facts,
        "untested": plan.untested,
        "random_weights": dict(plan.random_weights),
        "markers": MARKERS,
        "unfinished": [job.name for job in unfinished],
    }
    store.write_json(plan.out / _PROVENANCE_FILE, content)


def _describe_machine() -> str:
    """Processor, number of threads and accelerator."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads{accelerator}, torch {torch.__version__}"
