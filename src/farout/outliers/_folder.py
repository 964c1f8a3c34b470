"""Folders of made images: class by class, with a manifest, and how they were made."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from torch import Tensor

from farout import store
from farout.diffusion.sample_folder import folder_names, save_png, write_class_names
from farout.errors import StoreError
from farout.images.sources import ImageSource, open_source

__all__ = ["ImageWriter", "MadeFolder", "OutlierFolder", "ReconstructedFolder", "read_outliers"]

_IMAGES, _MANIFEST, _WORKING = "images", "manifest.csv", ".working"
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
        return open_source(self.folder / _IMAGES)

    def settings(self) -> dict[str, Any]:
        """`config.json`: method, its configuration, seed, and the hashes of images and models."""
        return store.read_config(self.folder, self.kind)

    def manifest(self) -> pd.DataFrame:
        """A row per image: key (its path within `images/`), source (key of the image it was made of, or empty), label
        (number of its class in the generator), class_name, seed, index, what else varies by image, and every parameter.

        Raises StoreError where the manifest is missing.
        """
        path = self.folder / _MANIFEST
        if not path.is_file():
            raise StoreError(f"{path} is missing: no image has been made yet, or the folder is incomplete")
        found = pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str), keep_default_na=False, encoding="utf-8")
        settings = self.settings()
        names = ("method", "diffusion", "classifier", "rows", "precision")
        about = {name: settings[name] for name in names if name in settings}
        fixed = {name: value for name, value in {**settings["config"], **about}.items() if name not in found}
        return found.assign(**{name: [value] * len(found) for name, value in fixed.items()})


class OutlierFolder(MadeFolder):
    """A folder of outliers, as a synthesiser fills it."""

    kind = "outliers"


class ReconstructedFolder(MadeFolder):
    """A folder of images made again; `source` in its manifest is the key of the image that each was."""

    kind = "reconstructions"


def read_outliers(folder: str | Path) -> OutlierFolder:
    """Opens a folder of outliers; raises StoreError for a missing folder, or one of another kind."""
    path = Path(folder)
    store.read_config(path, OutlierFolder.kind)
    rows = len(_read_rows(path)[1])
    return OutlierFolder(path, rows, rows, 0)


class ImageWriter:
    """Fills a folder of made images; what is there already is not made again.

    The rows of a batch are written before its images: every image has its row, and a row without image is forgotten.

    Args:
        folder: the folder.
        class_names: of all classes, in the order of their numbers; none: the images have no classes.
        seed: of the run.
        kind: of the folder.
    """

    def __init__(self, folder: str | Path, class_names: Sequence[str], seed: int, kind: str) -> None:
        self.folder, self.class_names, self.seed, self.kind = Path(folder), tuple(class_names), seed, kind
        self._folders = folder_names(self.class_names)
        self._columns: tuple[str, ...] = ()
        self._rows: dict[int, dict[str, str]] = {}

    def begin(self, settings: Mapping[str, Any], about: Mapping[str, Any], *, resume: bool) -> None:
        """Opens the folder.

        Args:
            settings: all that decides the images; a resumed run must have the same.
            about: what else `config.json` says.
            resume: go on where an earlier run stopped.

        Raises StoreError where something else is in the folder, such images are in it already and `resume` is not set,
        or these were made otherwise.
        """
        store.check_replaceable(self.folder, self.kind)
        if (self.folder / "config.json").is_file() and not resume:
            raise StoreError(
                f"{self.folder} holds {self.kind} already; give --resume (resume=True) to go on, or another folder"
            )
        store.resume_config(self.folder, self.kind, settings, about)
        write_class_names(self.folder / _IMAGES, self.class_names)
        self._columns, self._rows = _read_rows(self.folder)
        if self._columns:
            self._rewrite()

    def key(self, index: int, label: int | None) -> str:
        """Where image number `index` lies within `images/`."""
        return f"{index:06d}.png" if label is None else f"{self._folders[label]}/{index:06d}.png"

    def missing(self, count: int) -> list[int]:
        """The numbers below `count` that have no image yet."""
        return [index for index in range(count) if index not in self._rows]

    @property
    def images(self) -> int:
        """How many images are there."""
        return len(self._rows)

    def write(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None,
        images: Tensor,
        sources: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> None:
        """Adds images (B, C, H, W) in [0, 1] with their rows; those that are there stay as they are.

        Args:
            indices: their numbers.
            labels: their classes; None: they have none, and neither has the folder.
            images: the images.
            sources: the keys of those that they were made of.
            columns: what else varies by image.
        """
        classes = [None] * len(indices) if labels is None else labels
        rows = [
            {
                **{"key": self.key(index, label), "source": source, **self._told(label)},
                **{"seed": self.seed, "index": index},
                **{name: values[place] for name, values in columns.items()},
            }
            for place, (index, label, source) in enumerate(zip(indices, classes, sources, strict=True))
        ]
        fresh = [(row, image) for row, image in zip(rows, images, strict=True) if row["index"] not in self._rows]
        self._append([row for row, _ in fresh])
        for row, image in fresh:
            save_png(image, self.folder / _IMAGES / row["key"], self.folder / _WORKING)
            self._rows[int(row["index"])] = {name: str(value) for name, value in row.items()}

    def _told(self, label: int | None) -> dict[str, Any]:
        if label is None:
            return {"label": "", "class_name": ""}
        return {"label": label, "class_name": self.class_names[label]}

    def illustrate(self, indices: Sequence[int], pictures: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Adds pictures (C, H, W) in [0, 1] that tell of images: `<name>/<number>.png` within the folder."""
        for name, several in pictures.items():
            for index, picture in zip(indices, several, strict=True):
                if picture is not None:
                    save_png(picture, self.folder / name / f"{index:06d}.png", self.folder / _WORKING)

    def _append(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        columns, fresh = tuple(rows[0]), not self._columns
        if not fresh and columns != self._columns:
            raise StoreError(f"{self.folder / _MANIFEST} has the columns {self._columns}, expected {columns}")
        self._columns = columns
        with (self.folder / _MANIFEST).open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerows(rows)

    def finish(self) -> None:
        """Writes the manifest anew, in the order of the images' numbers."""
        if self._columns:
            self._rewrite()

    def _rewrite(self) -> None:
        with (
            store.atomic_file(self.folder / _MANIFEST) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows[index] for index in sorted(self._rows))


def _read_rows(folder: Path) -> tuple[tuple[str, ...], dict[int, dict[str, str]]]:
    """Columns, and the rows of the images that are there by number; what an interruption has cut short is left out."""
    path = folder / _MANIFEST
    if not path.is_file():
        return (), {}
    whole = "".join(path.read_text(encoding="utf-8").rpartition("\n")[:2])
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    columns = tuple(reader.fieldnames or ())
    if columns and columns[: len(_HEAD)] != _HEAD:
        raise StoreError(f"{path} is no manifest of made images: it begins with {', '.join(columns[:6])}")
    rows = [row for row in reader if None not in row and None not in row.values()]
    return columns, {int(row["index"]): row for row in rows if (folder / _IMAGES / row["key"]).is_file()}
