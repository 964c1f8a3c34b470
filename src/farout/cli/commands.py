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
from farout.core.devices import launched
from farout.core.errors import FaroutError
from farout.data.image_source import Policy
from farout.detectors import DETECTORS
from farout.detectors.base import Detector, load
from farout.detectors.fitting import FitSettings, recalibrate
from farout.evaluation.comparison import Beside
from farout.evaluation.evaluate import evaluate_detector, evaluate_scores
from farout.features.cache import CachedKind, cached_kinds, clear
from farout.report.overlays import FOLDER, check_makes_maps, write_overlays
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
    """Fit a detector to good images.

    Args:
        method: the detector's name, see `farout list detectors`.
        source: good images: a set's name, a folder, a glob, a file, or hf://owner/name:split.
        out: folder of the detector.
        diffusion: folder of a diffusion model, or hf://owner/name, for methods that use one; without it one is trained.
        classifier: folder of a classifier, for methods that need one; without it one is trained on images with labels.
        link: keep a path to the diffusion model instead of a copy.
        preset: the method's preset that `arguments` started from.
        settings: how the fit is done.
        arguments: the method's own settings.
    """
    if link and (diffusion is None or diffusion.startswith("hf://")):
        raise FaroutError("--link wants --diffusion FOLDER: there is no model folder to link to")
    if launched() > 1:
        raise FaroutError("fit runs in one process; train the model in several with `farout train diffusion`")
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
    """Score images: a table, raw measurements and a page.

    Args:
        detector: folder of a fitted detector.
        source: images: a set's name, a folder, a glob, a file, or hf://owner/name:split.
        out: folder of the results; an interrupted run goes on there.
        limit: a seeded sample of this many images.
        policy: what becomes of an unreadable image: nan (listed, without score), skip or raise.
        furthest: images shown on the page.
        fdr: adds a column of images selected by Benjamini-Hochberg at this false discovery rate.
        maps: also write OUT/maps: every image with its heat map, for methods that say where (patches, reconstruction,
            denoising).
        runtime: settings that differ from the fitted ones.
    """
    fitted = load(detector, **runtime)
    if maps:
        check_makes_maps(fitted)
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
    """Rest a detector's p-values on other good images; nothing is trained.

    Args:
        detector: folder of a fitted detector.
        source: good images that the detector was not fitted with.
        out: folder of the recalibrated detector; without it the given folder is replaced.
        limit: a seeded sample of this many images.
        alpha: another false-alarm rate.
        policy: what becomes of an unreadable image: raise, or skip.
        runtime: settings that differ from the fitted ones.
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
    """Rate a detector, or anyone's scores, against out-of-distribution images.

    Args:
        detector: folder of a fitted detector.
        id: in-distribution images that the detector has not seen.
        ood: out-of-distribution sources.
        scores: rate score tables instead: the in-distribution one first, then out-of-distribution ones.
        out: folder of the results.
        limit: a seeded sample of this many images of each source.
        companions: rate the methods that the detector names beside it.
        controls: rate trivial controls beside the detector.
        random_control: rate the same detector with random weights.
        reference: images that controls are fitted on; without it those that the detector was fitted on.
        control_limit: how many of them.
        ood_draws: also write OUT/draws.csv, metrics over this many random draws of a fifth as many out-of-distribution
            images as in-distribution ones, the protocol of many papers.
        runtime: settings that differ from the fitted ones.
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
            raise FaroutError("--scores rates tables; leave out the detector, --id and --ood")
        known = inspect.signature(evaluate).parameters
        idle = [*others.pop("runtime", ()), *(name for name in others if others[name] != known[name].default)]
        if idle:
            raise FaroutError(f"--scores rates tables, for which {', '.join(idle)} has no use; leave it out")
        return None
    if detector is None or id is None or not ood or out is None:
        raise FaroutError("evaluate wants DETECTOR --id SOURCE --ood SOURCE... --out DIR, or --scores FILE FILE...")
    return detector, id, out


def list_features() -> list[CachedKind]:
    """Show the features that are kept on disk."""
    return cached_kinds()


def clear_features(name: str | None = None) -> list[CachedKind]:
    """Remove kept features, all or those of one folder.

    Args:
        name: the folder, as `farout features list` shows it; without it all.
    """
    return clear(name)


def demo(
    *, out: str = "farout-demo", steps: int = 100, limit: int = 100, images: int | None = None, seed: int = 0
) -> Iterator[pd.DataFrame]:
    """Run the main job on the built-in sample, in minutes.

    Args:
        out: folder of the demo's models and results.
        steps: training steps of the diffusion model.
        limit: images scored of each set.
        images: images of the sample that the detector is fitted to; without it 1,000.
        seed: seed of everything.
    """
    return _demo(out, steps=steps, limit=limit, images=images, seed=seed)
