"""The images that tell most about a benchmark: where detectors disagree, false alarms, and misses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from farout.benchmark.page_data import Bench, Run, Side
from farout.benchmark.pictures import MOST, pictures_of, wrong
from farout.report.thumbnails import SourceImages, ThumbnailSet

__all__ = ["Shown", "disagreements", "galleries"]

_DISPUTED, _LISTED = 6, 6
_LEAST, _ALTOGETHER = 3, 900


@dataclass(frozen=True)
class Shown:
    """An image on the page: its key, the number of its thumbnail (None: no picture), captions and numbers of what a
    detector sees in it, a line of text, and in a dispute detectors with the percent of the set's images that they
    place below it.
    """

    key: str
    picture: int | None
    seen: tuple[tuple[str, int], ...] = ()
    text: str = ""
    opinions: tuple[tuple[str, int], ...] = ()


def disagreements(bench: Bench, images: SourceImages, thumbnails: ThumbnailSet) -> list[dict[str, Any]]:
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


def _disputed(key: str, ranks: pd.Series, source: str, images: SourceImages, thumbnails: ThumbnailSet) -> Shown:
    ordered = ranks.sort_values(ascending=False, kind="stable")
    if len(ordered) > _LISTED:
        ordered = pd.concat([ordered.head(_LISTED // 2), ordered.tail(_LISTED // 2)])
    opinions = tuple((str(name), int(value)) for name, value in ordered.items())
    return Shown(key, thumbnails.add_image(images, source, key), opinions=opinions)


def galleries(bench: Bench, images: SourceImages, thumbnails: ThumbnailSet) -> list[dict[str, Any]]:
    """Per detector that is no control: in-distribution images that it flags, the furthest first, and per set those
    that it does not flag, the nearest first.
    """
    shown = [run for run in bench.runs if run.sides and not bench.is_control(run.detector)]
    within = list(dict.fromkeys(pair.inside for pair in bench.pairs))
    outside = list(dict.fromkeys(pair.outside for pair in bench.pairs))
    count = max(_LEAST, min(MOST, _ALTOGETHER // max(1, len(shown) * (len(within) + len(outside)))))

    def strips(run: Run, sources: Sequence[str], inside: bool) -> list[dict[str, Any]]:
        sides = [run.sides[name] for name in sources if name in run.sides]
        return [_strip(side, inside, count, images, thumbnails) for side in sides]

    return [
        {"detector": run.detector, "alarms": strips(run, within, True), "misses": strips(run, outside, False)}
        for run in shown
    ]


def _strip(side: Side, inside: bool, count: int, images: SourceImages, thumbnails: ThumbnailSet) -> dict[str, Any]:
    """The images of a source that are judged wrongly, the worst first."""
    scores, order = side.scores, wrong(side.scores, inside)
    shown = [
        Shown(
            key,
            thumbnails.add_image(images, side.source, key),
            tuple(_seen(side, key, thumbnails)),
            f"score\u00a0{scores.score[place]:.4g}, p\u00a0=\u00a0{scores.p_value[place]:.4f}",
        )
        for place, key in ((place, scores.keys[place]) for place in order[:count])
    ]
    known = int(np.isfinite(scores.score).sum())
    return {"source": side.source, "count": len(order), "of": known, "shown": shown}


def _seen(side: Side, key: str, thumbnails: ThumbnailSet) -> Iterator[tuple[str, int]]:
    for caption, path in pictures_of(side, key):
        number = thumbnails.add_file(path)
        if number is not None:
            yield caption, number
