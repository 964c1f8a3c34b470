"""Images on a benchmark's page: where detectors disagree, false alarms, and misses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from farout.benchmark.error_images import MAX_IMAGES, list_error_images, rank_errors
from farout.benchmark.page_charts import Chart, draw_histograms
from farout.benchmark.results_folder import BenchmarkResults, DetectorScores, ScoredFolder
from farout.report.thumbnails import SourceImages, ThumbnailSet

__all__ = ["DetectorGallery", "Disagreement", "ErrorStrip", "ShownImage", "find_disagreements", "make_galleries"]

_DISAGREEMENTS, _RANKS_SHOWN = 6, 6
_MIN_PER_STRIP, _MAX_THUMBNAILS = 3, 900
_NBSP = "\u00a0"


@dataclass(frozen=True)
class ShownImage:
    """An image on the page.

    Attributes:
        key: of the image.
        thumbnail: number of its thumbnail; None: no picture.
        views: captions and thumbnails of what the detector sees, such as maps and reconstructions.
        text: score and p-value.
        ranks: detectors with the percentage of the set's images that have a lower score.
    """

    key: str
    thumbnail: int | None
    views: tuple[tuple[str, int], ...] = ()
    text: str = ""
    ranks: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Disagreement:
    """The images of a source on which detectors disagree most; `images` and `detectors` are numbers."""

    source: str
    images: int
    detectors: int
    shown: list[ShownImage]


@dataclass(frozen=True)
class ErrorStrip:
    """Wrong decisions of a detector on a source: `errors` of `scored` images, the worst of them shown."""

    source: str
    errors: int
    scored: int
    shown: list[ShownImage]


@dataclass(frozen=True)
class DetectorGallery:
    """Score histograms of a detector, in-distribution images that it flags, and other images that it does not."""

    detector: str
    histograms: list[Chart]
    false_alarms: list[ErrorStrip]
    misses: list[ErrorStrip]


def find_disagreements(results: BenchmarkResults, images: SourceImages, thumbnails: ThumbnailSet) -> list[Disagreement]:
    """Per source, the images whose rank differs most between detectors (standard deviation), without baselines."""
    methods = [each for each in results.detector_scores if not results.is_baseline(each.detector)]
    found = []
    for source in dict.fromkeys(name for pair in results.pairs for name in (pair.id, pair.ood)):
        columns = {
            each.detector: pd.Series(table.score, index=list(table.keys))
            for each, table in ((each, each.scored[source].scores) for each in methods if source in each.scored)
        }
        scores = pd.DataFrame(columns).replace([np.inf, -np.inf], np.nan).dropna()
        if scores.shape[1] < 2 or not len(scores):
            continue
        ranks = pd.DataFrame(
            {name: 100 * (stats.rankdata(values) - 0.5) / len(scores) for name, values in scores.items()},
            index=scores.index,
        )
        order = ranks.std(axis=1, ddof=0).sort_values(ascending=False, kind="stable").head(_DISAGREEMENTS).index
        shown = []
        for key in order:
            ordered = ranks.loc[key].sort_values(ascending=False, kind="stable")
            if len(ordered) > _RANKS_SHOWN:
                ordered = pd.concat([ordered.head(_RANKS_SHOWN // 2), ordered.tail(_RANKS_SHOWN // 2)])
            shown_ranks = tuple((str(name), int(value)) for name, value in ordered.items())
            shown.append(ShownImage(str(key), thumbnails.add_image(images, source, str(key)), ranks=shown_ranks))
        found.append(Disagreement(source, len(ranks), ranks.shape[1], shown))
    return found


def make_galleries(results: BenchmarkResults, images: SourceImages, thumbnails: ThumbnailSet) -> list[DetectorGallery]:
    """Per method: in-distribution images that it flags, highest score first, and out-of-distribution images that it
    does not flag, lowest score first.
    """
    methods = [each for each in results.detector_scores if each.scored and not results.is_baseline(each.detector)]
    id_sources = list(dict.fromkeys(pair.id for pair in results.pairs))
    ood_sources = list(dict.fromkeys(pair.ood for pair in results.pairs))
    strips = max(1, len(methods) * (len(id_sources) + len(ood_sources)))
    count = max(_MIN_PER_STRIP, min(MAX_IMAGES, _MAX_THUMBNAILS // strips))

    def make_strips(scores: DetectorScores, sources: Sequence[str], *, in_distribution: bool) -> list[ErrorStrip]:
        folders = [scores.scored[name] for name in sources if name in scores.scored]
        return [_make_strip(folder, in_distribution, count, images, thumbnails) for folder in folders]

    return [
        DetectorGallery(
            scores.detector,
            draw_histograms(results, scores),
            make_strips(scores, id_sources, in_distribution=True),
            make_strips(scores, ood_sources, in_distribution=False),
        )
        for scores in methods
    ]


def _make_strip(
    folder: ScoredFolder, in_distribution: bool, count: int, images: SourceImages, thumbnails: ThumbnailSet
) -> ErrorStrip:
    scores, order = folder.scores, rank_errors(folder.scores, in_distribution)
    shown = []
    for index in order[:count]:
        key = scores.keys[index]
        numbered = [(caption, thumbnails.add_file(path)) for caption, path in list_error_images(folder, key)]
        views = tuple((caption, number) for caption, number in numbered if number is not None)
        text = f"score{_NBSP}{scores.score[index]:.4g}, p{_NBSP}={_NBSP}{scores.p_value[index]:.4f}"
        shown.append(ShownImage(key, thumbnails.add_image(images, folder.source, key), views, text))
    return ErrorStrip(folder.source, len(order), int(np.isfinite(scores.score).sum()), shown)
