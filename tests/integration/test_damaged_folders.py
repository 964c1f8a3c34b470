"""Damaged and altered folders of detectors and models: one clear error each, never a traceback, a wait, or scores."""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farout import load
from farout.classifiers.model import Classifier
from farout.core import store
from farout.core.errors import StoreError
from farout.core.runtime import Runtime
from farout.detectors.msma import MSMA
from farout.detectors.pca import PCA
from farout.detectors.posthoc import Posthoc
from farout.diffusion.model import DiffusionModel
from farout.features.extractor import FeatureExtractor
from small import classifier, conditional, model, pictures

pytestmark = pytest.mark.filterwarnings("ignore")

LOADERS: dict[str, Callable[[Path], Any]] = {
    "detector": load,
    "other": load,
    "posthoc": load,
    "pca": load,
    "diffusion": DiffusionModel.load,
    "classifier": Classifier.load,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per kind."""
    root = tmp_path_factory.mktemp("saved")
    images = pictures(root / "images", 40)
    settings: dict[str, Any] = {"alpha": 0.2, "statistics": 10, "runtime": Runtime(device="cpu", precision="fp32")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, seed in (("detector", 0), ("other", 1)):
            MSMA(count=2, components=1, neighbors=1).fit(images, model(), seed=seed, **settings).save(root / name)
        Posthoc(score="energy").fit(images, classifier=classifier(), **settings).save(root / "posthoc")
        PCA(weights="random", size=32, layers=(0,)).fit(images, **settings).save(root / "pca")
    conditional().save(root / "diffusion")
    classifier().save(root / "classifier")
    return root


@pytest.fixture
def copy_of(saved: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        shutil.copytree(saved / name, tmp_path / name)
        return tmp_path / name

    return copy


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def replace(path: Path, create: Callable[[], object]) -> None:
    path.unlink()
    create()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "folder": lambda path: replace(path, path.mkdir),
    "link loop": lambda path: replace(path, lambda: path.symlink_to(path.name)),
    "pipe": lambda path: replace(path, lambda: os.mkfifo(path)),
    "device": lambda path: replace(path, lambda: path.symlink_to("/dev/zero")),
}
DETECTOR_FILES = (
    "config.json",
    "hashes.json",
    "fitted.safetensors",
    "statistics.parquet",
    "calibration.parquet",
    "statistics.txt",
    "calibration.txt",
    "diffusion/config.json",
    "diffusion/hashes.json",
    "diffusion/model_index.json",
    "diffusion/unet/config.json",
    "diffusion/unet/diffusion_pytorch_model.safetensors",
    "diffusion/scheduler/scheduler_config.json",
)
MODEL_FILES = (
    ("posthoc", "classifier/config.json"),
    ("posthoc", "classifier/model.safetensors"),
    ("pca", "features/config.json"),
    ("pca", "features/model.safetensors"),
    ("diffusion", "config.json"),
    ("diffusion", "unet/diffusion_pytorch_model.safetensors"),
    ("classifier", "config.json"),
    ("classifier", "model.safetensors"),
)


def test_all_files_are_damaged_below(saved: Path) -> None:
    files = {path.relative_to(saved / "detector").as_posix() for path in (saved / "detector").rglob("*.*")}
    files = {name for name in files if (saved / "detector" / name).is_file() and not name.endswith("README.md")}
    assert files <= {*DETECTOR_FILES, "diffusion/trained_on.txt"}


def test_undamaged_folders_load(saved: Path) -> None:
    for name, loader in LOADERS.items():
        loader(saved / name)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", DETECTOR_FILES)
def test_every_damage_of_every_file_is_named(copy_of: Callable[[str], Path], file: str, damage: str) -> None:
    folder = copy_of("detector")
    started = time.perf_counter()
    if damage in ("first byte", "middle byte", "last byte", "cut short", "half") and not os.path.getsize(folder / file):
        pytest.skip("the file is empty")
    DAMAGES[damage](folder / file)
    with pytest.raises(StoreError, match=Path(file).name if damage != "missing" else None):
        load(folder)
    assert time.perf_counter() - started < 20, "nothing waits"


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "middle byte", "folder"])
@pytest.mark.parametrize(("kind", "file"), MODEL_FILES)
def test_models_are_checked_alike(copy_of: Callable[[str], Path], kind: str, file: str, damage: str) -> None:
    folder = copy_of(kind)
    DAMAGES[damage](folder / file)
    with pytest.raises(StoreError):
        LOADERS[kind](folder)


def test_a_card_and_what_systems_add_may_change(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("detector")
    (folder / "README.md").write_text("our detector of scratches")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "diffusion" / "Thumbs.db").write_bytes(b"\0")
    load(folder)


@pytest.mark.parametrize("file", ["extra.safetensors", "diffusion/unet/diffusion_pytorch_model.bin"])
def test_added_files_are_refused(copy_of: Callable[[str], Path], file: str) -> None:
    """diffusers chooses among several weights files by its own rules."""
    folder = copy_of("detector")
    (folder / file).write_bytes(b"words")
    with pytest.raises(StoreError, match=f"{Path(file).name} was added"):
        load(folder)


@pytest.mark.parametrize("file", ["calibration.parquet", "statistics.parquet", "fitted.safetensors", "calibration.txt"])
def test_files_of_another_detector_are_refused(saved: Path, copy_of: Callable[[str], Path], file: str) -> None:
    """Each of them is valid by itself."""
    folder = copy_of("detector")
    shutil.copy(saved / "other" / file, folder / file)
    with pytest.raises(StoreError, match=f"{file} was changed"):
        load(folder)


def test_a_shortened_calibration_is_refused(copy_of: Callable[[str], Path]) -> None:
    """With fewer calibration images, p-values and flags are others."""
    folder = copy_of("detector")
    detector = load(folder)
    detector.calibration.select([0]).write_parquet(folder / "calibration.parquet")
    with pytest.raises(StoreError, match=r"calibration\.parquet was changed"):
        load(folder)


# -- values ---------------------------------------------------------------------------------------------------------

VALUES: list[tuple[str, Any, str]] = [
    *[("alpha", value, "alpha") for value in (-1, 0, 1, 2, "x", True, None, [0.1], {})],
    *[("seed", value, "seed") for value in (-1, "x", 1.5, True, None, 2**63, 10**40)],
    *[("runtime.batch_size", value, "batch_size") for value in (10**12, 0, -1, "many", 1.5, True)],
    *[("runtime.workers", value, "workers") for value in (-1, 10**9, "x", None)],
    *[("runtime.device", value, "device") for value in (1, None, [])],
    ("runtime.precision", "fp7", "precision"),
    ("runtime.cache", "yes", "cache"),
    ("runtime.rows", 10**12, "rows"),
    ("runtime", [], "runtime"),
    *[("preprocessing.size", value, "size") for value in ([100_000, 100_000], [0, 8], [-1, -1], 8, [8], "8", [8.5, 8])],
    ("preprocessing.native", [2**17, 1], "native"),
    *[("preprocessing.channels", value, "channels") for value in (2, 0, "1", True, None)],
    ("preprocessing.protocol", "other", "protocol"),
    ("preprocessing.jpeg_quality", 1000, "jpeg_quality"),
    ("preprocessing.gamma", 2, "gamma"),
    ("preprocessing", None, "preprocessing"),
    ("method", "guesswork", "guesswork"),
    ("method", 7, "method"),
    ("method", None, "method"),
    ("config", None, "config"),
    ("config", {"later": 1}, "later"),
    *[("config.count", value, "count") for value in ("x", -1, 1.5, True, None)],
    ("config.score", "guesswork", "score"),
    ("config.sigma_min", "x", "sigma_min"),
    ("provenance", "x", "provenance"),
    ("state", {"a": 1}, "state"),
    ("diffusion", "elsewhere", "diffusion"),
    ("diffusion.hash", None, "hash"),
    ("diffusion.path", 3, "path"),
    ("features", 5, "features"),
    ("surprise", 1, "surprise"),
    ("farout.format", 1, "layout 1"),
    ("farout.format", 99, "upgrade"),
    ("farout.format", None, "layout"),
    ("farout.format", True, "layout"),
    ("farout.kind", "classifier", "classifier"),
    ("farout.kind", [], "kind|contains"),
    ("farout", 1, "not written by farout"),
]


def set_value(path: Path, name: str, value: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    *parents, last = name.split(".")
    inner = content
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(("name", "value", "message"), VALUES)
def test_a_value_out_of_range_is_named(copy_of: Callable[[str], Path], name: str, value: Any, message: str) -> None:
    """Also when somebody has computed the hashes anew."""
    folder = copy_of("detector")
    set_value(folder / "config.json", name, value)
    with pytest.raises(StoreError, match=message):
        load(folder)
    store.write_folder_hashes(folder)
    with pytest.raises(StoreError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "name", ["method", "config", "runtime", "alpha", "seed", "preprocessing", "state", "diffusion"]
)
def test_a_missing_entry_is_named(copy_of: Callable[[str], Path], name: str) -> None:
    folder = copy_of("detector")
    content = store.read_json(folder / "config.json")
    del content[name]
    store.write_json(folder / "config.json", content)
    with pytest.raises(StoreError, match=f"config.json: {name} is missing"):
        load(folder)


def test_any_other_change_is_noticed(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("detector")
    set_value(folder / "config.json", "alpha", 0.25)
    with pytest.raises(StoreError, match=r"config\.json was changed"):
        load(folder)


TEXTS: dict[str, bytes] = {
    "nested 10,000 deep": b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "nested 200 deep": b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
    "10,000 digits": b'{"seed": ' + b"9" * 10_000 + b"}",
    "NaN": b'{"alpha": NaN}',
    "infinite": b'{"alpha": -Infinity}',
    "too large": b'{"seed": 1e400}',
    "twice": b'{"alpha": 0.1, "alpha": 0.9}',
    "twice inside": b'{"a": {"b": 1, "b": 2}}',
    "byte-order mark": b'\xef\xbb\xbf{"a": 1}',
    "NUL": b'{"a": 1}\0',
    "NUL in text": b'{"a": "\\u0000"}',
    "half a surrogate": b'{"a": "\\ud800"}',
    "half a surrogate in a name": b'{"\\udfff": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "Latin-1": '{"a": "é"}'.encode("latin-1"),
    "list": b"[1]",
    "number": b"1",
    "null": b"null",
    "two objects": b"{} {}",
    "comment": b"// farout\n{}",
    "pickle": b"\x80\x04K\x01.",
    "nothing": b"",
    "space": b"  \n",
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("file", ["config.json", "hashes.json", "diffusion/unet/config.json"])
def test_files_that_are_not_json_objects(copy_of: Callable[[str], Path], file: str, text: str) -> None:
    folder = copy_of("detector")
    (folder / file).write_bytes(TEXTS[text])
    with pytest.raises(StoreError, match=r"(config|hashes)\.json"):
        load(folder)
    if file != "hashes.json":
        store.write_folder_hashes((folder / file).parent if "/" not in file else folder / "diffusion")
        store.write_folder_hashes(folder)
        with pytest.raises(StoreError, match=r"config\.json"):
            load(folder)


def test_a_file_of_gigabytes_is_not_read(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("detector")
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**40)
    started = time.perf_counter()
    with pytest.raises(StoreError, match=r"config\.json cannot be read: it has more than 268,435,456 bytes"):
        load(folder)
    assert time.perf_counter() - started < 10


# -- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hashes", ["old", "new"])
def test_a_giant_backbone_is_refused_before_it_is_built(
    copy_of: Callable[[str], Path], hashes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("pca")
    set_value(folder / "features" / "config.json", "name", "eva_giant_patch14_560.m30m_ft_in22k_in1k")
    if hashes == "new":
        store.write_folder_hashes(folder / "features")
        store.write_folder_hashes(folder)
    built: list[int] = []
    original = torch.nn.init.trunc_normal_
    monkeypatch.setattr(
        torch.nn.init, "trunc_normal_", lambda x, *a, **k: built.append(x.is_meta or x.numel()) or original(x, *a, **k)
    )
    with pytest.raises(
        StoreError,
        match=r"config\.json was changed|weights of eva_giant|features cannot be loaded",
    ):
        load(folder)
    assert all(count is True for count in built), "no weights are initialized"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 10**6),
        ("size", 0),
        ("layers", [99]),
        ("layers", [-1]),
        ("layers", []),
        ("layers", "all"),
        ("mean", [0.5]),
        ("std", [0, 0, 0]),
        ("name", "../../etc"),
        ("name", 3),
    ],
)
def test_settings_of_a_backbone(copy_of: Callable[[str], Path], name: str, value: Any) -> None:
    folder = copy_of("pca") / "features"
    set_value(folder / "config.json", name, value)
    store.write_folder_hashes(folder)
    with pytest.raises(StoreError):
        FeatureExtractor.load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_out_channels", [2**20, 2**20]),
        ("block_out_channels", [8, 16, 2**16]),
        ("layers_per_block", 10**9),
        ("in_channels", 10**9),
        ("num_class_embeds", 10**12),
        ("norm_num_groups", 0),
        ("block_out_channels", []),
        ("down_block_types", ["Evil", "Evil"]),
        ("sample_size", "x"),
    ],
)
def test_giant_and_impossible_diffusion_networks(copy_of: Callable[[str], Path], name: str, value: Any) -> None:
    """Also in folders of diffusers, which have no hashes."""
    folder = copy_of("diffusion")
    set_value(folder / "unet" / "config.json", name, value)
    store.write_folder_hashes(folder)
    started = time.perf_counter()
    with pytest.raises(StoreError):
        DiffusionModel.load(folder)
    (folder / "config.json").unlink()
    (folder / "hashes.json").unlink()
    with pytest.raises(StoreError):
        DiffusionModel.load(folder)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network.name", "resnet50"),
        ("network.classes", 10**9),
        ("network.classes", 1),
        ("network.classes", "3"),
        ("network.size", [10**6, 10**6]),
        ("network.stem", "large"),
        ("class_names", ["a"]),
        ("std", [0]),
        ("preprocessing.size", [10**5, 10**5]),
    ],
)
def test_giant_and_impossible_classifiers(copy_of: Callable[[str], Path], name: str, value: Any) -> None:
    folder = copy_of("classifier")
    set_value(folder / "config.json", name, value)
    store.write_folder_hashes(folder)
    with pytest.raises(StoreError):
        Classifier.load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schedule.num_levels", 10**12),
        ("schedule.num_levels", "x"),
        ("schedule.kind", "other"),
        ("prediction", "other"),
        ("data_range", [0]),
        ("b_scale", 0),
        ("b_scale", "x"),
        ("conditioning", {"kind": "other"}),
        ("conditioning", {"kind": "class_vectors"}),
        ("conditioning", 3),
        ("conditioning.class_names", ["a"]),
        ("conditioning.class_names", 3),
    ],
)
def test_settings_of_a_diffusion_model(copy_of: Callable[[str], Path], name: str, value: Any) -> None:
    folder = copy_of("diffusion")
    set_value(folder / "config.json", name, value)
    store.write_folder_hashes(folder)
    with pytest.raises(StoreError):
        DiffusionModel.load(folder)


def header(length: int, text: bytes, data: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + text + data


HEADERS = {
    "huge length": header(2**60, b"{}"),
    "long length": header(100, b"{}"),
    "not JSON": header(2, b"{x"),
    "overlapping": header(
        117,
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
        + b" " * 9,
        bytes(12),
    ),
    "outside": header(59, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,80000000]}}'[:59], bytes(8)),
    "giant shape": header(
        80, b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,8]}}'.ljust(80), bytes(8)
    ),
    "unknown type": header(60, b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}'.ljust(60), bytes(8)),
}


@pytest.mark.parametrize("content", HEADERS)
@pytest.mark.parametrize("file", ["fitted.safetensors", "diffusion/unet/diffusion_pytorch_model.safetensors"])
def test_headers_of_weights(copy_of: Callable[[str], Path], file: str, content: str) -> None:
    folder = copy_of("detector")
    (folder / file).write_bytes(HEADERS[content])
    store.write_folder_hashes(folder / "diffusion")
    store.write_folder_hashes(folder)
    with pytest.raises(StoreError):
        load(folder)


@pytest.mark.parametrize("change", ["fewer", "more", "shape", "type"])
def test_fitted_arrays_that_do_not_fit(copy_of: Callable[[str], Path], change: str) -> None:
    folder = copy_of("detector")
    tensors = load_file(folder / "fitted.safetensors")
    first = next(iter(tensors))
    if change == "fewer":
        del tensors[first]
    elif change == "more":
        tensors["more"] = torch.zeros(1)
    elif change == "shape":
        tensors = {name: tensor.flatten()[:1].clone() for name, tensor in tensors.items()}
    else:
        tensors = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in tensors.items()}
    save_file(tensors, folder / "fitted.safetensors")
    store.write_folder_hashes(folder)
    with pytest.raises(StoreError):
        load(folder)
