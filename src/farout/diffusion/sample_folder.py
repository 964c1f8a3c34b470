"""A folder of sampled images, one subfolder per class: a resumable run whose result is an image source."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from farout.core import progress, store
from farout.core.chunking import blocks_containing
from farout.core.errors import FaroutError
from farout.core.files import has_content
from farout.core.names import expand_path
from farout.data.decoding import save_png
from farout.data.file_names import is_system_folder
from farout.data.folder_layout import find_masks
from farout.data.folders import CLASSES_FILE
from farout.diffusion.sampling import Sampler

__all__ = ["KIND", "SampledFolder", "class_folder_names", "write_class_names", "write_samples"]

KIND = "samples"
_MANIFEST = "manifest.jsonl"
_WORKING = ".working"
_MAX_COLUMNS, _MAX_ROWS, _CELL_SIZE, _MAX_NAME_LENGTH = 10, 20, 48, 24
"""Of the contact sheet: images per row, rows, pixels to which small images are enlarged, characters of a class name."""


@dataclass(frozen=True)
class SampledFolder:
    """Result of `write_samples`.

    Attributes:
        folder: the folder of the images.
        images: number of images in the folder, including those of an earlier, longer run.
        requested: number of images that were requested.
        new: number of images that were sampled by this call.
        contact_sheet: the contact sheet, if it was requested.
    """

    folder: Path
    images: int
    requested: int
    new: int
    contact_sheet: Path | None


def write_samples(
    sampler: Sampler,
    out: str | Path,
    count: int,
    *,
    classes: Sequence[int] | None = None,
    contact_sheet: bool = False,
) -> SampledFolder:
    """Samples images 0 to count - 1 into `out`; images that exist are not sampled again.

    Image i of a class-conditional model is of class `classes[i % len(classes)]` and is written to the subfolder of that
    class. A larger count adds images, a smaller one keeps those of an earlier run. `config.json` has the settings, and
    `manifest.jsonl` one line per image: key, index, label, class, seed, solver, steps, guidance, model (its hash).

    Args:
        sampler: samples the images.
        out: the folder.
        count: number of images, all classes together.
        classes: labels of the sampled classes; None: all classes of a conditional model.
        contact_sheet: also write `<out>-contact-sheet.png` next to the folder, a contact sheet with one row per class.

    Raises:
        FaroutError: for a count below 1, an empty list of classes or unknown ones, and images with NaN.
        StoreError: if `out` contains something else, or images with other settings.
    """
    if count < 1:
        raise FaroutError(f"count must be 1 or more, got {count}")
    if classes is not None and not classes:
        raise FaroutError("classes is empty; give at least one, or None for all classes of the model")
    conditioning = sampler.model.conditioning
    if classes is None and conditioning is not None:
        classes = range(conditioning.num_classes)
    sampler.condition(None if classes is None else list(classes))
    layout = _FolderLayout(sampler, expand_path(out), None if classes is None else tuple(classes))
    layout.open()
    missing = {index for index in range(count) if not has_content(layout.path(index))}
    with progress.task(f"images into {out}", len(missing)) as bar:
        for indices in blocks_containing(missing, sampler.images_per_batch, count):
            images = sampler.sample_images(indices, layout.labels(indices))
            for index, image in zip(indices, images, strict=True):
                if index in missing:
                    save_png(image, layout.path(index), layout.out / _WORKING)
                    bar.advance()
    total = layout.write_manifest()
    return SampledFolder(
        layout.out, total, count, len(missing), layout.write_contact_sheet(count) if contact_sheet else None
    )


class _FolderLayout:
    """Maps the index of an image to its class and its file, and writes the files of the folder."""

    def __init__(self, sampler: Sampler, out: Path, classes: tuple[int, ...] | None) -> None:
        self.sampler, self.out, self.classes = sampler, out, classes
        conditioning = sampler.model.conditioning
        self.names = () if conditioning is None else conditioning.class_names
        self.folders = class_folder_names(self.names)
        self.model_hash = sampler.model.content_hash

    def labels(self, indices: Sequence[int]) -> list[int] | None:
        if self.classes is None:
            return None
        return [self.classes[index % len(self.classes)] for index in indices]

    def key(self, index: int) -> str:
        labels = self.labels([index])
        return f"{index:06d}.png" if labels is None else f"{self.folders[labels[0]]}/{index:06d}.png"

    def path(self, index: int) -> Path:
        return self.out / self.key(index)

    def settings(self) -> dict[str, Any]:
        """All settings that decide the pixels."""
        sampler = self.sampler
        return {
            "model": self.model_hash,
            "classes": None if self.classes is None else [self.names[label] for label in self.classes],
            **sampler.settings,
            "seed": sampler.seed,
            "precision": sampler.precision,
            "device": sampler.model.device.type,
        }

    def open(self) -> None:
        """Creates or resumes the folder; raises StoreError if it contains something else."""
        store.resume_config(self.out, KIND, self.settings())
        write_class_names(self.out, self.names)

    def write_manifest(self) -> int:
        """Writes a line for every image in the folder, also those of an earlier, longer run; returns their number."""
        lines = [f"{json.dumps(entry)}\n" for entry in self._entries()]
        with store.atomic_file(self.out / _MANIFEST) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        return len(lines)

    def _entries(self) -> Iterator[dict[str, Any]]:
        settings = {name: self.settings()[name] for name in ("seed", "solver", "steps", "guidance", "model")}
        for index in sorted({int(path.stem) for path in self.out.rglob("*.png") if path.stem.isdecimal()}):
            if has_content(self.path(index)):
                labels = self.labels([index])
                class_entry = {} if labels is None else {"label": labels[0], "class": self.names[labels[0]]}
                yield {"key": self.key(index), "index": index, **class_entry, **settings}

    def write_contact_sheet(self, count: int) -> Path:
        """Writes the first images of each class in one row; those of an unconditional model fill a square."""
        if self.classes is None:
            columns = min(_MAX_COLUMNS, round(count**0.5) or 1)
            rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)][:columns]
        else:
            step = len(self.classes)
            rows = [range(first, count, step)[:_MAX_COLUMNS] for first in range(min(step, count, _MAX_ROWS))]
        name = f"{self.out.resolve().name}-contact-sheet.png"
        path = self.out.parent / name if self.out.name not in ("", "..") else self.out.resolve().with_name(name)
        with store.atomic_file(path) as temporary:
            sheet = _draw_contact_sheet([[self.path(index) for index in row] for row in rows])
            if self.classes is not None:
                sheet = _add_row_names(sheet, [self.names[label] for label in self.classes[: len(rows)]])
            sheet.save(temporary, "PNG")
        return path


def class_folder_names(names: Sequence[str]) -> list[str]:
    """A folder name per class that is valid on every file system; `T-shirt/top` becomes `T-shirt_top`.

    No name is `images`, because of a farout folder with such a subfolder only that one is read, and none is taken for
    a folder of masks or of a system, whose images are not read.
    """
    plain = [re.sub(r"[^\w +.-]", "_", name).lstrip(" .+-").rstrip(" .")[:80] for name in names]
    masks = {path.partition("/")[0] for path in find_masks([f"{name}/{i}.png" for i, name in enumerate(plain)])}
    lowered = ["", "images", *(name.lower() for name in plain)]
    return [
        f"{number}-{name}" if lowered.count(name.lower()) > 1 or name in masks or is_system_folder(name) else name
        for number, name in enumerate(plain)
    ]


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Writes a file with the class names that differ from their folder names, so that reading restores the names."""
    renamed = {plain: name for plain, name in zip(class_folder_names(names), names, strict=True) if plain != name}
    if renamed:
        store.write_json(folder / CLASSES_FILE, renamed)


def _draw_contact_sheet(rows: Sequence[Sequence[Path]]) -> Image.Image:
    """Images in rows with gaps of two gray pixels; small ones are enlarged by an integer factor to about 48 pixels."""
    images_by_row = [[np.asarray(Image.open(path).convert("RGB")) for path in row] for row in rows]
    height, width = images_by_row[0][0].shape[:2]
    factor, gap = max(1, _CELL_SIZE // max(height, width)), 2
    tall, wide = height * factor + gap, width * factor + gap
    sheet = np.full((len(rows) * tall + gap, max(map(len, rows)) * wide + gap, 3), 128, dtype=np.uint8)
    for i, row in enumerate(images_by_row):
        for j, image in enumerate(row):
            large = image.repeat(factor, 0).repeat(factor, 1)
            sheet[i * tall + gap : (i + 1) * tall, j * wide + gap : (j + 1) * wide] = large
    return Image.fromarray(sheet)


def _add_row_names(sheet: Image.Image, names: Sequence[str]) -> Image.Image:
    """The sheet with the name of each row on the left."""
    font, shown = ImageFont.load_default(), [name[:_MAX_NAME_LENGTH] for name in names]
    # the default font of a Pillow without FreeType has only Latin letters
    shown = [name.encode("latin-1", "replace").decode("latin-1") for name in shown]
    margin = int(max(font.getlength(name) for name in shown)) + 8
    wide = Image.new("RGB", (sheet.width + margin, sheet.height), (128, 128, 128))
    wide.paste(sheet, (margin, 0))
    draw, tall = ImageDraw.Draw(wide), sheet.height / len(names)
    for number, name in enumerate(shown):
        draw.text((4, int((number + 0.5) * tall) - 5), name, fill=(255, 255, 255), font=font)
    return wide
