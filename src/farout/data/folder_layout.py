"""The meaning of the folders of a data set, derived from the paths of its images: classes, groups, masks and splits.

Paths are relative to the data set and have `/` as separator. The functions serve folders and archives alike.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from farout.core.names import encode_name

__all__ = [
    "class_labels_of",
    "describe_splits",
    "describe_splits_of_archives",
    "find_masks",
    "normal_class_of",
    "parent_folders_of",
]

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "traina": "train",
    "trainb": "train",
    "imagestr": "train",
    "test": "test",
    "testing": "test",
    "testa": "test",
    "testb": "test",
    "imagests": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
"""Words that name a split; two splits of different kinds next to each other make a data set with its splits."""

_FILLER_WORDS = frozenset(
    {"data", "dataset", "ilsvrc", "image", "images", "img", "imgs", "mixed", "private", "public", "set", "split"}
)
"""Words that occur together with a split, as in `train_images`, `test_public` or `ILSVRC2012_img_val`."""

_MASK_FOLDERS = frozenset(
    {
        "annotation",
        "annotations",
        "ground_truth",
        "ground-truth",
        "ground truth",
        "groundtruth",
        "groundtruths",
        "gt",
        "label",
        "labels",
        "labelstr",
        "labelsts",
        "mask",
        "masks",
        "segmentation",
        "segmentations",
    }
)
"""Names, in lower case, of folders of segmentation masks, if a folder of images is next to them."""

_MASK_SUFFIX = re.compile(r"(.+)[._-](?:gt|ground_?truth|labels?|masks?|seg|segmentation)", re.IGNORECASE)

_IMAGE_FOLDERS = frozenset({"image", "images", "img", "imgs", "jpegimages", "photos", "rgb"})

_NORMAL_CLASSES = ("good", "ok", "normal", "nominal", "healthy", "non_defective", "defect_free")
"""Names, in lower case, of classes of normal images."""


def parent_folders_of(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the folder of each path, `.` for the data set itself."""
    return tuple(path.rpartition("/")[0] or "." for path in paths)


def class_labels_of(paths: Sequence[str]) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """Return labels and names of classes if every image is directly in the folder of its class, else None and None.

    The class folders are those of the first level; or, below folders that contain nothing but the next one, those of
    the first level at which there is more than one. Names that differ only in their Unicode normal form are one class.
    """
    depths = {path.count("/") for path in paths}
    if len(depths) != 1 or depths == {0}:
        return None, None
    folders = [path.split("/")[:-1] for path in paths]
    if any(folder[:-1] != folders[0][:-1] for folder in folders):
        return None, None
    classes = [encode_name(folder[-1]) for folder in folders]
    names = tuple(sorted(set(classes)))
    index_of = {name: index for index, name in enumerate(names)}
    return tuple(index_of[name] for name in classes), names


def normal_class_of(names: Iterable[str]) -> str | None:
    """Return the class of normal images among classes of which the others look abnormal; None if there is none."""
    by_lower_name = {name.lower().replace("-", "_").replace(" ", "_"): name for name in names}
    if len(by_lower_name) < 2:
        return None
    return next((by_lower_name[name] for name in _NORMAL_CLASSES if name in by_lower_name), None)


def find_masks(paths: Sequence[str]) -> dict[str, str]:
    """Return the images that are segmentation masks, each with a description of where the masks are.

    They are in a folder of a usual name, such as `ground_truth`, next to a folder of images or of a split, or next to
    images of the same names; or their name is that of an image in the same folder with an addition: `0001_mask.png`.
    """
    files: dict[str, set[str]] = defaultdict(set)  # folder -> its images, without suffix
    for path in paths:
        folder, _, name = path.rpartition("/")
        files[folder].add(name.rpartition(".")[0])
    mask_folders: dict[str, str] = {}
    for folder, subfolders in _subfolders(paths).items():
        names = {name.lower() for name in subfolders}
        is_next_to_images = any(
            name in _IMAGE_FOLDERS or name in _NORMAL_CLASSES or _split_of(name) is not None for name in names
        )
        for name in subfolders:
            stems = {_without_mask_suffix(stem) or stem for stem in files[_join(folder, name)]}
            if name.lower() in _MASK_FOLDERS and (is_next_to_images or (stems and stems <= files[folder])):
                mask_folders[f"{_join(folder, name)}/"] = f"in {name}/ (masks)"
    masks = {}
    for path in paths:
        mask_folder = next((folder for folder in mask_folders if path.startswith(folder)), None)
        folder, _, name = path.rpartition("/")
        stem = name.rpartition(".")[0]
        image = _without_mask_suffix(stem)
        if mask_folder is not None:
            masks[path] = mask_folders[mask_folder]
        elif image is not None and image in files[folder]:
            masks[path] = f"named *{stem[len(image) :]} (masks)"
    return masks


def _without_mask_suffix(stem: str) -> str | None:
    """Return the name of the image to which a mask of this name belongs; None if the name is not that of a mask."""
    match = _MASK_SUFFIX.fullmatch(stem)
    return match[1] if match else None


def describe_splits(paths: Iterable[str], where: str) -> str | None:
    """Explain why the images are not one set of normal images, and which folder is; None if they are.

    They are not if the folders are those of a benchmark: training, validation and test images, or test images and their
    masks. `where` is the path of the data set, for the advice.
    """
    tree = _subfolders(paths)
    reasons: dict[str, str] = {}
    advice: list[str] = []
    for folder, subfolders in sorted(tree.items()):
        splits = {name: kind for name in sorted(subfolders) if (kind := _split_of(name)) is not None}
        masks = sorted(name for name in subfolders if name.lower() in _MASK_FOLDERS)
        if len(set(splits.values())) < 2 and not (masks and "test" in splits.values()):
            continue
        reasons[folder] = " and ".join(f"{name}/" for name in (*splits, *masks))
        best = next((name for name, kind in splits.items() if kind == "train"), next(iter(splits)))
        path = _join(folder, best)
        normal = normal_class_of({*tree.get(path, ()), ""})
        advice.append(_join(where, path if normal is None else _join(path, normal)))
    if not reasons:
        return None
    found = next(iter(reasons))
    others = f", and {len(reasons) - 1} folders like it" if len(reasons) > 1 else ""
    choice = advice[0] if len(advice) == 1 else f"one of {', '.join(advice[:3])}{', …' if len(advice) > 3 else ''}"
    return (
        f"{_join(where, found)} contains {reasons[found]}{others}: a data set with its splits, not one set of images; "
        f"give {choice} (to use all images nevertheless, give a glob: '{_join(where, '**/*')}')"
    )


def describe_splits_of_archives(names: Sequence[str], where: str) -> str | None:
    """As `describe_splits`, for a folder with archives whose names begin with a split: `train-0.tar`, `val-0.tar`."""
    found: dict[str, str] = {}
    for name in sorted(names):
        match = re.match(r"[a-z]+", name.rpartition("/")[2].lower())
        if match and match[0] in _SPLIT_WORDS:
            found.setdefault(_SPLIT_WORDS[match[0]], match[0])
    if len(found) < 2:
        return None
    best = found.get("train", next(iter(found.values())))
    pattern = _join(where, f"{best}*{names[0][names[0].rfind('.') :]}")
    splits = ", ".join(found.values())
    return f"{where} contains archives of several splits ({splits}); give one of them, such as '{pattern}'"


def _subfolders(paths: Iterable[str]) -> Mapping[str, set[str]]:
    """Return the names of the subfolders of each folder; the data set itself is ``."""
    tree: dict[str, set[str]] = defaultdict(set)
    for folder in {path.rpartition("/")[0] for path in paths}:
        parent, _, name = folder.rpartition("/")
        while name:
            tree[parent].add(name)
            parent, _, name = parent.rpartition("/")
    return tree


def _join(folder: str, name: str) -> str:
    return "/".join(part.rstrip("/") or "/" for part in (folder, name) if part).replace("//", "/")


def _split_of(name: str) -> str | None:
    """Return train, test or validation if a folder's name says that, as `train`, `Test`, `val2017`, `train_images`."""
    words = [word for word in re.findall(r"[a-z]+", name.lower()) if word not in _FILLER_WORDS]
    return _SPLIT_WORDS.get(words[0]) if len(words) == 1 else None
