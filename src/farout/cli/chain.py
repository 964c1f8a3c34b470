"""Several commands one after the other, as a YAML file says; what is done is not done again."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farout.cli import output
from farout.cli.steps import Step, read_steps
from farout.core import store
from farout.core.devices import num_processes
from farout.core.errors import FaroutError, StoreError
from farout.training.checkpoints import training_folder

__all__ = ["RECORD", "chain"]

RECORD = "farout-chain.json"
"""In the folder of a chain: of every step that was begun its settings, and whether it is done."""

_FREE = frozenset({"resume", "batch_size", "workers", "training.workers", "training.tensorboard", "cache"})
"""Settings that do not change what is made."""
_TOLD = 4


def chain(yaml: str, *, out: str, redo: bool = False, dry_run: bool = False) -> None:
    """Run several commands from one YAML file.

    The file has a list of `steps`, each a command with its settings as in a file for its `--config`, and may have a
    `source` for all steps that name none. The `out` of a step is the name of its folder within the chain's; later steps
    name it where they go on from what is there. A path of the same name is written ./name.

    All steps are parsed before the first is run. Called again, a step that is done is passed over, and an interrupted
    one goes on where its command can. Images and models that are not the chain's own are not compared for this.

    Args:
        yaml: YAML file with `steps:`, a list of commands with their settings, such as `- fit semantic: {source: good/,
            out: detector}`; or the name of a built-in chain, see `farout list presets`.
        out: folder of the chain; each step writes to a folder of its own in it.
        redo: delete the results of steps whose settings have changed, and of steps that depend on them, and run these
            again.
        dry_run: print the steps as commands, and exit.

    Raises FaroutError that names the step: see `read_steps`, and for a step that was made with other settings.
    """
    steps, folder = read_steps(yaml), Path(out)
    if dry_run:
        print(*(shlex.join(["farout", *step.words(folder)]) for step in steps), sep="\n")
        return
    if num_processes() > 1:
        raise FaroutError("a chain runs in one process; to train in several, run the commands that --dry-run prints")
    record = _Record(folder)
    plan = record.plan(steps)
    if plan.stale and not redo:
        raise FaroutError(
            f"{plan.stale[0]} was run with other settings ({plan.why[0]}); give --redo to delete "
            f"{', '.join(step.out for step in plan.stale)} in {folder} and run these steps again, or another --out"
        )
    record.forget(plan.stale)
    for step in steps:
        done = ": already done in" if step.out in plan.done else ": writing"
        print(f"[{step.number}/{len(steps)}] {step.name}{done} {folder / step.out}", flush=True)
        if step.out not in plan.done:
            _run(step, record)
    print("results:", *(f"  {folder / step.out}  ({step.name})" for step in steps), sep="\n")


def _run(step: Step, record: _Record) -> None:
    """Does a step, or what is left of it."""
    again = ["--resume"] if step.out in record.steps and "resume" in step.settings else []
    try:
        call = step.call(record.folder, *again)
        record.note(step, done=False)
        with output.progress():
            output.show(step.command, call())
    except FaroutError as error:
        raise FaroutError(f"{step}: {error}") from error
    record.note(step, done=True)


@dataclass(frozen=True)
class _Plan:
    """done: the names of the steps that are. stale: those that were made, or begun, with other settings, or go on from
    what is made anew; why: what each of them has to do with it. All others are to be done.
    """

    done: set[str]
    stale: list[Step]
    why: list[str]


class _Record:
    """What is known of the steps in the folder of a chain."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / RECORD
        self.steps: dict[str, Any] = {}
        if self.path.is_file():
            self.steps = store.read_json(self.path).get("steps", {})
            if not isinstance(self.steps, dict):
                raise StoreError(f"{self.path} is not the record of a chain; give another --out")

    def plan(self, steps: Sequence[Step]) -> _Plan:
        """What is done and what is not. Raises FaroutError where something stands that no chain has made."""
        plan, anew = _Plan(set(), [], []), set[str]()
        for step in steps:
            there, known = self._there(step), self.steps.get(step.out)
            if there and known is None:
                raise FaroutError(f"{step}: {there[0]} exists and was not written by a chain; give another --out")
            if known is not None and known["done"] and self.folder / step.out in there and not self._stale(step, anew):
                plan.done.add(step.out)
                continue
            if there and self._stale(step, anew):
                plan.stale.append(step)
                plan.why.append(self._stale(step, anew))
            anew.add(step.out)
        return plan

    def _there(self, step: Step) -> list[Path]:
        """What a step has made so far: its folder, and that of a training's checkpoints."""
        place = self.folder / step.out
        return [path for path in (place, training_folder(place)) if path.exists()]

    def _stale(self, step: Step, anew: set[str]) -> str:
        """Why what a step has made is not what it makes now; empty where it is."""
        differing = list(_differences(self.steps[step.out], step))
        more = f"; and {len(differing) - _TOLD} more" if len(differing) > _TOLD else ""
        from_anew = [f"{name} is run again" for name in sorted(step.uses & anew)]
        return "; ".join(differing[:_TOLD]) + more if differing else "; ".join(from_anew)

    def forget(self, steps: Sequence[Step]) -> None:
        """Removes what steps have made."""
        for step in steps:
            for path in self._there(step):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            del self.steps[step.out]
        if steps:
            self._write()

    def note(self, step: Step, *, done: bool) -> None:
        """Writes down that a step is begun, or done."""
        self.steps[step.out] = {"step": step.name, "done": done, "settings": step.settings}
        self._write()

    def _write(self) -> None:
        store.write_json(self.path, {"versions": store.versions(), "steps": self.steps})


def _differences(known: Mapping[str, Any], step: Step) -> Iterator[str]:
    """The settings that are others than those that a step was made with."""
    if known["step"] != step.name:
        yield f"{known['step']} before, {step.name} now"
        return
    before, now = known["settings"], step.settings
    for name in [*now, *(name for name in before if name not in now)]:
        if name not in _FREE and before.get(name) != now.get(name):
            yield f"{name}: {before.get(name)} before, {now.get(name)} now"
