"""A folder of sampled images, class by class: an image source itself, resumable, every image made once."""

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
from farout.data.decoding import save_png
from farout.data.readers import CLASSES_FILE
from farout.diffusion.sampling import Sampler

__all__ = ["KIND", "SampledFolder", "class_folder_names", "contact_sheet", "write_class_names", "write_samples"]

KIND = "samples"
_MANIFEST = "manifest.jsonl"
_WORKING = ".working"
_COLUMNS, _ROWS, _CELL, _LONGEST = 10, 20, 48, 24


@dataclass(frozen=True)
class SampledFolder:
    """What `write_samples` did. images: that are there now, those of an earlier, longer run included; asked: for how
    many; made: in this call; grid: the contact sheet.
    """

    folder: Path
    images: int
    asked: int
    made: int
    grid: Path | None


def write_samples(
    sampler: Sampler,
    out: str | Path,
    count: int,
    *,
    classes: Sequence[int] | None = None,
    grid: bool = False,
) -> SampledFolder:
    """Makes images 0 to count - 1 into `out`, those that are there already not again.

    Image i of a class-conditional model is of class `classes[i % len(classes)]` and lies in the folder of that name; a
    larger count adds images, a smaller one leaves those that an earlier run has made. `config.json` says how they are
    made, and a line of `manifest.jsonl` what each one that is there is: key, index, label, class, seed, solver, steps,
    guidance, model (its hash).

    Args:
        sampler: how images are made.
        out: the folder.
        count: number of images, all classes together.
        classes: labels of the classes to make; None: all of a conditional model.
        grid: also write `<out>-grid.png`, beside the folder: some images of every class, a row a class.

    Raises:
        FaroutError: for a count below 1, classes that are empty or do not go with the model, and images that
            are not numbers.
        StoreError: where `out` holds something else, or images that were made in another way.
    """
    if count < 1:
        raise FaroutError(f"count is {count}; expected at least 1")
    if classes is not None and not classes:
        raise FaroutError("classes are empty; name at least one, or give None for all of the model's")
    conditioning = sampler.model.conditioning
    if classes is None and conditioning is not None:
        classes = range(conditioning.num_classes)
    sampler.condition(None if classes is None else list(classes))
    plan = _Plan(sampler, Path(out), None if classes is None else tuple(classes))
    plan.begin()
    missing = {index for index in range(count) if not plan.path(index).is_file()}
    with progress.task(f"images into {out}", len(missing)) as bar:
        for indices in blocks_containing(missing, sampler.images_per_batch, count):
            for index, image in zip(indices, sampler.images(indices, plan.labels(indices)), strict=True):
                if index in missing:
                    save_png(image, plan.path(index), plan.out / _WORKING)
                    bar.advance()
    there = plan.write_manifest()
    return SampledFolder(plan.out, there, count, len(missing), plan.write_grid(count) if grid else None)


class _Plan:
    """Which image is of which class and lies where."""

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
        """All that decides the pixels."""
        sampler = self.sampler
        return {
            "model": self.model_hash,
            "classes": None if self.classes is None else [self.names[label] for label in self.classes],
            **sampler.settings,
            "seed": sampler.seed,
            "precision": sampler.precision,
            "device": sampler.model.device.type,
        }

    def begin(self) -> None:
        """Opens the folder; raises StoreError where something else is in it."""
        store.resume_config(self.out, KIND, self.settings())
        write_class_names(self.out, self.names)

    def write_manifest(self) -> int:
        """A line for every image there is, also for those of an earlier, longer run, interrupted or not; returns how
        many there are.
        """
        lines = [f"{json.dumps(entry)}\n" for entry in self._entries()]
        with store.atomic_file(self.out / _MANIFEST) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        return len(lines)

    def _entries(self) -> Iterator[dict[str, Any]]:
        settings = {name: self.settings()[name] for name in ("seed", "solver", "steps", "guidance", "model")}
        for index in sorted({int(path.stem) for path in self.out.rglob("*.png") if path.stem.isdecimal()}):
            if self.path(index).is_file():
                labels = self.labels([index])
                about = {} if labels is None else {"label": labels[0], "class": self.names[labels[0]]}
                yield {"key": self.key(index), "index": index, **about, **settings}

    def write_grid(self, count: int) -> Path:
        """The first images, a row a class; those of an unconditional model fill a square."""
        if self.classes is None:
            columns = min(_COLUMNS, round(count**0.5) or 1)
            rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)][:columns]
        else:
            step = len(self.classes)
            rows = [range(first, count, step)[:_COLUMNS] for first in range(min(step, count, _ROWS))]
        path = self.out.resolve().with_name(f"{self.out.resolve().name}-grid.png")
        with store.atomic_file(path) as temporary:
            sheet = contact_sheet([[self.path(index) for index in row] for row in rows])
            if self.classes is not None:
                sheet = _named(sheet, [self.names[label] for label in self.classes[: len(rows)]])
            sheet.save(temporary, "PNG")
        return path


def class_folder_names(names: Sequence[str]) -> list[str]:
    """A folder name per class, safe on every file system; `T-shirt/top` is `T-shirt_top`. None is `images`, since
    nothing beside that is read in a folder that farout made.
    """
    plain = [re.sub(r"[^\w +.-]", "_", name).strip(" .")[:80] for name in names]
    lowered = ["", "images", *(name.lower() for name in plain)]
    return [name if lowered.count(name.lower()) == 1 else f"{number}-{name}" for number, name in enumerate(plain)]


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Leaves the names of classes beside their folders in `folder`, where they differ: read back, it has the classes
    that were written.
    """
    told = {plain: name for plain, name in zip(class_folder_names(names), names, strict=True) if plain != name}
    if told:
        store.write_json(folder / CLASSES_FILE, told)


def contact_sheet(rows: Sequence[Sequence[Path]]) -> Image.Image:
    """Pictures side by side, small ones enlarged by a whole factor to about 48 pixels, two pixels of grey between."""
    pictures = [[np.asarray(Image.open(path).convert("RGB")) for path in row] for row in rows]
    height, width = pictures[0][0].shape[:2]
    factor, gap = max(1, _CELL // max(height, width)), 2
    tall, wide = height * factor + gap, width * factor + gap
    sheet = np.full((len(rows) * tall + gap, max(map(len, rows)) * wide + gap, 3), 128, dtype=np.uint8)
    for i, row in enumerate(pictures):
        for j, picture in enumerate(row):
            large = picture.repeat(factor, 0).repeat(factor, 1)
            sheet[i * tall + gap : (i + 1) * tall, j * wide + gap : (j + 1) * wide] = large
    return Image.fromarray(sheet)


def _named(sheet: Image.Image, names: Sequence[str]) -> Image.Image:
    """A sheet of one row per name, with the names on its left."""
    font, shown = ImageFont.load_default(), [name[:_LONGEST] for name in names]
    # the font of a Pillow without FreeType has Latin letters only
    shown = [name.encode("latin-1", "replace").decode("latin-1") for name in shown]
    margin = int(max(font.getlength(name) for name in shown)) + 8
    wide = Image.new("RGB", (sheet.width + margin, sheet.height), (128, 128, 128))
    wide.paste(sheet, (margin, 0))
    draw, tall = ImageDraw.Draw(wide), sheet.height / len(names)
    for number, name in enumerate(shown):
        draw.text((4, int((number + 0.5) * tall) - 5), name, fill=(255, 255, 255), font=font)
    return wide
