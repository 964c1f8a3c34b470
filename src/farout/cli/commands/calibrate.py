"""`farout calibrate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from farout.cli.terminal import print_text
from farout.core import store
from farout.core.names import expand_path, find_path
from farout.data.read_settings import ReadSettings
from farout.detectors.base import Detector, load
from farout.detectors.fitting import recalibrate
from farout.detectors.saving import describe_detector

__all__ = ["calibrate", "print_calibration"]


def calibrate(
    detector: str,
    source: str,
    *,
    out: str | None = None,
    limit: int | None = None,
    alpha: float | None = None,
    groups: Literal["near_copies", "folder", "none"] = "near_copies",
    policy: Literal["raise", "skip"] = "raise",
    reading: ReadSettings,
    runtime: dict[str, Any],
) -> Detector:
    """Recompute a detector's p-values from other normal images, without training.

    Args:
        detector: folder of a fitted detector.
        source: normal images: a named set, folder, glob, file, URL, or hf://owner/name:split; images used in the fit
            are left out.
        out: folder of the recalibrated detector; default: replace the given one,
            unless the images are too few to flag anything at alpha.
        limit: use a seeded random sample of this many images; default: all.
        alpha: new false-alarm rate; default: that of the fit.
        groups: images that count once: `near_copies` (bursts, video frames, recompressed, shifted or mirrored images),
            `folder` (these, and all images of one folder or value of the column `group`), or `none` (equal images
            only).
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        reading: how image files are read.
        runtime: runtime settings that replace those of the fit.
    """
    if out is not None:
        store.check_replaceable(out, "detector")
    # a detector that works is not replaced by one that can flag nothing
    replaces = out is None or expand_path(out).resolve() == find_path(detector).resolve()
    fitted = load(detector, **runtime)
    recalibrated = recalibrate(
        fitted,
        source,
        limit=limit,
        alpha=alpha,
        policy=policy,
        must_flag=replaces,
        reading=reading,
        groups=groups,
    )
    recalibrated.save(out or detector)
    return recalibrated


def print_calibration(detector: Detector, arguments: Mapping[str, Any]) -> None:
    """Prints the number of calibration images, the false-alarm rate and the folder."""
    method, folder = describe_detector(detector)["method"], arguments["out"] or arguments["detector"]
    counts = f"{len(detector.calibration)} calibration images"
    print_text(f"{method} calibrated: {counts}, alpha {detector.alpha}; written to {folder}")
