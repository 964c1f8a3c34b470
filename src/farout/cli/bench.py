"""`farout bench`: many detectors on the same data and networks."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from rich.text import Text

from farout.benchmark.benchmark_plan import BenchmarkJob, plan_benchmark
from farout.benchmark.image_sets import missing_sets
from farout.benchmark.job_graph import FinishedJob, format_duration
from farout.benchmark.result_tables import COST_COLUMNS, list_untested
from farout.benchmark.runner import BenchmarkReport, DryRun, preview_benchmark, run_benchmark, write_report
from farout.benchmark.specification import BenchmarkSpec
from farout.benchmark.yaml_reader import read_benchmark
from farout.cli.flags import format_flags
from farout.cli.tables import new_table, print_table
from farout.cli.terminal import print_text
from farout.core.devices import num_processes
from farout.core.errors import FaroutError

__all__ = ["bench", "show_bench"]

_MAX_COLUMN_WIDTH = 40
"""In characters; the names of sets with many classes are longer."""


def bench(
    preset: str,
    *,
    out: str,
    dry_run: bool = False,
    report_only: bool = False,
    redo: bool = False,
    limit: int | None = None,
    seeds: tuple[int, ...] | None = None,
    hub: bool = False,
    runtime: dict[str, Any],
) -> DryRun | Iterator[FinishedJob | BenchmarkReport]:
    """Fit, score and compare several detectors on the same data and networks.

    Args:
        preset: name of a benchmark, see `farout list presets`, or a YAML file.
        out: folder of all models and results; the same command continues an interrupted run.
        dry_run: print the jobs with their inputs and settings, and exit.
        report_only: write the tables of the finished evaluations, without training or scoring.
        redo: delete the results of jobs whose settings have changed, and of jobs that depend on them, and run these
            again.
        limit: use a seeded random sample of this many images of each scored set; default: the benchmark's number.
        seeds: seeds; everything is run once per seed; default: the benchmark's.
        hub: download sets that are not on this machine from the Hugging Face hub.
        runtime: settings that override those of the benchmark.
    """
    if num_processes() > 1:
        raise FaroutError("bench runs in one process; train large networks separately and give their folders")
    if dry_run and report_only:
        raise FaroutError("--dry-run and --report-only exclude each other; give one of them")
    spec = read_benchmark(preset, limit=limit, seeds=seeds, runtime=runtime)
    plan = plan_benchmark(spec, out, missing_sets(spec, hub=hub))
    if dry_run:
        return preview_benchmark(plan)
    return iter([write_report(plan)]) if report_only else run_benchmark(plan, redo=redo)


def show_bench(result: DryRun | Iterator[FinishedJob | BenchmarkReport]) -> None:
    """Print what a run would do, or the jobs as they finish and the tables at the end."""
    if isinstance(result, DryRun):
        _show_dry_run(result)
        return
    for item in result:
        if isinstance(item, BenchmarkReport):
            _show_report(item)
            continue
        text = "already done" if item.seconds is None else f"{item.seconds:.1f} s"
        if item.seconds is not None and item.seconds_left:
            text += f"; about {format_duration(item.seconds_left)} left"
        print_text(f"[{item.number}/{item.total}] {item.job.name}: {text}", flush=True)


def _show_dry_run(dry_run: DryRun) -> None:
    plan, states = dry_run.plan, dry_run.states
    shared = {job.sources for job in plan.jobs if job.kind == "evaluations"}
    if len(shared) == 1:
        print_text(f"evaluated sources: {', '.join(*shared)}")
    table = new_table()
    table.add_column("job", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("inputs", overflow="fold")
    table.add_column("settings", overflow="fold")
    for job in plan.jobs:
        state = "to do"
        for name, jobs in (("done", states.finished), ("outdated", states.outdated), ("damaged", states.damaged)):
            state = name if job.name in jobs else state
        table.add_row(job.name, state, ", ".join(job.inputs), _describe_settings(plan.spec, job, len(shared) > 1))
    print_table(table)
    print_text(f"{len(plan.jobs)} jobs, {len(plan.jobs) - len(states.finished)} to do")
    for name, reason in states.damaged.items():
        print_text(f"damaged: {name} ({reason}); --redo deletes it and runs it again")
    for name, reason in states.outdated.items():
        print_text(f"outdated: {name} ({reason}); --redo deletes it and runs it again")
    for name in plan.unused:
        print_text(f"unused: {name}")
    for line in list_untested(plan):
        print_text(line)
    if dry_run.obstacle:
        print_text(dry_run.obstacle)


def _describe_settings(spec: BenchmarkSpec, job: BenchmarkJob, show_sources: bool) -> str:
    """The settings of a job that differ from the defaults of its method or configuration, as flags."""
    if job.kind == "evaluations":
        return f"sources: {', '.join(job.sources)}" if show_sources else ""
    if job.baseline_of is not None:
        return f"{job.baseline_of} with random weights"
    entry = spec.section(job.kind)[job.entry]
    named = {
        field.name: getattr(entry, field.name) for field in fields(entry) if getattr(entry, field.name) is not None
    }
    defaults: dict[str, Any] = {field.name: field.default for field in fields(entry)}
    if "arguments" in named:
        method = entry.build_detector() if job.kind == "detectors" else entry.build_synthesizer()
        named |= named.pop("arguments")
        defaults |= type(method)().config
    defaults |= {name: type(value)() for name, value in named.items() if is_dataclass(value)}  # type: ignore[misc]
    first = [str(named.pop(name)) for name in ("kind", "method") if name in named]
    return shlex.join([*first, *_changed_settings(named, defaults)])


def _changed_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if is_dataclass(value) and not isinstance(value, type):
            yield from _changed_settings(vars(value), vars(defaults[name]), f"{prefix}{name}.")
        elif value != defaults.get(name):
            yield from format_flags(f"{prefix}{name}", value)


def _show_report(report: BenchmarkReport) -> None:
    for result_table in report.tables:
        table = new_table(result_table.caption)
        for head in result_table.heads:
            is_cost = head in COST_COLUMNS.values()
            text = head if is_cost else head.replace(" ", "\n")
            table.add_column(text, overflow="fold", no_wrap=is_cost, max_width=_MAX_COLUMN_WIDTH)
        for row in result_table.rows:
            table.add_row(*(Text(cell.text, "bold" if cell.best else "") for cell in row))
        print_table(table)
    for line in list_untested(report.plan):
        print_text(line)
    if report.unfinished:
        print_text(f"{len(report.unfinished)} jobs are not finished yet")
    for path in report.paths:
        print_text(path)
