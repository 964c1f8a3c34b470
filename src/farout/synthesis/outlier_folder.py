"""Folders of made images: class by class, with a manifest, and how they were made."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from farout.core import store
from farout.core.errors import StoreError
from farout.data.image_source import ImageSource
from farout.data.sources import open_source

__all__ = [
    "IMAGES",
    "MANIFEST",
    "MadeFolder",
    "OutlierFolder",
    "ReconstructedFolder",
    "Rows",
    "read_outliers",
    "read_rows",
]

IMAGES, MANIFEST = "images", "manifest.csv"
"""Names within a folder of made images."""
Rows = tuple[tuple[str, ...], dict[int, dict[str, str]]]
"""Columns of a manifest, and its rows by the numbers of their images."""
_HEAD = ("key", "source", "label", "class_name", "seed", "index")
_TEXT = ("key", "source", "class_name")


@dataclass(frozen=True)
class MadeFolder:
    """A folder of made images: `config.json`, `manifest.csv`, `images/<class>/<number>.png`, without classes
    `images/<number>.png`.

    Attributes:
        folder: where it is.
        images: images that are there, those of an earlier, longer run included.
        asked: images asked for.
        made: images made in this call.
    """

    folder: Path
    images: int
    asked: int
    made: int

    kind: ClassVar[str]
    """What `config.json` calls such a folder."""

    def source(self) -> ImageSource:
        """The images with their classes as labels; keys are those of the manifest."""
        return open_source(self.folder / IMAGES)

    def settings(self) -> dict[str, Any]:
        """`config.json`: method, its configuration, seed, and the hashes of images and models."""
        return store.read_config(self.folder, self.kind)

    def manifest(self) -> pd.DataFrame:
        """A row per image: key (its path within `images/`), source (key of the image it was made of, or empty), label
        (number of its class in the generator), class_name, seed, index, what else varies by image, and every parameter.

        Raises StoreError where the manifest is missing.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            raise StoreError(f"{path} is missing: no image has been generated yet, or the folder is incomplete")
        found = pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str), keep_default_na=False, encoding="utf-8")
        settings = self.settings()
        names = ("method", "diffusion", "classifier", "precision")
        about = {name: settings[name] for name in names if name in settings}
        fixed = {name: value for name, value in {**settings["config"], **about}.items() if name not in found}
        return found.assign(**{name: [value] * len(found) for name, value in fixed.items()})


class OutlierFolder(MadeFolder):
    """A folder of outliers, as a synthesizer fills it."""

    kind = "outliers"


class ReconstructedFolder(MadeFolder):
    """A folder of images made again; `source` in its manifest is the key of the image that each was."""

    kind = "reconstructions"


def read_outliers(folder: str | Path) -> OutlierFolder:
    """Opens a folder of outliers; raises StoreError for a missing folder, or one of another kind."""
    path = Path(folder)
    store.read_config(path, OutlierFolder.kind)
    rows = len(read_rows(path)[1])
    return OutlierFolder(path, rows, rows, 0)


def read_rows(folder: Path, name: str = MANIFEST) -> Rows:
    """Columns, and the rows of the images that are there by number; what an interruption has cut short is left out."""
    path = folder / name
    if not path.is_file():
        return (), {}
    whole = "".join(path.read_text(encoding="utf-8").rpartition("\n")[:2])
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    columns = tuple(reader.fieldnames or ())
    if columns and columns[: len(_HEAD)] != _HEAD:
        raise StoreError(f"{path} is not a manifest of generated images: it begins with {', '.join(columns[:6])}")
    rows = [row for row in reader if None not in row and None not in row.values()]
    return columns, {int(row["index"]): row for row in rows if (folder / IMAGES / row["key"]).is_file()}
