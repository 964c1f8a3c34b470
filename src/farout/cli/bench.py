"""`farout bench`: one plan for many detectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from farout.benchmark.estimate import RULE
from farout.benchmark.layout import COSTS, untested
from farout.benchmark.plan import Job, make_plan
from farout.benchmark.reading import read_spec
from farout.benchmark.run import Done, Preview, Report, preview, report, run_bench
from farout.benchmark.sets import absent_sets
from farout.cli.tables import new_table, print_table
from farout.core.devices import num_processes
from farout.core.errors import FaroutError

__all__ = ["bench", "show_bench"]

_WIDEST = 40
"""Characters of a column; the names of sets with many classes are longer."""


def bench(
    preset: str,
    *,
    out: str,
    dry_run: bool = False,
    report_only: bool = False,
    limit: int | None = None,
    seeds: tuple[int, ...] | None = None,
    hub: bool = False,
    runtime: dict[str, Any],
) -> Preview | Iterator[Done | Report]:
    """Fit, score and compare several detectors on the same data and networks.

    Args:
        preset: name of a benchmark, see `farout list presets`, or a YAML file.
        out: folder of all models and results; the same command continues an interrupted run.
        dry_run: print the jobs and their estimated time, and exit.
        report_only: write the tables of the finished evaluations, without training or scoring.
        limit: use a seeded random sample of this many images of each scored set; default: the benchmark's number.
        seeds: seeds; everything is run once per seed; default: the benchmark's.
        hub: download sets that are not on this machine from the Hugging Face hub.
        runtime: settings that override those of the benchmark.
    """
    if num_processes() > 1:
        raise FaroutError("bench runs in one process; train large networks separately and give their folders")
    if dry_run and report_only:
        raise FaroutError("--dry-run and --report-only exclude each other; give one of them")
    spec = read_spec(preset, limit=limit, seeds=seeds, runtime=runtime)
    plan = make_plan(spec, out, absent_sets(spec, hub=hub))
    if dry_run:
        return preview(plan)
    return iter([report(plan)]) if report_only else run_bench(plan)


def show_bench(result: Preview | Iterator[Done | Report]) -> None:
    """Prints a plan, or jobs as they are done and the tables at the end."""
    if isinstance(result, Preview):
        _plan(result)
        return
    for step in result:
        if isinstance(step, Done):
            told = "already done" if step.seconds is None else f"{step.seconds:.1f} s"
            print(f"[{step.number}/{step.total}] {step.job.id}: {told}", flush=True)
        else:
            _report(step)


def _plan(seen: Preview) -> None:
    table = new_table()
    table.add_column("job", overflow="fold")
    for head in ("network evaluations", "GMACs", "estimated time"):
        table.add_column(head, no_wrap=True, justify="right")
    for job in seen.plan.jobs:
        table.add_row(job.id, *_estimate(seen, job))
    print_table(table)
    left = [job for job in seen.plan.jobs if not job.done]
    print(f"{len(seen.plan.jobs)} jobs, {len(left)} to do")
    if not seen.obstacle:
        rows, seconds = sum(seen.estimates[job.id].rows for job in left), sum(map(seen.seconds, left))
        print(f"{rows:,.0f} network evaluations, about {_duration(seconds)}; {RULE}")
    for name in seen.plan.unused:
        print(f"unused: {name}")
    for line in untested(seen.plan):
        print(line)
    if seen.obstacle:
        print(seen.obstacle)


def _estimate(seen: Preview, job: Job) -> tuple[str, str, str]:
    if job.done:
        return "", "", "done"
    if seen.obstacle:
        return "", "", "?"
    found = seen.estimates[job.id]
    return f"{found.rows:,.0f}", f"{found.gmacs:,.0f}", _duration(seen.seconds(job))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


def _report(done: Report) -> None:
    for board in done.boards:
        table = new_table(board.caption)
        for head in board.heads:
            short = head in COSTS.values()
            told = head if short else head.replace(" ", "\n")
            table.add_column(told, overflow="fold", no_wrap=short, max_width=_WIDEST)
        for row in board.rows:
            table.add_row(*(Text(cell.text, "bold" if cell.best else "") for cell in row))
        print_table(table)
    for line in untested(done.plan):
        print(line)
    if done.missing:
        print(f"{len(done.missing)} jobs are not done yet")
    for path in done.paths:
        print(path)
