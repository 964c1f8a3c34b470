"""Readers of Hugging Face Datasets: objects in Python, and folders written by `Dataset.save_to_disk`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from farout.core.errors import MissingExtraError, SourceError
from farout.core.names import find_path
from farout.core.store import read_json
from farout.data.columns import find_columns
from farout.data.file_listing import Listing
from farout.data.parquet_files import IMAGE_COLUMNS
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.source_spec import NO_SELECTION, Selection
from farout.data.tables import list_table
from farout.data.torch_datasets import list_dataset

__all__ = ["find_saved_dataset", "list_hub_dataset", "list_saved_dataset"]


def list_hub_dataset(
    dataset: Any,
    where: str = "the Dataset",
    reading: ReadSettings = DEFAULT_READING,
    selection: Selection = NO_SELECTION,
) -> Listing:
    """List a `datasets.Dataset`: by its image column, or as a Dataset of dicts if it has a transform or other types.

    Raises:
        SourceError: it is a DatasetDict, or has no images.
    """
    hub = sys.modules["datasets"]
    if isinstance(dataset, hub.DatasetDict | hub.IterableDatasetDict):
        splits = ", ".join(f"[{split!r}]" for split in dataset)
        raise SourceError(f"{where} contains several sets; give one of them: {splits or 'there is none'}")
    features = dataset.features
    if dataset.format["type"] == "custom":
        selection.check_used(where=where, kind="a Dataset with a transform")
        return list_dataset(dataset, reading=reading)
    images = [name for name, feature in features.items() if isinstance(feature, hub.Image)]
    if len(images) > 1 and not selection.column and not find_columns(images, IMAGE_COLUMNS):
        raise SourceError(
            f"{where} has several columns of images: {', '.join(images)}; keep one: in Python remove_columns([…]), "
            f"or of a folder with @column={images[0]}"
        )
    if images:
        return list_table(dataset.with_format(None), where, reading=reading, selection=selection)
    selection.check_used(where=where, kind="a Dataset without columns of encoded images")
    is_nested = not all(isinstance(feature, hub.Value | hub.ClassLabel) for feature in features.values())
    return list_dataset(dataset.with_format("numpy" if is_nested else None), reading=reading)


def find_saved_dataset(location: str) -> Path | None:
    """Return the folder if `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote it, else None."""
    folder = find_path(location)
    # os.path.isfile is False where the folder cannot be entered or its name is too long, and Path.is_file raises
    if os.path.isfile(folder / "dataset_dict.json"):
        return folder
    is_saved = os.path.isfile(folder / "state.json") and os.path.isfile(folder / "dataset_info.json")
    return folder if is_saved else None


def list_saved_dataset(
    folder: Path, reading: ReadSettings = DEFAULT_READING, selection: Selection = NO_SELECTION
) -> Listing:
    """List a folder written by `Dataset.save_to_disk`, or the selected split of one of `DatasetDict.save_to_disk`.

    Raises:
        SourceError: the folder contains several sets and none of them is selected, or cannot be read.
        MissingExtraError: the extra `hub` is not installed.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json").get("splits")
        names = [str(split) for split in splits] if isinstance(splits, list) else []
        if selection.split not in names:
            paths = ", ".join(f"{folder}:{name}" for name in names) or "there is none"
            raise SourceError(f"{folder} contains several sets; give one of them: {paths}")
        folder, selection = folder / selection.split, replace(selection, split="")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f'{folder} was written by the datasets library, which reading it requires: pip install "farout[hub]"'
        ) from error
    try:
        dataset = datasets.Dataset.load_from_disk(str(folder.absolute()))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(
            f"{folder} looks like a folder of Dataset.save_to_disk, but cannot be read "
            f"({type(error).__name__}: {reason}); save it again"
        ) from error
    return list_hub_dataset(dataset, str(folder), reading, selection)
