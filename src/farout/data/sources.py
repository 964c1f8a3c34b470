"""Opening image sources: a source string, a Dataset, PIL images or a tensor becomes an ordered set of images.

`farout.data.source_spec` parses the grammar, `farout.data.decoding` converts file formats. A named set is looked up as
`$FAROUT_DATA/<name>/<split>.parquet`, then among the samples in the package, then on the Hugging Face hub.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from farout.core.errors import LeftOutWarning, SourceError
from farout.core.names import decode_key, encode_cell, encode_name, encode_source
from farout.core.profiling import timed
from farout.data import catalog
from farout.data.file_listing import Listing
from farout.data.file_names import join_counts
from farout.data.hub_datasets import find_saved_dataset, list_saved_dataset
from farout.data.image_source import ImageSource, Policy, check_policy
from farout.data.parquet_files import list_parquet
from farout.data.python_objects import check_value_range, list_object
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.readers import list_path, list_url
from farout.data.source_spec import SourceSpec, parse_spec
from farout.data.tables import list_hub

__all__ = ["Images", "open_source", "parse_source"]

Images: TypeAlias = (
    str
    | Path
    | ImageSource
    | Dataset[Any]
    | DataLoader[Any]
    | Image.Image
    | Tensor
    | np.ndarray
    | bytes
    | Mapping[Any, Any]
    | Iterable[Any]
)
"""The types that `open_source` accepts: a source string, a path, or a Python object, see docs/images.md."""


@timed("listing")
def open_source(
    images: Images,
    *,
    policy: Policy = "raise",
    limit: int | None = None,
    seed: int = 0,
    memory_mib: int = 1024,
    reading: ReadSettings = DEFAULT_READING,
    require_range: bool = True,
) -> ImageSource:
    """Open images as an ordered set with keys and labels.

    Args:
        images: a source string or path; a Python object of images, see docs/images.md; or an ImageSource, which is
            returned as it is, with its own policy.
        policy: treatment of unreadable images: `raise` an error, `skip` them, or keep them without a score (`nan`).
        limit: use a random sample of this many images, in the order of the source; None: all.
        seed: seed of the sample.
        memory_mib: memory for decoded images in MiB; images beyond it are decoded at every access.
        reading: how image files become 8-bit pixels; an ImageSource keeps its own settings.
        require_range: raise an error for Python objects whose values have no usual range, such as an array of floats
            from 0 to 255; False if `ImageSource.with_value_range` sets it afterwards.

    Raises:
        SourceError: there are no images, or the source string is wrong.
        MissingExtraError: a set of the hub is given, and the extra `hub` is not installed.
    """
    check_policy(policy)
    if isinstance(images, os.PathLike):
        images = Path(images)
    if isinstance(images, ImageSource):
        source = images
    elif isinstance(images, str | Path):
        source = _open_spec(images, policy, memory_mib, reading)
    else:
        listing = list_object(images, memory_mib, reading)
        if require_range:
            check_value_range(listing, reading)
        source = ImageSource("images", listing, policy=policy, memory_mib=memory_mib, reading=reading)
    if limit is not None and limit < 1:
        raise SourceError(f"limit is {limit}; expected at least 1, or None for all images")
    if source.left_out and source is not images:
        warnings.warn(f"left out of {source.name}: {join_counts(source.left_out)}", LeftOutWarning, stacklevel=2)
    if limit is None or limit >= len(source):
        return source
    chosen = np.random.default_rng(seed).permutation(len(source))[:limit]
    return source.subset(sorted(chosen.tolist()))


def parse_source(text: str | Path) -> SourceSpec:
    """Parse a source string as `open_source` does; `Path("x")` is the path, even if there is a named set x."""
    if isinstance(text, Path):
        if re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", text.as_posix()) and not text.exists():
            raise SourceError(f"{text} is a URL that was made a Path, which drops a slash; give the URL as a text")
        return parse_spec(text.as_posix() if "/" in text.as_posix() else f"./{text}")
    return parse_spec(text, catalog.set_names())


def _open_spec(text: str | Path, policy: Policy, memory_mib: int, reading: ReadSettings) -> ImageSource:
    spec = parse_source(text)
    listing = _list_spec(spec, reading)
    source = ImageSource(
        encode_cell(str(text)) if spec.kind == "url" else encode_source(str(text)),
        listing,
        policy=policy,
        variant=spec.variant,
        strength=spec.strength,
        memory_mib=memory_mib,
        reading=reading,
        location=spec.canonical,
    )
    return source.subset(_filter_classes(listing, spec)) if spec.classes else source


def _list_spec(spec: SourceSpec, reading: ReadSettings) -> Listing:
    if spec.kind == "path":
        saved = find_saved_dataset(spec.location)
        if saved is not None:
            return list_saved_dataset(saved, reading, spec.selection)
        return list_path(spec.location, reading, spec.selection)
    if spec.kind == "url":
        return list_url(spec.location, reading, spec.selection)
    if spec.kind == "hub":
        return list_hub(spec.location, spec.split, reading=reading, selection=spec.selection)
    local = catalog.find_local(spec.location, spec.split)
    if local is not None:
        return list_parquet(local, reading, spec.selection, where=f"{spec.location}:{spec.split}")
    known = catalog.find_entry(spec.location)
    if known is None:
        raise SourceError(_describe_unknown_set(spec))
    if known.hub is None or spec.split not in known.splits:
        raise SourceError(_describe_missing_set(spec, known))
    return list_hub(
        known.hub, known.splits[spec.split], known.image_column, known.label_column, reading, spec.selection
    )


def _describe_unknown_set(spec: SourceSpec) -> str:
    near = difflib.get_close_matches(spec.location, sorted(catalog.set_names()), n=4, cutoff=0.5)
    splits = catalog.local_splits(spec.location)
    if splits:
        return (
            f"the set {spec.location} has no split {spec.split!r} on this machine; expected one of {', '.join(splits)}"
        )
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"{spec.text!r} is neither an existing path nor a named set (`farout list sets`){hint}"


def _describe_missing_set(spec: SourceSpec, known: catalog.SetEntry) -> str:
    local = catalog.local_splits(spec.location)
    if local or (known.hub and spec.split not in known.splits):
        splits = ", ".join(dict.fromkeys((*local, *(known.splits if known.hub else ()))))
        return f"{known.title} has no split {spec.split!r}; expected one of {splits}"
    return (
        f"{known.title} is not on this machine and has no hub id; {known.download_hint}, then save it as "
        f"$FAROUT_DATA/{spec.location}/{spec.split}.parquet, or give its folder as a path"
    )


def _filter_classes(listing: Listing, spec: SourceSpec) -> list[int]:
    """Return the indices of the images whose class is in the filter: by class name first, then by label."""
    if listing.labels is None:
        raise SourceError(f"{spec.text!r} filters classes, but {spec.location} has no labels")
    labels = {label for token in spec.classes for label in _parse_class(token, listing, spec)}
    chosen = [i for i, label in enumerate(listing.labels) if label in labels]
    if not chosen:
        raise SourceError(f"{spec.text!r} leaves no images: no image is of class {', '.join(spec.classes)}")
    return chosen


def _parse_class(token: str, listing: Listing, spec: SourceSpec) -> list[int]:
    names = listing.class_names or ()
    first, dash, last = token.partition("-")
    if encode_name(token) not in names and dash and _is_number(first) and _is_number(last):
        return [label for n in range(int(first), int(last) + 1) for label in _parse_class(str(n), listing, spec)]
    if encode_name(token) in names:
        return [names.index(encode_name(token))]
    shown = (token, encode_name(decode_key(token)))  # as farout shows it; `%2C` is a comma in a name
    if any(name in names for name in shown):
        return [names.index(name) for name in shown if name in names][:1]
    known = range(len(names)) if names else sorted(set(listing.labels or ()))
    # an index is no class where the names look like numbers: of the names 01 and 1, 0 means neither
    if re.fullmatch(r"-?[0-9]{1,18}", token) and int(token) in known and not any(map(_is_number, names)):
        return [int(token)]
    near = difflib.get_close_matches(token, names, n=3)
    expected = f"labels are {min(known)}..{max(known)}"
    if near or any(map(_is_number, names)):
        expected = f"did you mean {', '.join(near)}?" if near else f"classes are {', '.join(names[:20])}"
    raise SourceError(f"unknown class {token!r} in {spec.text!r}; {expected}")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
