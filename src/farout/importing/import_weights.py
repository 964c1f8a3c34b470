"""Imports a file of published weights: recognizes its layout, converts it, and writes a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from farout.core.errors import FaroutError
from farout.importing.checkpoint import check_finite, read_checkpoint
from farout.importing.imported import FormulaSchedule, Imported, ImportSettings
from farout.importing.layouts import LAYOUTS, recognize_layout

__all__ = ["ImportedFolder", "import_weights"]


@dataclass(frozen=True)
class ImportedFolder:
    """The folder of an imported model.

    Attributes:
        folder: the folder.
        layout: name of the layout that was recognized.
        summary: what is published in this layout.
        network: description of the network.
        parameters: number of parameters.
        assumed: what the file does not say and was assumed.
        next_command: a command that uses the folder.
    """

    folder: Path
    layout: str
    summary: str
    network: str
    parameters: int
    assumed: dict[str, str]
    next_command: str


def import_weights(
    source: str,
    *,
    out: str,
    kind: str = "auto",
    ema: bool = True,
    size: int | None = None,
    classes: tuple[str, ...] = (),
    null_class: bool | None = None,
    schedule: FormulaSchedule | None = None,
    beta_start: float | None = None,
    beta_end: float | None = None,
    train_steps: int | None = None,
    head_width: int | None = None,
    heads: int | None = None,
    first: str | None = None,
    backbone: str | None = None,
    backbone_weights: str | None = None,
    images: str | None = None,
) -> ImportedFolder:
    """Convert published weights of another program to a folder that farout loads.

    Nothing in the file is executed. What the file does not contain is assumed as in the published models of its layout,
    printed, and written to the folder's README.md.

    Args:
        source: a file of weights (.pth, .pt, .ckpt, .bin, .safetensors).
        out: folder of the model.
        kind: layout of the weights, such as `monai` (docs/importing.md lists them); `auto`: recognize it.
        ema: take averaged weights where the file has both.
        size: side of the images in pixels.
        classes: names of the classes, such as a,b; default: their numbers.
        null_class: whether the last row of the table of classes is the null condition.
        schedule: noise schedule of the training: `linear`, `scaled_linear`, `cosine` or `sigmoid`.
        beta_start: first beta of the noise schedule.
        beta_end: last beta of the noise schedule.
        train_steps: number of noise levels of the training; levels above 1000 are rescaled, as in improved-diffusion.
        head_width: channels of each attention head.
        heads: number of heads of every attention, instead of their width.
        first: lfdn: the checkpoint after the first epoch, for the likelihood-regret score.
        backbone: lfdn: backbone whose features the network was trained on; default: by their number, `b4` or
            `resnet50`.
        backbone_weights: lfdn: file of the backbone's weights, or folder of an imported EfficientNet; default: as for a
            detector.
        images: lfdn: source of the images that the network was trained on. The mean and covariance of their features,
            which a detector requires, are not in the file.
    """
    checkpoint = read_checkpoint(source, ema=ema)
    layout, selected = recognize_layout(checkpoint, kind)
    settings = ImportSettings(
        size=size,
        classes=tuple(classes),
        null_class=null_class,
        schedule=schedule,
        beta_start=beta_start,
        beta_end=beta_end,
        train_steps=train_steps,
        head_width=head_width,
        heads=heads,
        first=first,
        backbone=backbone,
        backbone_weights=backbone_weights,
        images=images,
    )
    settings.check(layout, LAYOUTS[layout].settings)
    if size is not None and not 1 <= size <= 4096:
        raise FaroutError(f"size must be 1 to 4096 pixels, got {size}")
    check_finite(selected.tensors, selected.path)
    imported: Imported = LAYOUTS[layout].import_function()(selected, settings, ema)
    imported.model.save(out)
    return ImportedFolder(
        Path(out),
        layout,
        LAYOUTS[layout].summary,
        imported.network,
        imported.model.parameters,
        imported.assumed,
        imported.next_command.replace("{out}", str(out)),
    )
