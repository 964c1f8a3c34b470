"""The images that tell most about a benchmark: where detectors disagree, false alarms, and misses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from farout.evaluation.bench.page_data import Bench, Run, Side
from farout.evaluation.overlays import FOLDER, overlay_name
from farout.evaluation.thumbnails import SourceImages, Thumbnails

__all__ = ["Shown", "disagreements", "galleries"]

_DISPUTED, _LISTED = 6, 6
_MOST, _LEAST, _ALTOGETHER = 8, 3, 900


@dataclass(frozen=True)
class Shown:
    """An image on the page: its key, numbers of its thumbnail and of its map (None: no picture), a line of text, and in
    a dispute detectors with the percent of the set's images that they place below it.
    """

    key: str
    picture: int | None
    overlay: int | None = None
    text: str = ""
    opinions: tuple[tuple[str, int], ...] = ()


def disagreements(bench: Bench, images: SourceImages, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """Per source, the images whose rank among its images differs most from detector to detector (standard deviation of
    the ranks), controls left out.
    """
    judges = [run for run in bench.runs if not bench.is_control(run.detector)]
    found = []
    for source in dict.fromkeys(name for pair in bench.pairs for name in (pair.inside, pair.outside)):
        ranks = _ranks(judges, source)
        if ranks.shape[1] < 2 or not len(ranks):
            continue
        spread = ranks.std(axis=1, ddof=0)
        order = spread.sort_values(ascending=False, kind="stable").head(_DISPUTED).index
        shown = [_disputed(str(key), ranks.loc[key], source, images, thumbnails) for key in order]
        found.append({"source": source, "images": len(ranks), "detectors": ranks.shape[1], "shown": shown})
    return found


def _ranks(judges: Sequence[Run], source: str) -> pd.DataFrame:
    """Percent of the images below each image, per detector; images that all have scored."""
    columns = {}
    for run in judges:
        if source in run.sides:
            scores = run.sides[source].scores
            columns[run.detector] = pd.Series(scores.score, index=list(scores.keys))
    table = pd.DataFrame(columns).replace([np.inf, -np.inf], np.nan).dropna()
    ranked = {name: 100 * (stats.rankdata(values) - 0.5) / max(1, len(table)) for name, values in table.items()}
    return pd.DataFrame(ranked, index=table.index)


def _disputed(key: str, ranks: pd.Series, source: str, images: SourceImages, thumbnails: Thumbnails) -> Shown:
    ordered = ranks.sort_values(ascending=False, kind="stable")
    if len(ordered) > _LISTED:
        ordered = pd.concat([ordered.head(_LISTED // 2), ordered.tail(_LISTED // 2)])
    opinions = tuple((str(name), int(value)) for name, value in ordered.items())
    return Shown(key, thumbnails.of_image(images, source, key), opinions=opinions)


def galleries(bench: Bench, images: SourceImages, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """Per detector that is no control: in-distribution images that it flags, the furthest first, and per set those
    that it does not flag, the nearest first.
    """
    shown = [run for run in bench.runs if run.sides and not bench.is_control(run.detector)]
    inside = list(dict.fromkeys(pair.inside for pair in bench.pairs))
    outside = list(dict.fromkeys(pair.outside for pair in bench.pairs))
    count = max(_LEAST, min(_MOST, _ALTOGETHER // max(1, len(shown) * (len(inside) + len(outside)))))

    def strips(run: Run, sources: Sequence[str], flagged: bool) -> list[dict[str, Any]]:
        sides = [run.sides[name] for name in sources if name in run.sides]
        return [_strip(side, flagged, count, images, thumbnails) for side in sides]

    return [
        {"detector": run.detector, "alarms": strips(run, inside, True), "misses": strips(run, outside, False)}
        for run in shown
    ]


def _strip(side: Side, flagged: bool, count: int, images: SourceImages, thumbnails: Thumbnails) -> dict[str, Any]:
    """The flagged images of a source with the highest scores, or those not flagged with the lowest."""
    scores = side.scores
    known = np.isfinite(scores.score)
    chosen = np.flatnonzero(known & (scores.is_ood if flagged else ~scores.is_ood))
    order = chosen[np.argsort(-scores.score[chosen] if flagged else scores.score[chosen], kind="stable")][:count]
    shown = [
        Shown(
            key,
            thumbnails.of_image(images, side.source, key),
            thumbnails.of_file(side.folder / FOLDER / overlay_name(key)),
            f"score\u00a0{scores.score[place]:.4g}, p\u00a0=\u00a0{scores.p_value[place]:.4f}",
        )
        for place, key in ((place, scores.keys[place]) for place in order)
    ]
    return {"source": side.source, "count": len(chosen), "of": int(known.sum()), "shown": shown}
