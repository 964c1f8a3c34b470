"""Which column of a table holds the images, their labels, groups and keys, by the usual names of columns."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

from farout.core.errors import SourceError, SourceWarning
from farout.core.names import decode_key, encode_key, normalize_name
from farout.data.file_listing import check_keys, encode_groups, encode_labels

__all__ = [
    "GROUP_COLUMNS",
    "KEY_COLUMNS",
    "LABEL_COLUMNS",
    "PATH_COLUMNS",
    "attach_class_names",
    "find_column",
    "find_columns",
    "join_names",
    "read_groups",
    "read_keys",
    "read_labels",
    "warn_about_source",
]

PATH_COLUMNS = (
    *("path", "file_path", "filepath", "image_path", "img_path", "file_name", "filename", "image_file", "image_name"),
    *("file", "image", "img", "key", "id"),
)
"""Columns with the paths of image files, the first that exists is used."""

LABEL_COLUMNS = (
    *("label", "labels", "target", "targets", "class", "class_name", "class_label", "category", "y", "fine_label"),
    "cls",
)
"""Columns with labels, the first that exists is used."""

GROUP_COLUMNS = ("group", "groups", "patient", "patient_id", "subject", "subject_id", "video", "video_id")
"""Columns with groups, the first that exists is used."""

KEY_COLUMNS = ("key", "__key__")
"""Columns with keys."""

ReadColumn = Callable[[str], Sequence[object]]
"""Returns the values of a column."""


def join_names(names: Sequence[str]) -> str:
    """Return names for a message; long and many names are cut."""
    shown = [name if len(name) <= 60 else f"{name[:60]}…" for name in names[:16]]
    return ", ".join([*shown, *([f"and {len(names) - 16} more"] if len(names) > 16 else [])]) or "none"


def find_columns(columns: Sequence[str], candidates: Sequence[str]) -> list[str]:
    """Return the columns whose name is a candidate, in the order of the candidates.

    Case, surrounding spaces, and the characters between words are not significant: `File Name` is `file_name`.
    """
    normalized = [_normalize(name) for name in columns]
    return [column for name in candidates for column, normal in zip(columns, normalized) if normal == name]


def _normalize(column: str) -> str:
    return re.sub(r"[\s-]+", "_", normalize_name(column).strip().casefold())


def find_column(name: str, columns: Sequence[str], where: str, modifier: str) -> str:
    """Return the column that a modifier names, exactly or else as `find_columns` compares; raises SourceError."""
    alike = [column for column in columns if _normalize(column) == _normalize(name)]
    if name in columns or len(alike) == 1:
        return name if name in columns else alike[0]
    raise SourceError(f"{where} has no column {name!r} (@{modifier}={name}); its columns are {join_names(columns)}")


def read_labels(
    columns: Sequence[str], read: ReadColumn, where: str, *, chosen: str = "", others: Sequence[str] = ()
) -> tuple[str, tuple[int, ...] | None, tuple[str, ...] | None]:
    """Return the column of the labels (empty: none), the labels and the class names.

    Labels that are all -1, the hub's mark of a split whose labels are withheld, are no labels, with a warning.

    Args:
        columns: names of all columns.
        read: returns the values of a column.
        where: the file, for messages.
        chosen: the column that the user has named.
        others: columns of no known meaning, one of which may contain labels.
    """
    if chosen:
        column = find_column(chosen, columns, where, "label")
    else:
        found = find_columns(columns, LABEL_COLUMNS)
        if not found:
            if others:
                warn_about_source(
                    f"{where} has no labels: none of the columns {join_names(others)} is called "
                    f"{_join(LABEL_COLUMNS)}; if one contains labels, add @label={others[0]}"
                )
            return "", None, None
        column = found[0]
        if len(found) > 1:
            warn_about_source(
                f"{where} has several columns of labels: {', '.join(found)}; {column} is used, add @label={found[1]} "
                "for another"
            )
    labels, names = encode_labels(read(column), f"{where}, column {column}")
    if all(label == -1 for label in labels) and names is None:
        warn_about_source(f"{where}, column {column}: all labels are -1 (withheld), so that the images have no labels")
        return column, None, None
    return column, labels, names


def attach_class_names(
    labels: tuple[int, ...], names: tuple[str, ...] | None, declared: tuple[str, ...] | None, where: str
) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
    """Return labels and class names, the names being `declared` outside the column if the labels are integers.

    A label of -1 (unknown) has no name, and causes a warning. Raises SourceError for other labels beyond the names.
    """
    if declared is None or names is not None:
        return labels, names
    wrong = next((row for row, label in enumerate(labels) if not -1 <= label < len(declared)), None)
    if wrong is not None:
        raise SourceError(
            f"{where} has the label {labels[wrong]} in row {wrong}, but {len(declared)} class names are declared; "
            f"expected 0 to {len(declared) - 1}"
        )
    unknown = labels.count(-1)
    if unknown:
        warn_about_source(
            f"{where}: {unknown} of {len(labels)} labels are -1 (unknown), which is kept as a class of its own; "
            f"@classes=0-{len(declared) - 1} leaves them out"
        )
    return labels, declared


def read_groups(columns: Sequence[str], read: ReadColumn, where: str) -> tuple[str, tuple[str, ...] | None]:
    """Return the column of the groups (empty: none) and the groups; a column `group` must be complete."""
    found = find_columns(columns, GROUP_COLUMNS)
    if not found:
        return "", None
    column = found[0]
    try:
        return column, encode_groups(read(column), f"{where}, column {column}")
    except SourceError as error:
        if find_columns([column], ("group", "groups")):
            raise
        warn_about_source(f"{error}; the column is not used as the group")
        return column, None


def read_keys(columns: Sequence[str], read: ReadColumn, where: str) -> tuple[str, ...] | None:
    """Return the keys in the column `key` or `__key__`, None without it; raises SourceError for empty or equal keys."""
    found = find_columns(columns, KEY_COLUMNS)
    if not found:
        return None
    column = found[0]
    values = read(column)
    for row, value in enumerate(values):
        if not isinstance(value, str | int) or value == "":
            raise SourceError(
                f"{where}, column {column} contains {value!r} in row {row}; expected the key of every image, a text or "
                "an integer"
            )
    texts = map(str, values)
    keys = [text if encode_key(decode_key(text)) == text else encode_key(text) for text in texts]  # or keys of farout
    return check_keys(keys, f"{where}, column {column}")


def warn_about_source(message: str) -> None:
    """Give a SourceWarning, attributed to the caller of `open_source`."""
    warnings.warn(message, SourceWarning, stacklevel=2)


def _join(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
