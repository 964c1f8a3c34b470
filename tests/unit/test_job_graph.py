"""The job graph behind chains and benchmarks: what is run, continued, refused and deleted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from farout.benchmark.job_graph import Job, JobGraph, flatten_settings, format_duration
from farout.core import progress, store
from farout.core.errors import FaroutError, StoreError


def jobs(folder: Path, steps: int = 1, sources: tuple[str, ...] = ("id", "ood")) -> list[Job]:
    """A network, a detector that uses it, its evaluation, and a job that depends on nothing."""
    return [
        Job(name="network", kind="train", output=folder / "network", settings={"steps": steps}),
        Job(name="detector", kind="fit", output=folder / "detector", inputs=("network",)),
        Job(
            name="evaluation",
            kind="evaluate",
            output=folder / "evaluation",
            inputs=("detector",),
            sources=sources,
            completed_by="metrics.csv",
        ),
        Job(name="other", kind="train", output=folder / "other"),
    ]


def run(folder: Path, failing: str = "", **changes: Any) -> list[str]:
    """Run the graph; returns the names of the executed jobs."""
    executed: list[str] = []

    def execute(job: Job, earlier: Mapping[str, Any] | None) -> Mapping[str, Any]:
        executed.append(job.name)
        if job.name == failing:
            raise KeyboardInterrupt
        job.output.mkdir(exist_ok=True)
        if job.completed_by:
            (job.output / job.completed_by).touch()
        return {"runs": (earlier or {}).get("runs", 0) + 1}

    for _ in JobGraph(folder, jobs(folder, **changes)).run("test", execute):
        pass
    return executed


def test_finished_jobs_are_not_run_again(tmp_path: Path) -> None:
    assert run(tmp_path) == ["network", "detector", "evaluation", "other"]
    assert run(tmp_path) == []


def test_damaged_results_are_named_and_run_again_on_request(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "evaluation" / "metrics.csv").write_text("auroc\n1.0\n")
    with pytest.raises(FaroutError, match=r"results of evaluation are damaged: .*metrics\.csv was changed.*--redo"):
        run(tmp_path)
    JobGraph(tmp_path, jobs(tmp_path)).delete_outdated()
    assert run(tmp_path) == ["evaluation"]
    store.write_folder_hashes(tmp_path / "network")
    assert run(tmp_path) == []
    (tmp_path / "network" / "model.safetensors").write_text("added")
    with pytest.raises(FaroutError, match=r"results of network are damaged: .*model\.safetensors was added"):
        run(tmp_path)
    JobGraph(tmp_path, jobs(tmp_path)).delete_outdated()
    assert run(tmp_path) == ["network", "detector", "evaluation"]


@pytest.mark.parametrize(
    "content",
    [{"jobs": []}, {"jobs": {"network": 1}}, {"jobs": {"network": {"settings": {}, "done": True}}}, {"jobs": "x"}],
)
def test_a_record_that_is_none_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    store.write_json(tmp_path / "farout-jobs.json", content)
    with pytest.raises(StoreError, match=r"farout-jobs\.json is not a record of jobs"):
        JobGraph(tmp_path, jobs(tmp_path))


def test_an_interrupted_run_continues_with_the_interrupted_job(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, failing="detector")
    assert run(tmp_path) == ["detector", "evaluation", "other"]


def test_changed_settings_are_refused_or_deleted_with_all_that_depends_on_them(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(FaroutError, match=r"network was run with other settings \(steps: 1 before, 2 now\)"):
        run(tmp_path, steps=2)
    graph = JobGraph(tmp_path, jobs(tmp_path, steps=2))
    assert list(graph.states().outdated) == ["network", "detector", "evaluation"]
    graph.delete_outdated()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["other"]
    assert run(tmp_path, steps=2) == ["network", "detector", "evaluation"]


def test_more_sources_add_to_the_results(tmp_path: Path) -> None:
    run(tmp_path)
    assert run(tmp_path, sources=("id", "ood", "another")) == ["evaluation"]
    assert JobGraph(tmp_path, []).records["evaluation"]["runs"] == 2, "the earlier record is passed on"


def test_a_result_without_its_last_file_is_completed(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "evaluation" / "metrics.csv").unlink()
    assert run(tmp_path) == ["evaluation"]


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "detector").mkdir()
    with pytest.raises(FaroutError, match="was not written by this command"):
        run(tmp_path)


def test_the_time_left_includes_the_rest_of_the_running_job(tmp_path: Path) -> None:
    notes: list[str] = []

    class Display:
        """Keeps the notes of all tasks."""

        def open(self, description: str, total: int | None, unit: str) -> int:
            return 0

        def advance(self, number: int, units: int, note: str, seconds_left: float | None) -> None:
            notes.append(note)

        def close(self, number: int) -> None:
            pass

    def execute(job: Job, earlier: Mapping[str, Any] | None) -> None:
        with progress.task("batches", 10) as bar:
            bar.advance(5)

    graph = JobGraph(tmp_path, jobs(tmp_path))
    graph.records["a"] = {"kind": "train", "seconds": 100.0}
    graph.records["b"] = {"kind": "fit", "seconds": 10.0}
    assert graph.estimate_seconds(graph.jobs) == pytest.approx(100 + 10 + 55 + 100), "unknown kinds: mean of all"
    with progress.show(Display()):
        next(graph.run("test", execute))
    assert "about 3 min left" in notes


def test_settings_and_durations() -> None:
    assert flatten_settings({"a": 1, "b": {"c": {"d": 2}, "e": []}}) == {"a": 1, "b.c.d": 2, "b.e": []}
    durations = [format_duration(seconds) for seconds in (4.2, 300, 9000, 300000)]
    assert durations == ["4 s", "5 min", "2.5 h", "3.5 days"]
