"""Small image files for the tests of the image room."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image


def encode(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return out.getvalue()


def pixels(count: int, channels: int = 1, side: int = 8, seed: int = 0) -> torch.Tensor:
    shape = (count, channels, side, side)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def write_folder(root: Path, images: torch.Tensor, names: list[str]) -> Path:
    for image, name in zip(images, names, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(image).save(root / name)
    return root


def write_parquet(path: Path, images: torch.Tensor, labels=None, names=None, row_group=1000, **columns) -> Path:
    cells = [{"bytes": encode(picture(image), "PNG"), "path": None} for image in images]
    data = {"image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), **columns}
    if labels is not None:
        data["label"] = pa.array(labels)
    table = pa.table(data)
    if names is not None:
        feature = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group)
    return path
