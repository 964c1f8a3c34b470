"""Fills a folder of made images while the next ones are made."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from farout.core import store
from farout.core.devices import ProcessGroup
from farout.core.errors import StoreError
from farout.data.decoding import save_png
from farout.diffusion.sample_folder import folder_names, write_class_names
from farout.synthesis.outlier_folder import IMAGES, MANIFEST, Rows, read_rows

__all__ = ["ImageWriter"]

_WORKING, _PART = ".working", "manifest.{}.csv"
_THREADS = 4


class ImageWriter:
    """Fills a folder of made images; what is there already is not made again.

    A few threads encode and write the images of a batch while the next batch is made: `write` waits for those of the
    call before, so that two batches are held at most, and raises what went wrong with them. An image's row comes into
    the manifest once the image stands; an image without row is made anew, as is a row without image. It is used in a
    `with` block, which waits for what is being written, also after an error or an interruption.

    Several processes fill one folder, each with images of its own. The rows of the others stand in `manifest.1.csv` and
    so on until the first process makes one manifest of all: when they are done, and when work goes on.

    Args:
        folder: the folder.
        class_names: of all classes, in the order of their numbers; none: the images have no classes.
        seed: of the run.
        kind: of the folder.
        processes: the processes that fill it; None: this one.
    """

    def __init__(
        self,
        folder: str | Path,
        class_names: Sequence[str],
        seed: int,
        kind: str,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.folder, self.class_names, self.seed, self.kind = Path(folder), tuple(class_names), seed, kind
        self.processes = ProcessGroup(torch.device("cpu")) if processes is None else processes
        self._manifest = self.folder / (
            MANIFEST if self.processes.is_main_process else _PART.format(self.processes.process_index)
        )
        self._folders = folder_names(self.class_names)
        self._columns: tuple[str, ...] = ()
        self._rows: dict[int, dict[str, str]] = {}
        self._pool = ThreadPoolExecutor(_THREADS, "images")
        self._pending: list[tuple[dict[str, Any], Future[None]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settle()
        finally:
            self._pool.shutdown()

    def begin(self, settings: Mapping[str, Any], about: Mapping[str, Any], *, resume: bool) -> None:
        """Opens the folder, for all processes.

        Args:
            settings: all that decides the images; a resumed run must have the same.
            about: what else `config.json` says.
            resume: go on where an earlier run stopped.

        Raises StoreError where something else is in the folder, such images are in it already and `resume` is not set,
        or these were made otherwise.
        """
        self._columns, self._rows = self.processes.run_on_main_process(lambda: self._open(settings, about, resume))

    def _open(self, settings: Mapping[str, Any], about: Mapping[str, Any], resume: bool) -> Rows:
        store.check_replaceable(self.folder, self.kind)
        if (self.folder / "config.json").is_file() and not resume:
            raise StoreError(
                f"{self.folder} holds {self.kind} already; give --resume (resume=True) to continue, or another folder"
            )
        store.resume_config(self.folder, self.kind, settings, about)
        write_class_names(self.folder / IMAGES, self.class_names)
        for left in self.folder.glob(f"{_WORKING}*"):  # by a run that was killed
            left.unlink()
        return self._join()

    def key(self, index: int, label: int | None) -> str:
        """Where image number `index` lies within `images/`."""
        return f"{index:06d}.png" if label is None else f"{self._folders[label]}/{index:06d}.png"

    def missing(self, count: int) -> list[int]:
        """The numbers below `count` that have no image yet; the same in all processes, when the folder is opened."""
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
        pictures: Mapping[str, Sequence[Tensor | None]] | None = None,
    ) -> None:
        """Adds images (B, C, H, W) in [0, 1] with their rows; those that are there stay as they are.

        Args:
            indices: their numbers.
            labels: their classes; None: they have none, and neither has the folder.
            images: the images.
            sources: the keys of those that they were made of.
            columns: what else varies by image.
            pictures: (C, H, W) in [0, 1] that tell of some of them: `<name>/<number>.png` within the folder.

        Raises StoreError where the images of the call before could not be written.
        """
        self._settle()
        classes = [None] * len(indices) if labels is None else labels
        for place, (index, label, source) in enumerate(zip(indices, classes, sources, strict=True)):
            if index not in self._rows:
                row = {
                    **{"key": self.key(index, label), "source": source, **self._told(label)},
                    **{"seed": self.seed, "index": index},
                    **{name: values[place] for name, values in columns.items()},
                }
                told = {name: several[place] for name, several in (pictures or {}).items()}
                self._pending.append((row, self._pool.submit(self._save, row, images[place], told)))

    def _told(self, label: int | None) -> dict[str, Any]:
        if label is None:
            return {"label": "", "class_name": ""}
        return {"label": label, "class_name": self.class_names[label]}

    def _save(self, row: Mapping[str, Any], image: Tensor, pictures: Mapping[str, Tensor | None]) -> None:
        """In a thread: the image of a row, after the pictures that tell of it."""
        number = f"{row['index']:06d}"
        working = self.folder / f"{_WORKING}-{number}"
        for name, picture in pictures.items():
            if picture is not None:
                save_png(picture, self.folder / name / f"{number}.png", working)
        save_png(image, self.folder / IMAGES / row["key"], working)

    def _settle(self) -> None:
        """Waits for the images that are being written, and adds the rows of those that stand."""
        wait([future for _, future in self._pending])
        pending, self._pending = self._pending, []
        with self._explained():
            self._append([row for row, future in pending if future.exception() is None])
            for _, future in pending:
                future.result()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says of a disk that is full, or cannot be written to, what is there and how to go on."""
        try:
            yield
        except OSError as error:
            known = f"at least {self.images}" if self.processes.num_processes > 1 else self.images
            raise StoreError(
                f"{self.folder} cannot be written to: {error.strerror or error}; {known} images are complete, "
                "and the same command with --resume (resume=True) continues from there"
            ) from error

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows to this process's manifest: all, or none."""
        if rows:
            self._agree(tuple(rows[0]))
            _add_to(self._manifest, self._columns, rows)
            self._rows |= {int(row["index"]): {name: str(value) for name, value in row.items()} for row in rows}

    def _agree(self, columns: tuple[str, ...]) -> None:
        if self._columns and columns != self._columns:
            raise StoreError(f"{self.folder / MANIFEST} has the columns {self._columns}, expected {columns}")
        self._columns = columns

    def finish(self) -> None:
        """Waits for the last images, of all processes, and writes one manifest in the order of their numbers."""
        self._settle()
        self.processes.wait_for_everyone()
        self._columns, self._rows = self.processes.run_on_main_process(self._join)

    def _join(self) -> Rows:
        """One manifest of those of all processes."""
        parts = sorted(self.folder.glob(_PART.format("*")))
        for name in [MANIFEST, *(part.name for part in parts)]:
            columns, rows = read_rows(self.folder, name)
            if columns:
                self._agree(columns)
                self._rows |= rows
        if self._columns:
            text = _table(self._columns, [self._rows[index] for index in sorted(self._rows)], head=True)
            with self._explained(), store.atomic_file(self.folder / MANIFEST) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="")
        for part in parts:
            part.unlink()
        return self._columns, self._rows


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, head: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if head:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _add_to(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to a file, which after an error is what it was."""
    before = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(_table(columns, rows, head=not before))
    except OSError:
        if before:
            os.truncate(path, before)
        else:
            path.unlink(missing_ok=True)
        raise
