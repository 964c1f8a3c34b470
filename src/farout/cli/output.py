"""What the command line prints: progress bars, tables, paths."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import counted_classes
from farout.cli.bench import show_bench
from farout.cli.tables import new_table, print_table
from farout.core import progress as work
from farout.core.devices import is_main_process
from farout.core.errors import FaroutWarning
from farout.detectors.base import Detector
from farout.diffusion.sample_folder import SampledFolder
from farout.evaluation.fid import SetDistance
from farout.evaluation.scored_datasets import OWN
from farout.features.cache import CachedFeatureSet, cache_folder
from farout.features.extraction import Extraction
from farout.report.interpolation import InterpolatedFolder
from farout.scoring.folder import ScoredFolder
from farout.synthesis.base import GeneratedFolder

__all__ = ["progress", "quiet_libraries", "show"]

_SHORT = {"fpr95": "FPR95", "false_alarm": "false alarms", "detection": "detected", "images_per_s": "img/s"}
"""Columns shown beside detector, set and AUROC, with short heads; all columns are in metrics.csv."""

_MADE = ("images", "reconstructions", "manifest.csv", "quality.csv", "page.html")
"""What there may be in a folder of made images."""


def quiet_libraries() -> None:
    """Write warnings and the progress of farout to the error stream, one line each; silence other libraries."""
    root = logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        root.addHandler(_StderrHandler())
    if is_main_process():
        logging.getLogger("farout").setLevel(logging.INFO)
    for name in ("diffusers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def one_line(message: Any, category: type, *place: Any, **more: Any) -> None:
        if issubclass(category, FaroutWarning) and is_main_process():
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = one_line


class _StderrHandler(logging.Handler):
    """Prints records to the error stream of the moment, which rich replaces while it shows bars."""

    def __init__(self) -> None:
        super().__init__()
        is_terminal = sys.stderr.isatty()
        self.setFormatter(logging.Formatter("%(message)s" if is_terminal else "%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        print(self.format(record), file=sys.stderr)


class _Bars:
    """rich's bars behind the library's progress protocol."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars

    def open(self, description: str, total: int | None, unit: str) -> int:
        """A new bar."""
        return self.bars.add_task(description, total=total, note="")

    def advance(self, number: int, units: int, note: str, seconds_left: float | None) -> None:
        """Moves a bar on."""
        self.bars.update(number, advance=units, note=note)  # type: ignore[arg-type]

    def close(self, number: int) -> None:
        """Stops a bar's clock."""
        self.bars.stop_task(number)  # type: ignore[arg-type]


@contextmanager
def progress() -> Iterator[None]:
    """Bars with the time left for the work inside the block, on the error stream."""
    console = Console(stderr=True)
    if not console.is_terminal or not is_main_process():  # in a log, bars would be blank lines between the messages
        yield
        return
    left = TimeRemainingColumn(elapsed_when_finished=False)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left]
    note = TextColumn("{task.fields[note]}")
    with Progress(*columns, note, console=console) as bars, work.show(_Bars(bars)):
        yield


def show(name: str, result: Any) -> None:
    """Prints what a command gave; of several processes the first one does."""
    if not is_main_process():
        return
    printers: dict[str, Callable[[Any], None]] = {
        "train diffusion": lambda model: print(
            f"trained on {len(model.trained_on)} images, {model.parameters:,} parameters"
        ),
        "train classifier": _classifier,
        "fit": _detector,
        "calibrate": _detector,
        "score": _scored,
        "evaluate": _metrics,
        "bench": show_bench,
        "demo": _demonstrated,
        "sample": _sampled,
        "synthesize": lambda done: _made(done, "outliers"),
        "reconstruct": lambda done: _made(done, "reconstructions"),
        "fid": _distance,
        "interpolate": _interpolated,
        "features extract": _extracted,
        "features list": _kinds,
        "features clear": _cleared,
    }
    printers[name](result)


def _classifier(classifier: Classifier) -> None:
    about = classifier.provenance
    seen = f"trained on {about['images']} images" if "images" in about else "given weights used without training"
    print(f"{seen}, {counted_classes(classifier)}, {classifier.parameters:,} parameters")
    for kind in ("outliers", "reconstructions"):
        if kind in about:
            print(f"{about[kind]['images']} {kind} from {about[kind]['source']}, loss {about['exposure']['loss']}")
    # only the first of several processes measures it
    if "held_out_accuracy" in about:
        print(f"accuracy {about['held_out_accuracy']:.3f} on {about['held_out_images']} held-out images")
    elif "possibly_seen_accuracy" in about:
        images = f"{about['possibly_seen_images']} images (which the given weights may have seen)"
        print(f"accuracy {about['possibly_seen_accuracy']:.3f} on {images}")


def _detector(detector: Detector) -> None:
    about = detector.describe()
    counts = f"{about['statistics_images']} statistics and {about['calibration_images']} calibration images"
    print(f"{about['method']} fitted: {counts}, score {detector.score_name}, alpha {detector.alpha}")


def _scored(done: ScoredFolder) -> None:
    counts = ", ".join(f"{count} {status}" for status, count in done.counts.items())
    print(f"{counts}; {done.flagged} flagged; {done.scored_now} newly scored")
    for file in ("scores.csv", "measurements.parquet", "manifest.json", "page.html"):
        if (done.folder / file).is_file():
            print(f"  {done.folder / file}")


def _sampled(done: SampledFolder) -> None:
    more = f", {done.asked} requested: the folder has more images from an earlier run" * (done.images > done.asked)
    print(f"{done.images} images, {done.made} new{more}")
    for path in filter(None, (done.folder, done.grid)):
        print(f"  {path}")


def _made(done: GeneratedFolder, what: str) -> None:
    more = f", {done.requested} requested" * (done.images != done.requested)
    print(f"{done.images} {what}, {done.generated} new{more}")
    for path in (done.folder / each for each in _MADE):
        if path.exists():
            print(f"  {path}")


def _distance(found: SetDistance) -> None:
    """A row a number."""
    table = new_table()
    for head in ("metric", "value", "computed on"):
        table.add_column(head, no_wrap=True)
    sets = f"{found.generated} generated and {found.reference} real images, {found.dimension} features"
    table.add_row(found.frechet_name, f"{found.frechet:.4g}", sets)
    subsets = f"{found.subsets} subsets of {found.subset_size}"
    table.add_row(found.kernel_name, f"{found.kernel:.4g} ± {found.kernel_std:.2g}", subsets)
    print_table(table)


def _interpolated(done: InterpolatedFolder) -> None:
    print(
        f"{done.pairs} pairs, {done.images} images; RMS error of the decoded inversions {done.reconstruction_error:.4f}"
    )
    for path in (done.folder, done.folder / "page.html"):
        print(f"  {path}")


def _extracted(done: Extraction) -> None:
    bad = f", {len(done.unreadable)} unreadable" if done.unreadable else ""
    print(f"{done.source}: {done.computed} computed, {done.found} already stored{bad}")
    for reason in [f"{key}: {why}" for key, why in done.unreadable.items()][:5]:
        print(f"  {reason}")
    print(f"  {done.folder}")
    print(f"  {done.seconds:.1f} s, {(done.computed + done.found) / max(done.seconds, 1e-9):.1f} images/s")


def _kinds(kinds: list[CachedFeatureSet]) -> None:
    """One row per kind of features."""
    folder = cache_folder() / "features"
    if not kinds:
        print(f"no features are stored in {folder}; `farout features extract SOURCE` computes them")
        return
    table = new_table()
    table.add_column("name", no_wrap=True)
    for head in ("backbone and layers", "weights", "size", "protocol", "precision"):
        table.add_column(head, overflow="fold")
    for head in ("images", "MiB"):
        table.add_column(head, no_wrap=True, justify="right")
    for kind in kinds:
        table.add_row(kind.folder.name, *_kind(kind.settings), str(kind.images), f"{kind.mib:.1f}")
    print_table(table)
    print(f"{sum(kind.mib for kind in kinds):.1f} MiB in {folder}")


def _kind(settings: dict[str, Any]) -> list[str]:
    """Backbone, weights, size of its input, protocol and native size, precision and device; `?` where not known."""
    about, prepared = settings.get("about", {}), settings.get("preprocessing", {})
    backbone = " ".join(map(str, [about.get("backbone", "?"), *about.get("layers", [])]))
    place, _, rest = str(about.get("weights", "?")).partition(" ")
    weights = f"file {Path(rest).name}" if place == "file" else place.rstrip(",")
    protocol = f"{prepared.get('protocol', '?')} {'x'.join(map(str, prepared.get('native', [])))}".strip()
    precision = f"{settings.get('precision', '?')} {settings.get('device', '')}".strip()
    return [backbone, weights, str(about.get("input", "?")), protocol, precision]


def _cleared(kinds: list[CachedFeatureSet]) -> None:
    images, mib = sum(kind.images for kind in kinds), sum(kind.mib for kind in kinds)
    print(f"deleted {len(kinds)} feature folders ({images} images, {mib:.1f} MiB) from {cache_folder()}")


def _demonstrated(tables: Iterator[pd.DataFrame]) -> None:
    """One table after the other, as they come."""
    for table in tables:
        _metrics(table)


def _metrics(frame: pd.DataFrame) -> None:
    """The detectors' own scores: AUROC with its interval, FPR95, share of in-distribution and of out-of-distribution
    images flagged (false alarms, detected).
    """
    own = frame[frame["indicator"] == OWN]
    kept = [column for column in _SHORT if own[column].notna().any()]
    table = new_table()
    table.add_column("detector", no_wrap=True)
    table.add_column("out-of-distribution", overflow="fold")
    for head in ("AUROC (95 %)", *(_SHORT[column] for column in kept)):
        table.add_column(head, no_wrap=True)
    for row in own.to_dict("records"):
        area = f"{row['auroc']:.3f} ({row['auroc_low']:.3f}-{row['auroc_high']:.3f})"
        numbers = [f"{row[column]:.{1 if column == 'images_per_s' else 3}f}" for column in kept]
        table.add_row(str(row["detector"]), str(row["ood"]), area, *numbers)
    print_table(table)
    for pair in frame.attrs.get("paired", []):
        if pair["difference"] == pair["difference"]:
            interval = f"{pair['difference']:+.3f} ({pair['low']:+.3f} to {pair['high']:+.3f})"
            print(f"AUROC difference {pair['first']} - {pair['second']}, {pair['ood']}: {interval}")
    for path in frame.attrs.get("paths", []):
        print(path)
