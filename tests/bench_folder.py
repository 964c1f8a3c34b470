"""The folder of a benchmark with random scores, for tests of its page."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from farout.core.files import hash_file
from farout.core.store import write_sealed_json
from farout.data.sources import open_source
from farout.detectors.calibration import compute_p_values, flag_outliers
from farout.detectors.results import Scores
from farout.evaluation.metrics import detection_metrics

SKILLS = {"semantic": (1.8, 0.4), "knn": (1.4, 0.6), "reconstruction": (0.9, 3.0), "trivial_baselines": (0.5, 0.0)}
"""By detector, the mean score of out-of-distribution images (0 for normal images), and GMACs."""


def write_results(
    folder: Path,
    inside: str,
    outside: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    skills: dict[str, tuple[float, float]] = SKILLS,
    indicators: Sequence[str] = ("mean", "other"),
) -> Path:
    """Write everything that `write_benchmark_page` reads."""
    rows = []
    for number, (detector, (skill, gmacs)) in enumerate(skills.items()):
        for seed in seeds:
            generator = np.random.default_rng([number, seed])
            calibration = {name: generator.normal(size=200) for name in indicators}
            sides = {}
            for place, source in enumerate((inside, *outside)):
                shift = 0.0 if place == 0 else skill * (1 + 0.25 * (place % 3))
                sides[source] = _scores(source, shift, calibration, generator)
                _write(folder / "evaluations" / f"{detector}-{seed}" / "scores" / f"set{place}", source, sides[source])
            for place, source in enumerate(outside):
                for indicator in ("score", *indicators):
                    found = detection_metrics(*(_column(sides[name], indicator) for name in (inside, source)), draws=20)
                    rows.append(
                        {
                            "bench": "small",
                            "marker": _marker(detector, gmacs, place, found.auroc),
                            "detector": detector,
                            "indicator": indicator,
                            "id": inside,
                            "ood": source,
                            "ood_group": ("far", "near")[place % 2],
                            "role": "test",
                            "seed": seed,
                            **vars(found),
                            "false_alarm": float(sides[inside].is_ood.mean()),
                            "nfe": round(gmacs * 10),
                            "gmacs": gmacs,
                            "images_per_s": 4000 / (1 + 20 * gmacs) + number,
                            "peak_mib": 900 + 100 * gmacs,
                            "fit_s": 12.5 * (1 + number),
                        }
                    )
    _tables(folder, pd.DataFrame(rows), inside, outside)
    return folder


def _marker(detector: str, gmacs: float, place: int, auroc: float) -> str:
    words = {
        "baseline": "trivial" in detector,
        "size": place == 1,
        "pretrained": 0 < gmacs < 1,
        "below half": auroc < 0.5,
    }
    return ";".join(word for word, holds in words.items() if holds)


def _column(scores: Scores, name: str) -> np.ndarray:
    return scores.score if name == "score" else scores.indicators[name]


def _scores(source: str, shift: float, calibration: dict[str, np.ndarray], generator: np.random.Generator) -> Scores:
    keys = open_source(source, policy="nan").keys
    own = next(iter(calibration))
    drawn = {name: generator.normal(size=len(keys)) + shift for name in calibration}
    p = compute_p_values(drawn[own], calibration[own])
    return Scores(keys, drawn[own], p, flag_outliers(p, 0.05), ("ok",) * len(keys), drawn)


def _write(folder: Path, source: str, scores: Scores) -> None:
    folder.mkdir(parents=True)
    scores.to_frame().to_csv(folder / "scores.csv", index=False)
    manifest = {
        "source": source,
        "policy": "nan",
        "images": len(scores),
        "contents": [],
        "files": {"scores.csv": hash_file(folder / "scores.csv")},
        "counts": {"ok": len(scores)},
        "flagged": int(scores.is_ood.sum()),
        "environments": [{}],
        "unreadable": {},
    }
    write_sealed_json(folder / "manifest.json", manifest)


def _tables(folder: Path, metrics: pd.DataFrame, inside: str, outside: Sequence[str]) -> None:
    metrics.to_csv(folder / "metrics.csv", index=False)
    by_group = metrics.groupby(["detector", "indicator", "ood_group"], sort=False)
    spread = by_group[["auroc", "fpr95"]].std().add_suffix("_std")
    groups = by_group[["auroc", "fpr95"]].mean().join(spread).assign(sets=by_group["ood"].nunique(), untested=0)
    groups.reset_index().to_csv(folder / "groups.csv", index=False)
    spec = {"name": "small", "about": "a small <benchmark>", "id": inside, "ood": list(outside)}
    (folder / "bench.yaml").write_text(json.dumps(spec, indent=1))
    versions = {"farout": "0.1", "torch": "2.6"}
    about = {"command": "farout bench small.yaml", "versions": versions, "machine": {"cpu": "<b>2 cores</b>"}}
    notes = {"baseline": "a trivial baseline", "pretrained": "on other images", "below half": "AUROC below one half"}
    more = {"seconds": 12.5, "hashes": ["a", "b"], "markers": notes, "untested": {"svhn:test": "is not here"}}
    (folder / "provenance.json").write_text(json.dumps({**about, **more}))
