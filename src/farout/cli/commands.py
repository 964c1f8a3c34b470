"""The commands of the command line as functions: their signatures are the flags, their first lines the help."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from farout.benchmark.demo import demo as _demo
from farout.core import store
from farout.core.devices import num_processes
from farout.core.errors import FaroutError
from farout.data.image_source import Policy
from farout.detectors import DETECTORS
from farout.detectors.base import Detector, load
from farout.detectors.fit_settings import FitSettings
from farout.detectors.fitting import recalibrate
from farout.evaluation.comparison import Beside
from farout.evaluation.evaluate import evaluate_detector, evaluate_scores
from farout.features.cache import CachedFeatureSet, clear_cache, list_cached_features
from farout.report.overlays import FOLDER, check_has_maps, write_overlays
from farout.scoring.folder import ScoredFolder, score_folder
from farout.training.checkpoints import discard_checkpoints, training_folder
from farout.training.config import TrainingConfig

__all__ = [
    "calibrate",
    "clear_features",
    "demo",
    "evaluate",
    "fit",
    "list_features",
    "score",
    "what_is_rated",
]


def fit(
    method: str,
    source: str,
    *,
    out: str,
    diffusion: str | None = None,
    classifier: str | None = None,
    link: bool = False,
    preset: str | None = None,
    settings: FitSettings,
    arguments: dict[str, Any],
) -> Detector:
    """Fit a detector to normal images.

    Args:
        method: name of the detector, see `farout list detectors`.
        source: normal images: a named set, folder, glob, file, or hf://owner/name:split.
        out: folder of the detector.
        diffusion: folder of a diffusion model, or hf://owner/name, for methods that use one; default: train one.
        classifier: folder of a classifier, for methods that use one; default: train one, on images with labels.
        link: store the path of the diffusion model instead of a copy.
        preset: preset that `arguments` started from.
        settings: settings of the fit.
        arguments: settings of the method.
    """
    if link and (diffusion is None or diffusion.startswith("hf://")):
        raise FaroutError("--link requires --diffusion FOLDER: there is no model folder to link to")
    if num_processes() > 1:
        raise FaroutError("fit runs in one process; to train in several, use `farout train diffusion` first")
    store.check_replaceable(out, "detector")
    detector: Detector = DETECTORS[method].load()(**arguments)
    detector.provenance["preset"] = preset or ""
    checkpoints = settings.checkpoints or training_folder(out)
    started = time.perf_counter()
    detector.fit(source, diffusion, classifier, **vars(replace(settings, checkpoints=checkpoints)))
    detector.provenance["fit_s"] = round(time.perf_counter() - started, 1)
    detector.save(out, link=Path(str(diffusion)) if link else None)
    discard_checkpoints(checkpoints, settings.training or TrainingConfig())
    return detector


def score(
    detector: str,
    source: str,
    *,
    out: str,
    limit: int | None = None,
    policy: Policy = "nan",
    furthest: int = 24,
    fdr: float | None = None,
    maps: bool = False,
    runtime: dict[str, Any],
) -> ScoredFolder:
    """Score images with a detector: table, measurements and HTML report.

    Args:
        detector: folder of a fitted detector.
        source: images: a named set, folder, glob, file, or hf://owner/name:split.
        out: folder of the results; an interrupted run continues there.
        limit: use a seeded random sample of this many images; default: all.
        policy: what to do with an unreadable image: `nan` (list it without a score), `skip` it, or `raise` an error.
        furthest: number of images with the highest scores in the report.
        fdr: add a table column that selects images by Benjamini-Hochberg at this false discovery rate.
        maps: also write a heat map of every image to OUT/maps (patches, reconstruction and denoising only).
        runtime: settings that override those of the fit.
    """
    fitted = load(detector, **runtime)
    if maps:
        check_has_maps(fitted)
    done = score_folder(fitted, source, out, limit=limit, policy=policy, furthest=furthest, fdr=fdr)
    if maps:
        write_overlays(fitted, source, Path(out) / FOLDER, limit=limit, policy=policy)
    return done


def calibrate(
    detector: str,
    source: str,
    *,
    out: str | None = None,
    limit: int | None = None,
    alpha: float | None = None,
    policy: Literal["raise", "skip"] = "raise",
    runtime: dict[str, Any],
) -> Detector:
    """Recompute a detector's p-values from other normal images, without training.

    Args:
        detector: folder of a fitted detector.
        source: normal images: a named set, folder, glob, file, or hf://owner/name:split; images used in the fit are
            left out.
        out: folder of the recalibrated detector; default: replace the given one.
        limit: use a seeded random sample of this many images; default: all.
        alpha: new false-alarm rate; default: that of the fit.
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        runtime: settings that override those of the fit.
    """
    if out is not None:
        store.check_replaceable(out, "detector")
    fitted = recalibrate(load(detector, **runtime), source, limit=limit, alpha=alpha, policy=policy)
    fitted.save(out or detector)
    return fitted


def evaluate(
    detector: str | None = None,
    *,
    id: str | None = None,
    ood: Sequence[str] = (),
    scores: Sequence[str] = (),
    out: str | None = None,
    limit: int | None = None,
    companions: bool = True,
    controls: bool = True,
    random_control: bool = False,
    reference: str | None = None,
    control_limit: int | None = 1000,
    ood_draws: int = 0,
    runtime: dict[str, Any],
) -> pd.DataFrame:
    """Evaluate a detector, or given scores, on out-of-distribution images.

    Args:
        detector: folder of a fitted detector.
        id: in-distribution images that were not used in the fit.
        ood: one or more sources of out-of-distribution images.
        scores: evaluate score tables instead of a detector: the in-distribution file first, then the
            out-of-distribution files.
        out: folder of the results.
        limit: use a seeded random sample of this many images of each source; default: all.
        companions: also evaluate the detector's standard baselines.
        controls: also evaluate trivial baselines (color, PNG size, edges, JPEG blocks).
        random_control: also evaluate the same detector with random weights.
        reference: images to fit the trivial baselines on; default: those of the detector's fit.
        control_limit: maximum number of images to fit the trivial baselines on.
        ood_draws: also write OUT/draws.csv: metrics over this many random draws with one out-of-distribution image per
            five in-distribution images, as in many papers; 0: off.
        runtime: settings that override those of the fit.
    """
    rated = what_is_rated(detector, id, ood, scores, out)
    if rated is None:
        return evaluate_scores(scores, out)
    detector, id, out = rated
    return evaluate_detector(
        load(detector, **runtime),
        id,
        ood,
        out,
        limit=limit,
        beside=Beside(companions, controls, random_control, reference, control_limit),
        ood_draws=ood_draws,
    )


def what_is_rated(
    detector: str | None, id: str | None, ood: Sequence[str], scores: Sequence[str], out: str | None, **others: Any
) -> tuple[str, str, str] | None:
    """Detector, in-distribution images and folder of the results, or None where tables are rated; raises FaroutError
    for a mixture of both, others of `evaluate`'s settings beside tables, and where something is missing.
    """
    if scores:
        if detector is not None or id is not None or ood:
            raise FaroutError("--scores evaluates score tables; leave out the detector, --id and --ood")
        known = inspect.signature(evaluate).parameters
        idle = [*others.pop("runtime", ()), *(name for name in others if others[name] != known[name].default)]
        if idle:
            raise FaroutError(f"with --scores, {', '.join(idle)} has no effect; leave it out")
        return None
    if detector is None or id is None or not ood or out is None:
        raise FaroutError("evaluate requires DETECTOR --id SOURCE --ood SOURCE... --out DIR, or --scores FILE FILE...")
    return detector, id, out


def list_features() -> list[CachedFeatureSet]:
    """List the stored features."""
    return list_cached_features()


def clear_features(name: str | None = None) -> list[CachedFeatureSet]:
    """Delete stored features.

    Args:
        name: folder to delete, as `farout features list` shows it; default: all.
    """
    return clear_cache(name)


def demo(
    *, out: str = "farout-demo", steps: int = 100, limit: int = 100, images: int | None = None, seed: int = 0
) -> Iterator[pd.DataFrame]:
    """Fit and evaluate two detectors on the built-in sample, in a few minutes.

    Args:
        out: folder of the demo's models and results.
        steps: number of training steps of the diffusion model.
        limit: number of images scored per set.
        images: number of sample images to fit the detector on; default: 1,000.
        seed: seed of all samples, weights and noise.
    """
    return _demo(out, steps=steps, limit=limit, images=images, seed=seed)
