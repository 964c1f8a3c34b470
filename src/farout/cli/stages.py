"""`--profile`: the seconds of each stage of a command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farout.cli.command_parser import ParsedCommand
from farout.cli.tables import new_table, print_table
from farout.cli.terminal import print_text
from farout.core import store
from farout.core.devices import is_main_process
from farout.core.names import expand_path
from farout.core.profiling import STAGES, Profile, record_profile

__all__ = ["print_profile", "run_with_profile"]

_FILE = "profile.json"


def run_with_profile(call: ParsedCommand) -> tuple[Any, Profile | None]:
    """Runs a command; returns its result, and with `--profile` the seconds of each stage."""
    if not call.arguments.get("profile"):
        return call(), None
    with record_profile() as profile:
        result = call()
    return result, profile


def print_profile(profile: Profile, arguments: Mapping[str, Any]) -> None:
    """Prints the stages that took time, and writes them to `profile.json` of a folder of results."""
    if not is_main_process():
        return
    columns = {"main thread": profile.seconds}
    if profile.thread_seconds:
        columns["other threads"] = profile.thread_seconds
    if profile.process_seconds:
        columns["worker processes"] = profile.process_seconds
    table = new_table("seconds by stage")
    table.add_column("stage", no_wrap=True)
    for title in ("main thread", "share", *list(columns)[1:]):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for stage, description in STAGES.items():
        if any(seconds.get(stage) for seconds in columns.values()):
            main, *others = (seconds.get(stage, 0.0) for seconds in columns.values())
            table.add_row(stage, f"{main:.2f}", _share(main, profile), *(f"{s:.2f}" for s in others), description)
    empty = [""] * (len(columns) - 1)
    table.add_row("other", f"{profile.other:.2f}", _share(profile.other, profile), *empty, "everything else")
    table.add_row("total", f"{profile.wall:.2f}", "", *empty, f"after {profile.startup:.1f} CPU seconds of start-up")
    print_table(table)
    if profile.images:
        print_text(f"{profile.images} images measured, {profile.images / profile.wall:.1f} images/s")
    if profile.thread_seconds or profile.process_seconds:
        print_text("Other threads and processes work at the same time as the main thread; their seconds are added up.")
    folder = expand_path(str(arguments["out"])) if arguments.get("out") else None
    if folder is not None and _is_folder_of_results(folder):
        store.write_json(folder / _FILE, profile.to_dict())
        print_text(f"  {folder / _FILE}")


def _share(seconds: float, profile: Profile) -> str:
    return f"{100 * seconds / profile.wall:.0f} %" if profile.wall else ""


def _is_folder_of_results(folder: Path) -> bool:
    """Whether files may be added to a folder: that of a detector contains the hashes of all of its files."""
    return folder.is_dir() and not (folder / store.HASHES_FILE).exists()
