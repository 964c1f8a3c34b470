"""`farout score`."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any, Literal

from farout.cli.output import print_existing
from farout.cli.terminal import print_text
from farout.core.devices import is_main_process
from farout.core.errors import FaroutError, UsageError
from farout.core.names import expand_path
from farout.data.image_source import Policy
from farout.data.read_settings import ReadSettings
from farout.detectors.base import load
from farout.report.overlays import FOLDER, check_has_maps, write_overlays
from farout.scoring.folder import ScoredFolder, score_folder
from farout.scoring.ray_session import RaySettings
from farout.scoring.scorer import Scorer
from farout.scoring.watch import FolderWatcher, WatchedFolder

__all__ = ["check_settings", "print_scored_folder", "score"]

_SHOWN_UNREADABLE = 5
"""Number of unreadable images that are named on the terminal."""


def score(
    detector: str,
    source: str,
    *,
    out: str,
    limit: int | None = None,
    policy: Policy = "nan",
    top_images: int = 24,
    fdr: float | None = None,
    maps: bool = False,
    processes: int = 1,
    watch: bool = False,
    interval: float = 2.0,
    engine: Literal["local", "ray"] = "local",
    ray: RaySettings,
    profile: bool = False,
    reading: ReadSettings,
    runtime: dict[str, Any],
) -> ScoredFolder | WatchedFolder:
    """Score images with a detector: table, measurements and HTML report.

    Args:
        detector: folder of a fitted detector.
        source: images: a named set, folder, glob, file, URL, or hf://owner/name:split.
        out: folder of the results; an interrupted run continues there. With the engine ray also a URL.
        limit: use a seeded random sample of this many images; default: all.
        policy: what to do with an unreadable image: `nan` (list it without a score), `skip` it, or `raise` an error.
        top_images: number of images with the highest scores in the report.
        fdr: add a table column that selects images by Benjamini-Hochberg at this false discovery rate.
        processes: share the images among this many processes on this machine, which use its GPUs in turn. The processes
            of `torchrun` and `accelerate launch` share them, too.
        maps: also write a heat map of every image to OUT/maps (patches, reconstruction and denoising only).
        watch: score the files of a folder as they arrive, until the command is interrupted (docs/serve.md).
        interval: with --watch, the seconds between two listings of the folder; a file is read when it has not changed
            for as long.
        engine: what computes the scores: `local` (this machine) or `ray` (the machines of a Ray cluster).
        ray: how the engine ray distributes the work.
        profile: print the seconds of each stage after the run, such as reading, decoding and the network
            (docs/performance.md).
        reading: how image files are read.
        runtime: runtime settings that replace those of the fit.
    """
    if watch:
        # files arrive once, so that stored features would hardly be used again
        scorer = Scorer(detector, reading=reading, **{"cache": False, **runtime})
        with FolderWatcher(scorer, source, out, settle=interval) as watcher, suppress(KeyboardInterrupt):
            watcher.run(interval)
        return watcher.result
    if engine == "ray":
        if maps:
            raise FaroutError("--maps requires --engine local: heat maps are written by one process")
        if processes > 1:
            raise FaroutError(
                "--processes belongs to --engine local; give the number of Ray workers instead (--ray-workers)"
            )
        from farout.scoring.ray_engine import score_with_ray

        return score_with_ray(
            detector,
            source,
            out,
            ray=ray,
            limit=limit,
            policy=policy,
            top_images=top_images,
            fdr=fdr,
            reading=reading,
            **runtime,
        )
    if ray != RaySettings():
        raise FaroutError("settings of Ray workers were given, which --engine local does not use; add --engine ray")
    fitted = load(detector, **runtime)
    if maps:
        check_has_maps(fitted)
    scored = score_folder(
        fitted,
        source,
        out,
        limit=limit,
        policy=policy,
        top_images=top_images,
        fdr=fdr,
        reading=reading,
        processes=processes,
    )
    if maps and is_main_process():
        write_overlays(fitted, source, expand_path(out) / FOLDER, limit=limit, policy=policy, reading=reading)
    return scored


def check_settings(
    *,
    watch: bool,
    limit: int | None,
    policy: Policy,
    top_images: int,
    fdr: float | None,
    maps: bool,
    processes: int,
    engine: str,
    **_: Any,
) -> None:
    """Raises UsageError for settings of finished results together with --watch, whose results never are."""
    given: dict[str, Any] = {"limit": limit, "policy": policy, "top_images": top_images, "fdr": fdr, "maps": maps}
    given |= {"processes": processes, "engine": engine}
    parameters = inspect.signature(score).parameters
    unused = [f"--{name.replace('_', '-')}" for name in given if given[name] != parameters[name].default]
    if watch and unused:
        raise UsageError(f"with --watch, {', '.join(unused)} has no effect; leave it out")


def print_scored_folder(scored: ScoredFolder | WatchedFolder) -> None:
    """Prints the number of images by status, the number of flagged images, unreadable images, and the files.

    Raises FaroutError if no image could be read: the results are written, but they contain no scores.
    """
    if isinstance(scored, WatchedFolder):
        rows = ", ".join(f"{count} {status}" for status, count in scored.counts.items()) or "no rows"
        print_text(f"stopped; {scored.scored_now} new images; in all {rows} ({scored.flagged} flagged)")
        print_existing(scored.folder, "scores.csv")
        return
    total = sum(scored.counts.values())
    readable = total - scored.counts.get("unreadable", 0)
    others = "".join(f", {count} {status}" for status, count in scored.counts.items() if status != "ok")
    new = {readable: "all", 0: "none"}.get(scored.scored_now, str(scored.scored_now))
    print_text(f"{total} images: {scored.counts.get('ok', 0)} scored ({scored.flagged} flagged){others}; {new} new")
    for key, reason in list(scored.unreadable.items())[:_SHOWN_UNREADABLE]:
        print_text(f"  unreadable: {key}: {reason}")
    if len(scored.unreadable) > _SHOWN_UNREADABLE:
        print_text(
            f"  … and {len(scored.unreadable) - _SHOWN_UNREADABLE} more unreadable images, listed in manifest.json"
        )
    print_existing(scored.folder, "scores.csv", "measurements.parquet", "manifest.json", "page.html")
    if scored.unreadable and not readable:
        key, reason = next(iter(scored.unreadable.items()))
        raise FaroutError(f"no image could be read: all {len(scored.unreadable)} are unreadable ({key}: {reason})")
