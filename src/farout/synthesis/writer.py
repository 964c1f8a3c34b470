"""Writes generated images and their manifest in background threads while the next batch is computed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from farout.core import store
from farout.core.csv_files import format_rows
from farout.core.devices import ProcessGroup
from farout.core.errors import StoreError
from farout.core.names import expand_path
from farout.data.decoding import save_png
from farout.diffusion.sample_folder import class_folder_names, write_class_names
from farout.synthesis.generated_folder import IMAGES, MANIFEST, ManifestRows, read_manifest_rows

__all__ = ["ImageWriter"]

_TEMPORARY_PREFIX = ".working"
_PARTIAL_MANIFEST = "manifest.{}.csv"
_THREADS = 4


class ImageWriter:
    """Writes a folder of generated images; images that exist are not written again.

    `write` encodes and writes a batch in a few threads while the caller computes the next one. It first waits for the
    previous batch, so that at most two batches are in memory, and raises the errors of that batch. A row is added to
    the manifest after its image is on disk; an image without a row, or a row without an image, counts as missing. Use
    the writer in a `with` block, which waits for pending images even after an error or an interruption.

    Several processes can fill one folder, each with images of its own. Processes other than the first append to
    `manifest.1.csv` and so on; the first process merges these files when all are done, and when a run is resumed.

    Args:
        folder: the output folder.
        class_names: names of all classes in the order of their labels; empty: images have no classes.
        seed: seed of the run.
        kind: kind of the folder.
        processes: the processes that fill the folder; None: only this one.
    """

    def __init__(
        self,
        folder: str | Path,
        class_names: Sequence[str],
        seed: int,
        kind: str,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.folder, self.class_names, self.seed, self.kind = expand_path(folder), tuple(class_names), seed, kind
        self.processes = ProcessGroup(torch.device("cpu")) if processes is None else processes
        self._manifest = self.folder / (
            MANIFEST if self.processes.is_main_process else _PARTIAL_MANIFEST.format(self.processes.process_index)
        )
        self._class_folders = class_folder_names(self.class_names)
        self._columns: tuple[str, ...] = ()
        self._rows: dict[int, dict[str, str]] = {}
        self._pool = ThreadPoolExecutor(_THREADS, "images")
        self._pending: list[tuple[dict[str, Any], Future[None]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._finish_pending()
        finally:
            self._pool.shutdown()

    def begin(self, settings: Mapping[str, Any], about: Mapping[str, Any], *, resume: bool) -> None:
        """Open the folder, for all processes.

        Args:
            settings: everything that determines the images; a resumed run must have the same values.
            about: further content of `config.json`.
            resume: continue an earlier run.

        Raises StoreError if the folder contains other files, contains such images and `resume` is not set, or contains
        images that were generated with other settings.
        """

        def open_folder() -> ManifestRows:
            store.check_replaceable(self.folder, self.kind)
            if (self.folder / "config.json").is_file() and not resume:
                raise StoreError(
                    f"{self.folder} already contains {self.kind}; give --resume (resume=True) to continue, or another "
                    "folder"
                )
            store.resume_config(self.folder, self.kind, settings, about)
            write_class_names(self.folder / IMAGES, self.class_names)
            for path in self.folder.glob(f"{_TEMPORARY_PREFIX}*"):  # temporary files of a killed run
                path.unlink()
            return self._merge_manifests()

        self._columns, self._rows = self.processes.run_on_main_process(open_folder)

    def key(self, index: int, label: int | None) -> str:
        """Path of image `index` within `images/`."""
        return f"{index:06d}.png" if label is None else f"{self._class_folders[label]}/{index:06d}.png"

    def missing_indices(self, count: int) -> list[int]:
        """The indices below `count` without an image; the same in all processes after `begin`."""
        return [index for index in range(count) if index not in self._rows]

    @property
    def num_images(self) -> int:
        """The number of images in the folder."""
        return len(self._rows)

    def write(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None,
        images: Tensor,
        sources: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        extra_images: Mapping[str, Sequence[Tensor | None]] | None = None,
    ) -> None:
        """Add images and their rows; images that exist stay unchanged.

        Args:
            indices: indices of the images.
            labels: their classes; None for a folder without classes.
            images: (B, C, H, W) in [0, 1].
            sources: keys of their source images.
            columns: additional columns, one value per image.
            extra_images: additional images (C, H, W) in [0, 1], written to `<name>/<index>.png` within the folder.

        Raises StoreError if the images of the previous call could not be written.
        """
        self._finish_pending()
        for position, (index, source) in enumerate(zip(indices, sources, strict=True)):
            if index in self._rows:
                continue
            label = None if labels is None else labels[position]
            row = {
                "key": self.key(index, label),
                "source": source,
                "label": "" if label is None else label,
                "class_name": "" if label is None else self.class_names[label],
                "seed": self.seed,
                "index": index,
                **{name: values[position] for name, values in columns.items()},
            }
            extra = {name: tensors[position] for name, tensors in (extra_images or {}).items()}
            self._pending.append((row, self._pool.submit(self._save_images, row, images[position], extra)))

    def _save_images(self, row: Mapping[str, Any], image: Tensor, extra: Mapping[str, Tensor | None]) -> None:
        """Write the image of a row after its extra images; runs in a thread."""
        number = f"{row['index']:06d}"
        temporary = self.folder / f"{_TEMPORARY_PREFIX}-{number}"
        for name, extra_image in extra.items():
            if extra_image is not None:
                save_png(extra_image, self.folder / name / f"{number}.png", temporary)
        save_png(image, self.folder / IMAGES / row["key"], temporary)

    def _finish_pending(self) -> None:
        """Wait for the pending images, add the rows of those that were written, and raise the first error."""
        wait([future for _, future in self._pending])
        pending, self._pending = self._pending, []
        with self._explain_disk_errors():
            rows = [row for row, future in pending if future.exception() is None]
            if rows:
                self._set_columns(tuple(rows[0]))
                _append_rows(self._manifest, self._columns, rows)
                self._rows |= {int(row["index"]): {name: str(value) for name, value in row.items()} for row in rows}
            for _, future in pending:
                future.result()

    @contextmanager
    def _explain_disk_errors(self) -> Iterator[None]:
        """Convert an OSError, such as a full disk, to a StoreError that says how to continue."""
        try:
            yield
        except OSError as error:
            complete = f"at least {self.num_images}" if self.processes.num_processes > 1 else self.num_images
            raise StoreError(
                f"{self.folder} cannot be written to: {error.strerror or error}; {complete} images are complete, "
                "and the same command with --resume (resume=True) continues from there"
            ) from error

    def _set_columns(self, columns: tuple[str, ...]) -> None:
        if self._columns and columns != self._columns:
            raise StoreError(f"{self.folder / MANIFEST} has the columns {self._columns}, expected {columns}")
        self._columns = columns

    def finish(self) -> None:
        """Wait for the last images of all processes and write one manifest, sorted by index."""
        self._finish_pending()
        self.processes.wait_for_everyone()
        self._columns, self._rows = self.processes.run_on_main_process(self._merge_manifests)

    def _merge_manifests(self) -> ManifestRows:
        """Merge the manifests of all processes into one."""
        parts = sorted(self.folder.glob(_PARTIAL_MANIFEST.format("*")))
        for name in [MANIFEST, *(part.name for part in parts)]:
            columns, rows = read_manifest_rows(self.folder, name)
            if columns:
                self._set_columns(columns)
                self._rows |= rows
        if self._columns:
            text = format_rows(self._columns, [self._rows[index] for index in sorted(self._rows)], header=True)
            with self._explain_disk_errors(), store.atomic_file(self.folder / MANIFEST) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="")
        for part in parts:
            part.unlink()
        return self._columns, self._rows


def _append_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file; after an error the file is unchanged."""
    old_size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(format_rows(columns, rows, header=not old_size))
    except OSError:
        if old_size:
            os.truncate(path, old_size)
        else:
            path.unlink(missing_ok=True)
        raise
