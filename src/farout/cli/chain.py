"""`farout chain`: several commands in a row, from a YAML file; finished steps are not repeated."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farout.benchmark.job_graph import Job, JobGraph
from farout.cli import output
from farout.cli.stages import print_profile, run_with_profile
from farout.cli.steps import read_steps
from farout.cli.terminal import print_text
from farout.core.devices import num_processes
from farout.core.errors import FaroutError
from farout.core.names import expand_path

__all__ = ["chain"]


def chain(yaml: str, *, out: str, redo: bool = False, dry_run: bool = False) -> None:
    """Run several commands from one YAML file.

    The file has a list of `steps`, each a command with its settings as in a file for its `--config`, and may have a
    `source` for all steps that do not name one. The `out` of a step is the name of its folder in the folder of the
    chain; a later step that gives this name as an input reads that folder. To refer to a path of the same name, write
    ./name.

    All steps are parsed before the first one runs. When the chain is called again, finished steps are skipped and an
    interrupted step continues if its command can. Changes inside image folders and models from outside the chain are
    not noticed.

    Args:
        yaml: YAML file with `steps:`, a list of commands with their settings, such as `- fit semantic: {source:
            images/, out: detector}`; or the name of a built-in chain, see `farout list presets`.
        out: folder of the chain; each step writes to a folder of its own in it.
        redo: delete the results of steps whose settings have changed, and of steps that depend on them, and run these
            again.
        dry_run: print the steps as commands, and exit.

    Raises FaroutError that names the step: see `read_steps`, and for results that have other settings.
    """
    steps, folder = {step.out: step for step in read_steps(yaml)}, expand_path(out)
    if dry_run:
        print_text(*(shlex.join(["farout", *step.command_line(folder)]) for step in steps.values()), sep="\n")
        return
    if num_processes() > 1:
        raise FaroutError("a chain runs in one process; to train in several, run the commands that --dry-run prints")
    graph = JobGraph(folder, [step.job(folder) for step in steps.values()])
    if redo:
        graph.delete_outdated()

    def run_step(job: Job, earlier: Mapping[str, Any] | None) -> None:
        step = steps[job.name]
        print_text(f"[{step.number}/{len(steps)}] {step.name}: writing {job.output}", flush=True)
        try:
            resume = {"resume": True} if earlier is not None and "resume" in step.settings else {}
            call = step.parse(folder, **resume)
            result, profile = run_with_profile(call)
            output.print_result(step.command, result, call.arguments)
            if profile is not None:
                print_profile(profile, call.arguments)
        except FaroutError as error:
            raise FaroutError(f"{step}: {error}") from error

    with output.progress():
        for finished in graph.run(f"chain {Path(yaml).stem}", run_step):
            if finished.seconds is None:
                job = finished.job
                print_text(f"[{finished.number}/{finished.total}] {steps[job.name].name}: already done in {job.output}")
    print_text("results:", *(f"  {job.output}  ({steps[job.name].name})" for job in graph.jobs), sep="\n")
