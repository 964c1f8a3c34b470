"""`farout features extract`, `list` and `clear`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farout.cli.tables import new_table, print_table
from farout.cli.terminal import print_text
from farout.features.cache_folder import (
    CachedFeatureSet,
    cache_folder,
    cache_limit,
    clear_cache,
    format_size,
    list_cached_features,
)
from farout.features.extraction import Extraction

__all__ = [
    "clear_features",
    "list_features",
    "print_deleted_features",
    "print_extraction",
    "print_stored_features",
]


def list_features() -> list[CachedFeatureSet]:
    """List the stored features with their sizes, last use and the size limit."""
    return list_cached_features()


def clear_features(name: str | None = None, *, unused_days: float | None = None) -> list[CachedFeatureSet]:
    """Delete stored features.

    Args:
        name: folder to delete, as `farout features list` shows it; default: all.
        unused_days: delete only files that were not used for this number of days.
    """
    return clear_cache(name, unused_days=unused_days)


def print_extraction(extraction: Extraction) -> None:
    """Prints counts, the reasons of up to five unreadable images, the folder and the speed."""
    unreadable = f", {len(extraction.unreadable)} unreadable" if extraction.unreadable else ""
    print_text(f"{extraction.source}: {extraction.computed} computed, {extraction.found} already stored{unreadable}")
    for key, reason in list(extraction.unreadable.items())[:5]:
        print_text(f"  {key}: {reason}")
    print_text(f"  {extraction.folder}")
    images = extraction.computed + extraction.found
    print_text(f"  {extraction.seconds:.1f} s, {images / max(extraction.seconds, 1e-9):.1f} images/s")


def print_stored_features(sets: list[CachedFeatureSet]) -> None:
    """Prints one row per set of features."""
    folder, limit = cache_folder() / "features", cache_limit()
    if not sets:
        print_text(f"no features are stored in {folder}; `farout features extract SOURCE` computes them")
        return
    table = new_table()
    table.add_column("name", no_wrap=True)
    for title in ("backbone and layers", "weights", "size", "protocol", "precision"):
        table.add_column(title, overflow="fold")
    for title in ("images", "MiB"):
        table.add_column(title, no_wrap=True, justify="right")
    table.add_column("last use", no_wrap=True)
    for each in sets:
        images = str(each.images) if each.is_readable else "not read"
        last_used = f"{each.last_used:%Y-%m-%d %H:%M}" if each.last_used else "-"
        table.add_row(each.folder.name, *_describe_settings(each.settings), images, f"{each.mib:.1f}", last_used)
    print_table(table)
    size = format_size(sum(each.mib for each in sets) * 2**20)
    print_text(f"{size} in {folder}; limit {format_size(limit) if limit else 'none'} (FAROUT_CACHE_LIMIT)")
    old = [each.folder.name for each in sets if not each.is_readable]
    if old:
        print_text(
            f"stored by another version of farout and not read any more: {', '.join(old)};"
            " they are deleted when room is needed, or by `farout features clear NAME`"
        )


def _describe_settings(settings: dict[str, Any]) -> list[str]:
    """Backbone, weights, input size, protocol with native size, and precision with device; `?` for unknown ones."""
    about, preprocessing = settings.get("about", {}), settings.get("preprocessing", {})
    backbone = " ".join(map(str, [about.get("backbone", "?"), *about.get("layers", [])]))
    origin, _, rest = str(about.get("weights", "?")).partition(" ")
    weights = f"file {Path(rest).name}" if origin == "file" else origin.rstrip(",")
    protocol = f"{preprocessing.get('protocol', '?')} {'x'.join(map(str, preprocessing.get('native', [])))}".strip()
    precision = f"{settings.get('precision', '?')} {settings.get('device', '')}".strip()
    return [backbone, weights, str(about.get("input", "?")), protocol, precision]


def print_deleted_features(sets: list[CachedFeatureSet]) -> None:
    """Prints the number and size of the deleted features."""
    images, mib = sum(each.images for each in sets), sum(each.mib for each in sets)
    print_text(f"deleted features of {len(sets)} kinds ({images} images, {mib:.1f} MiB) from {cache_folder()}")
