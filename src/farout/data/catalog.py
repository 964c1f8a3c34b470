"""The catalog of named image sets: origin, license, format, and their role in evaluations.

Hub ids are from public references and have not been tried: their status is `untested`. Near and far groups are those of
OpenOOD v1.5 (Zhang et al., 2023). This module imports neither torch nor an image reader.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from farout.core.names import expand_path
from farout.data.source_spec import SourceSpec, parse_spec

__all__ = [
    "FAR",
    "NEAR",
    "SetEntry",
    "find_entry",
    "find_local",
    "is_local",
    "list_sets",
    "local_splits",
    "needs_hub",
    "ood_group",
    "ood_role",
    "set_names",
]

SAMPLE = Path(__file__).parent.parent / "sample"
"""Folder of the sets that the package contains, as `<name>/<split>.parquet`."""

_TRAIN_TEST = {"train": "train", "test": "test"}


@dataclass(frozen=True)
class SetEntry:
    """One named set. `splits` maps split names to those on the hub; `size` is height x width in pixels."""

    name: str
    title: str
    license: str
    size: str
    channels: int
    coding: Literal["lossless", "jpeg"]
    hub: str | None = None
    image_column: str = "image"
    label_column: str | None = "label"
    splits: Mapping[str, str] = field(default_factory=lambda: dict(_TRAIN_TEST))
    download_hint: str = "get it from its authors' page"
    built_in: bool = False


_OPENOOD = "get it with the download script of OpenOOD v1.5"
_ODIN = "get it from the data links in the README of the ODIN code (facebookresearch/odin)"
_TEST = {"test": "test"}
_VALIDATION = {"train": "train", "test": "validation"}
_IMAGENET = "ImageNet terms (non-commercial research)"

_ENTRIES = (
    SetEntry("sample_fashion", "FashionMNIST sample", "MIT", "28x28", 1, "lossless", built_in=True),
    SetEntry(
        "sample_digits",
        "MNIST sample",
        "CC BY-SA 3.0",
        "28x28",
        1,
        "lossless",
        splits=_TEST,
        built_in=True,
    ),
    SetEntry("fashion_mnist", "FashionMNIST", "MIT", "28x28", 1, "lossless", "zalando-datasets/fashion_mnist"),
    SetEntry("mnist", "MNIST", "CC BY-SA 3.0", "28x28", 1, "lossless", "ylecun/mnist"),
    SetEntry("kmnist", "Kuzushiji-MNIST", "CC BY-SA 4.0", "28x28", 1, "lossless", "tanganke/kmnist"),
    SetEntry("cifar10", "CIFAR-10", "unclear", "32x32", 3, "lossless", "uoft-cs/cifar10", "img"),
    SetEntry("cifar100", "CIFAR-100", "unclear", "32x32", 3, "lossless", "uoft-cs/cifar100", "img", "fine_label"),
    SetEntry(
        "svhn",
        "Street View House Numbers (cropped digits)",
        "non-commercial use",
        "32x32",
        3,
        "lossless",
        "ufldl-stanford/svhn/cropped_digits",
        splits={**_TRAIN_TEST, "extra": "extra"},
    ),
    SetEntry(
        "celeba",
        "CelebA (aligned)",
        "non-commercial research",
        "218x178",
        3,
        "jpeg",
        "flwrlabs/celeba",
        label_column=None,
        splits={"train": "train", "validation": "valid", "test": "test"},
    ),
    SetEntry(
        "tiny_imagenet",
        "Tiny-ImageNet",
        _IMAGENET,
        "64x64",
        3,
        "jpeg",
        "zh-plus/tiny-imagenet",
        splits={"train": "train", "test": "valid"},
    ),
    SetEntry("imagenet_1k", "ImageNet-1k", _IMAGENET, "varies", 3, "jpeg", "ILSVRC/imagenet-1k", splits=_VALIDATION),
    SetEntry("imagenet_200", "ImageNet-200 (OpenOOD)", _IMAGENET, "varies", 3, "jpeg", download_hint=_OPENOOD),
    SetEntry("imagenet_100", "ImageNet-100", _IMAGENET, "varies", 3, "jpeg", "clane9/imagenet-100", splits=_VALIDATION),
    SetEntry(
        "imagenet_o",
        "ImageNet-O",
        "MIT (images: unclear)",
        "varies",
        3,
        "jpeg",
        splits=_TEST,
        download_hint="get it from the natural adversarial examples repository (hendrycks/natural-adv-examples)",
    ),
    SetEntry(
        "imagenet_v2",
        "ImageNet-V2",
        "MIT (images: unclear)",
        "varies",
        3,
        "jpeg",
        splits=_TEST,
        download_hint="get imagenetv2-matched-frequency from its authors (modestyachts/ImageNetV2)",
    ),
    SetEntry(
        "imagenet_c",
        "ImageNet-C",
        "CC BY 4.0 (images: ImageNet terms)",
        "224x224",
        3,
        "jpeg",
        splits=_TEST,
        download_hint="get it from its authors (hendrycks/robustness)",
    ),
    SetEntry(
        "imagenet_r",
        "ImageNet-R",
        "MIT (images: unclear)",
        "varies",
        3,
        "jpeg",
        "axiong/imagenet-r",
        "image",
        "wnid",
        _TEST,
    ),
    SetEntry("textures", "Describable Textures (DTD)", "research only", "varies", 3, "jpeg", "tanganke/dtd"),
    SetEntry(
        "places365", "Places365", "non-commercial research", "varies", 3, "jpeg", splits=_TEST, download_hint=_OPENOOD
    ),
    SetEntry("lsun_crop", "LSUN (crop)", "unclear", "32x32", 3, "lossless", splits=_TEST, download_hint=_ODIN),
    SetEntry("lsun_resize", "LSUN (resize)", "unclear", "32x32", 3, "lossless", splits=_TEST, download_hint=_ODIN),
    SetEntry("isun", "iSUN", "unclear", "32x32", 3, "lossless", splits=_TEST, download_hint=_ODIN),
    SetEntry(
        "inaturalist", "iNaturalist (OOD subset)", "unclear", "varies", 3, "jpeg", splits=_TEST, download_hint=_OPENOOD
    ),
    SetEntry(
        "sun",
        "SUN (OOD subset)",
        "unclear",
        "varies",
        3,
        "jpeg",
        splits=_TEST,
        download_hint="get the subset of Huang and Li (2021) from their code (deeplearning-wisc/large_scale_ood)",
    ),
    SetEntry("ssb_hard", "SSB-hard", _IMAGENET, "varies", 3, "jpeg", splits=_TEST, download_hint=_OPENOOD),
    SetEntry("ninco", "NINCO", "MIT (images: several)", "varies", 3, "jpeg", splits=_TEST, download_hint=_OPENOOD),
    SetEntry(
        "openimage_o", "OpenImage-O", "CC BY 2.0 (images)", "varies", 3, "jpeg", splits=_TEST, download_hint=_OPENOOD
    ),
    SetEntry("species", "Species", "unclear", "varies", 3, "jpeg", splits=_TEST, download_hint=_OPENOOD),
    SetEntry(
        "medmnist",
        "MedMNIST v2",
        "CC BY 4.0 (DermaMNIST: CC BY-NC 4.0)",
        "28x28",
        3,
        "lossless",
        download_hint="get one of its .npz files from its authors (pip install medmnist), and give that file as a path",
    ),
)

_TABLE: Mapping[str, SetEntry] = {row.name: row for row in _ENTRIES}

_CIFAR_FAR = ("mnist", "svhn", "textures", "places365")
_IMAGENET_NEAR = ("ssb_hard", "ninco")
_IMAGENET_FAR = ("inaturalist", "textures", "openimage_o")

NEAR: Mapping[str, tuple[str, ...]] = {
    "cifar10": ("cifar100", "tiny_imagenet"),
    "cifar100": ("cifar10", "tiny_imagenet"),
    "imagenet_200": _IMAGENET_NEAR,
    "imagenet_1k": _IMAGENET_NEAR,
}
"""Near-OOD sets of OpenOOD v1.5, per in-distribution set."""

FAR: Mapping[str, tuple[str, ...]] = {
    "cifar10": _CIFAR_FAR,
    "cifar100": _CIFAR_FAR,
    "imagenet_200": _IMAGENET_FAR,
    "imagenet_1k": _IMAGENET_FAR,
}
"""Far-OOD sets of OpenOOD v1.5, per in-distribution set."""

_DEV_VARIANTS = frozenset({"rot90", "rot180", "rot270", "blur", "contrast", "noise", "patch"})


def set_names() -> frozenset[str]:
    """Return the names of all sets of the catalog."""
    return frozenset(_TABLE)


def find_entry(name: str) -> SetEntry | None:
    """Return the entry of a set, or None."""
    return _TABLE.get(name)


def ood_role(id_name: str, ood_spec: str) -> Literal["dev", "test"]:
    """Return whether an OOD source may be used to choose settings (`dev`), or only to report results (`test`).

    Rotations, blur, contrast, noise and pasted patches of the in-distribution training images are `dev`. Flips (papers
    report them), held-out classes, the same corruptions of test images, and all other sets are `test`.
    """
    inlier, outlier = parse_spec(id_name, set_names()), parse_spec(ood_spec, set_names())
    same = (inlier.kind, _location_of(inlier)) == (outlier.kind, _location_of(outlier))
    training = outlier.kind in ("path", "url") or outlier.split == "train"
    same_classes = not inlier.classes or inlier.classes == outlier.classes
    return "dev" if same and training and outlier.variant in _DEV_VARIANTS and same_classes else "test"


def ood_group(id_name: str, ood_name: str) -> Literal["near", "far", ""]:
    """Return the OpenOOD group of an OOD source; `near` for other classes of the same set; empty for no group."""
    inlier, outlier = parse_spec(id_name, set_names()), parse_spec(ood_name, set_names())
    if _location_of(inlier) == _location_of(outlier):
        return "near" if outlier.variant is None and outlier.classes and outlier.classes != inlier.classes else ""
    if outlier.location in NEAR.get(inlier.location, ()):
        return "near"
    return "far" if outlier.location in FAR.get(inlier.location, ()) else ""


def _location_of(spec: SourceSpec) -> str:
    """The location, equal for all ways to write a path."""
    return replace(spec, split="", modifiers="").canonical


def _local_folders(name: str) -> list[Path]:
    """Return the folders of a set on this machine: in $FAROUT_DATA first, then in the package."""
    data = os.environ.get("FAROUT_DATA")
    bases = ([expand_path(data)] if data else []) + ([SAMPLE] if name in _TABLE and _TABLE[name].built_in else [])
    return [base / name for base in bases if (base / name).is_dir()]


def find_local(name: str, split: str) -> Path | None:
    """Return the parquet file of a split of a set on this machine, or None."""
    files = (folder / f"{split}.parquet" for folder in _local_folders(name))
    return next((file for file in files if file.is_file()), None)


def is_local(source: str) -> bool:
    """Return whether a source needs no hub: it is a path, a URL, or a named set on this machine."""
    spec = parse_spec(source, set_names())
    return spec.kind in ("path", "url") or (spec.kind == "named" and find_local(spec.location, spec.split) is not None)


def needs_hub(source: str) -> bool:
    """Return whether a source must be loaded from the hub: it is not on this machine, and the hub has the split."""
    spec = parse_spec(source, set_names())
    known = find_entry(spec.location) if spec.kind == "named" and not is_local(source) else None
    return spec.kind == "hub" or (known is not None and known.hub is not None and spec.split in known.splits)


def local_splits(name: str) -> list[str]:
    """Return the splits of a set on this machine, sorted."""
    return sorted({file.stem for folder in _local_folders(name) for file in folder.glob("*.parquet")})


def list_sets() -> list[dict[str, str | None]]:
    """Return one row per set, in the order of the catalog.

    `location` is the folder on this machine, `built in`, or None; `splits` are those in that folder, else those of the
    hub; `hub` and `hub_status` are None for a set that is not on the hub, `download_hint` for one that needs none.
    """
    return [
        {
            "name": item.name,
            "title": item.title,
            "location": _locate(item.name),
            "splits": " ".join(local_splits(item.name) or item.splits),
            "size": item.size,
            "channels": str(item.channels),
            "coding": item.coding,
            "license": item.license,
            "hub": item.hub,
            "hub_status": "untested" if item.hub else None,
            "download_hint": None if item.hub or item.built_in else item.download_hint,
        }
        for item in _ENTRIES
    ]


def _locate(name: str) -> str | None:
    folders = [folder for folder in _local_folders(name) if any(folder.glob("*.parquet"))]
    if not folders:
        return None
    return "built in" if folders[0].parent == SAMPLE else str(folders[0])
