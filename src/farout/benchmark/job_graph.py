"""The job graph behind `farout chain` and `farout bench`: each job runs once, after the jobs whose results it reads."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import BaseModel

from farout.core import progress, store
from farout.core.errors import FaroutError, StoreError
from farout.core.files import hash_file
from farout.core.names import find_path
from farout.core.schema import check_content
from farout.data.sources import parse_source
from farout.training.checkpoints import training_folder

__all__ = ["RECORD_FILE", "FinishedJob", "Job", "JobGraph", "JobStates", "flatten_settings", "format_duration"]

RECORD_FILE = "farout-jobs.json"
"""In the folder of a job graph: the settings of every job that was started, and whether it is finished."""

_SHOWN_DIFFERENCES = 4
_PATH_SETTINGS = frozenset(
    {
        "source",
        "generated",
        "train",
        "id",
        "ood",
        "baseline_images",
        "outliers",
        "reconstructions",
        "scores",
        "detector",
    }
    | {"model", "diffusion", "classifier", "weights", "folder"}
)
"""Settings whose value may be an image source, a file or a folder."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A piece of work whose result is a folder or a file.

    Attributes:
        name: unique within the graph.
        kind: jobs of one kind take similar time.
        output: the folder or file that the job writes.
        settings: everything that decides the result, as JSON values; other settings make the result outdated.
        inputs: names of the jobs whose results this job reads.
        sources: image sets whose scores the job collects. Unlike settings they may change: the job is then run again
            and keeps the scores that exist.
        completed_by: the file in `output` that the job writes last; None: `output` appears only when it is complete,
            or the command itself can resume.
        title: the name in messages; default: `name`.
    """

    name: str
    kind: str
    output: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    completed_by: str | None = None
    title: str = ""

    def __str__(self) -> str:
        return self.title or self.name

    @property
    def written_paths(self) -> list[Path]:
        """What the job has written so far: its output, and the checkpoints of an interrupted training."""
        return [path for path in (self.output, training_folder(self.output)) if path.exists()]


@dataclass(frozen=True)
class JobStates:
    """Which jobs of a graph are finished, and which have results that do not fit the present settings.

    Attributes:
        finished: names of jobs that need not be run.
        outdated: name of the job -> reason. All other jobs are run for the first time, or resumed.
        damaged: name of the job whose results were changed after they were written -> which file.
    """

    finished: frozenset[str]
    outdated: Mapping[str, str]
    damaged: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FinishedJob:
    """Job number `number` of `total` is finished.

    Attributes:
        seconds: duration; None: the job was finished by an earlier run.
        seconds_left: estimated duration of the jobs after it, from the jobs finished so far; None: nothing is known.
    """

    job: Job
    number: int
    total: int
    seconds: float | None
    seconds_left: float | None


class JobGraph:
    """Jobs in an order in which each comes after its inputs, and the record of what has been run in a folder.

    Args:
        folder: contains the results of all jobs and the record.
        jobs: each after its inputs.

    Raises StoreError for a file of the record's name that is not a record.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.folder, self.jobs = folder, tuple(jobs)
        self.records: dict[str, dict[str, Any]] = {}
        path = folder / RECORD_FILE
        if path.is_file():
            content = store.read_json(path)
            check_content(content, _RecordContent, f"{path} is not a record of jobs; give another folder: it")
            self.records = content.get("jobs", {})

    def states(self) -> JobStates:
        """Compare the results in the folder with the jobs.

        Raises FaroutError for a result that the record does not mention: it was written by something else.
        """
        finished: set[str] = set()
        outdated: dict[str, str] = {}
        damaged: dict[str, str] = {}
        for job in self.jobs:
            record, written = self.records.get(job.name), job.written_paths
            if record is None:
                if written:
                    raise FaroutError(
                        f"{job}: {written[0]} exists and was not written by this command; give another --out"
                    )
                continue
            rerun_inputs = [name for name in job.inputs if name not in finished]
            differences = _describe_differences(record["settings"], job.settings)
            reason = differences or "; ".join(f"{name} is run again" for name in rerun_inputs)
            complete = job.output / job.completed_by if job.completed_by else job.output
            if written and reason:
                outdated[job.name] = reason
            elif record["done"] and complete.exists() and record["sources"] == list(job.sources):
                damage = _describe_damage(complete, record.get("sha256")) or store.describe_damage(job.output)
                if damage:
                    damaged[job.name] = damage
                elif _has_intact_scores(job.output):  # damaged scores are computed again when the job is run again
                    finished.add(job.name)
        return JobStates(frozenset(finished), outdated, damaged)

    def check(self) -> JobStates:
        """As `states`; raises FaroutError that lists what differs where results are outdated."""
        states = self.states()
        if states.damaged:
            first, reason = next(iter(states.damaged.items()))
            raise FaroutError(f"the results of {first} are damaged: {reason}; give --redo to run it again")
        if states.outdated:
            first, reason = next(iter(states.outdated.items()))
            titles = {job.name: str(job) for job in self.jobs}
            raise FaroutError(
                f"{titles[first]} was run with other settings ({reason}); give --redo to delete "
                f"{', '.join(states.outdated)} in {self.folder} and run these jobs again, or another --out"
            )
        return states

    def delete_outdated(self) -> None:
        """Delete the results that do not fit the present settings, and those that were computed from them."""
        states = self.states()
        outdated = {**states.outdated, **states.damaged}
        for job in self.jobs:
            if job.name in outdated:
                for path in job.written_paths:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                del self.records[job.name]
        if outdated:
            self._write_records()

    def run(
        self, title: str, execute: Callable[[Job, Mapping[str, Any] | None], Mapping[str, Any] | None]
    ) -> Iterator[FinishedJob]:
        """Run every job that is not finished, in order; an interrupted run continues when it is called again.

        Args:
            title: of the progress bar.
            execute: runs a job, given the record of an earlier, interrupted or outdated run of it (None: first run).
                What it returns is added to the record.

        Raises FaroutError for outdated results, see `check`, and what `execute` raises.
        """
        finished = self.check().finished
        with progress.task(title, len(self.jobs), unit="jobs", item=None) as bar:
            for number, job in enumerate(self.jobs, start=1):
                seconds = None
                if job.name not in finished:
                    earlier, started = self.records.get(job.name), time.perf_counter()
                    settings = {name: self._to_recorded(name, value) for name, value in job.settings.items()}
                    record = {"settings": settings, "sources": list(job.sources), "kind": job.kind}
                    self._record(job, {**(earlier or {}), **record, "done": False})
                    waiting = [other for other in self.jobs[number:] if other.name not in finished]
                    with progress.show(_TimeLeft(bar, progress.current_display(), self.estimate_seconds(waiting))):
                        result = execute(job, earlier) or {}
                    seconds = round(time.perf_counter() - started, 1)
                    sha256 = _hash_output(job.output / job.completed_by if job.completed_by else job.output)
                    self._record(job, {**record, **result, "seconds": seconds, "sha256": sha256, "done": True})
                bar.advance(note=job.name)
                waiting = [other for other in self.jobs[number:] if other.name not in finished]
                yield FinishedJob(job, number, len(self.jobs), seconds, self.estimate_seconds(waiting))

    def _to_recorded(self, name: str, value: Any) -> Any:
        """The value of a setting as it is recorded: that of a path does not depend on the working directory."""
        is_result = isinstance(value, str) and re.split(r"[/\\@]", value)[0] in {job.name for job in self.jobs}
        return _absolute_source(value) if name.rpartition(".")[2] in _PATH_SETTINGS and not is_result else value

    def _record(self, job: Job, record: dict[str, Any]) -> None:
        self.records[job.name] = record
        self._write_records()

    def _write_records(self) -> None:
        store.write_json(self.folder / RECORD_FILE, {"versions": store.versions(), "jobs": self.records})

    def estimate_seconds(self, jobs: Sequence[Job]) -> float | None:
        """Mean duration of finished jobs of the same kind, or of all kinds, summed over `jobs`."""
        durations = [(each["kind"], each["seconds"]) for each in self.records.values() if each.get("seconds")]
        if not durations:
            return None if jobs else 0.0
        overall = mean(seconds for _, seconds in durations)
        by_kind = {kind: mean(each for other, each in durations if other == kind) for kind, _ in durations}
        return sum(by_kind.get(job.kind, overall) for job in jobs)


def _has_intact_scores(output: Path) -> bool:
    if not any(output.rglob("manifest.json")):
        return True
    from farout.scoring.folder import has_intact_scores  # loads torch, which chains without scores do not need

    return has_intact_scores(output)


def _hash_output(path: Path) -> str | None:
    """SHA-256 of a file that completes a job; None for a folder, whose own list of hashes is checked."""
    return hash_file(path) if path.is_file() else None


def _describe_damage(path: Path, sha256: str | None) -> str:
    """How the file that completes a job differs from what was written; "" if it does not."""
    try:
        if sha256 is not None:
            store.check_file(path, sha256)
    except StoreError as error:
        return str(error)
    return ""


class _JobContent(BaseModel):
    """What is read of the record of a job; kinds of jobs have further entries."""

    settings: dict[str, Any]
    sources: list[str]
    done: bool
    kind: str | None = None
    seconds: float | None = None
    sha256: str | None = None


class _RecordContent(BaseModel):
    """What is read of the record of a job graph."""

    jobs: dict[str, _JobContent] = {}


class _TimeLeft:
    """Passes the progress of a running job on and notes on the graph's bar how much time is left for all jobs."""

    def __init__(self, bar: progress.Task, display: progress.ProgressDisplay, seconds_after: float | None) -> None:
        self.bar, self.display, self.seconds_after = bar, display, seconds_after

    def open(self, description: str, total: int | None, unit: str) -> int:
        return self.display.open(description, total, unit)

    def advance(self, number: int, units: int, note: str, seconds_left: float | None) -> None:
        self.display.advance(number, units, note, seconds_left)
        if seconds_left is not None and self.seconds_after is not None:
            self.bar.advance(0, note=f"about {format_duration(seconds_left + self.seconds_after)} left")

    def close(self, number: int) -> None:
        self.display.close(number)


def format_duration(seconds: float) -> str:
    """A duration in seconds, minutes, hours or days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with keys such as `training.steps`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= (
            flatten_settings(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
    return flat


def _are_equal(before: Any, now: Any) -> bool:
    """Whether two values of a setting are equal, or are ways to write the same source or path."""
    if isinstance(before, list | tuple) and isinstance(now, list | tuple) and len(before) == len(now):
        return all(_are_equal(*pair) for pair in zip(before, now))
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return bool(before == now)
    return _absolute_source(before) == _absolute_source(now)


def _absolute_source(value: Any) -> Any:
    """A source or path that exists, in the form that is equal for all ways to write it; other values unchanged."""
    if isinstance(value, list | tuple):
        return [_absolute_source(each) for each in value]
    try:
        spec = parse_source(value) if isinstance(value, str) else None
    except FaroutError:  # another text
        return value
    if spec is None or spec.kind not in ("path", "url"):
        return value
    return spec.canonical if spec.kind == "url" or os.path.exists(find_path(spec.location)) else value


def _describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in dict.fromkeys([*now, *before]) if not _are_equal(before.get(name), now.get(name))]
    listed = [f"{name}: {before.get(name)} before, {now.get(name)} now" for name in names[:_SHOWN_DIFFERENCES]]
    more = len(names) - len(listed)
    return "; ".join([*listed, *([f"and {more} more"] if more else [])])
