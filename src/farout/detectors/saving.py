"""The folder of a fitted detector: configuration, measurements, learnt arrays, and its models or links to them."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from farout.core import store
from farout.core.devices import resolve_device
from farout.core.errors import FaroutError, StoreError, TrapWarning
from farout.core.runtime import Runtime
from farout.data.preprocessing import Preprocessing
from farout.detectors import DETECTORS
from farout.detectors.calibration import calibrate
from farout.detectors.interface import DetectorInterface
from farout.detectors.networks import diffusion_class
from farout.detectors.results import Measurements

if TYPE_CHECKING:
    from farout.classifiers.model import Classifier
    from farout.diffusion.model import DiffusionModel
    from farout.features.extractor import FeatureExtractor
    from farout.features.feature_diffusion import FeatureDiffusion

__all__ = ["KIND", "load", "save"]

KIND = "detector"
N = TypeVar("N", "FeatureExtractor", "Classifier")


def save(detector: DetectorInterface, folder: Path, link: Path | None) -> None:
    """See `Detector.save`."""
    detector.check_fitted()
    if not hasattr(detector, "preprocessing"):
        raise FaroutError("a detector fitted to plain features cannot be saved: it has no preprocessing of images")
    with store.atomic_folder(folder, KIND) as temporary:
        detector.statistics.write(temporary / "statistics.parquet")
        detector.calibration.write(temporary / "calibration.parquet")
        arrays = {name: torch.as_tensor(value) for name, value in detector.state().items()}
        store.save_tensors(temporary / "fitted.safetensors", arrays)
        for name in ("statistics", "calibration"):
            store.write_hashes(temporary / f"{name}.txt", getattr(detector, f"{name}_hashes"))
        models: dict[str, Any] = {"diffusion": _model(detector, temporary, link)}
        models |= {name: _inside(getattr(detector, name), temporary / name) for name in ("features", "classifier")}
        store.write_config(temporary, KIND, {**_content(detector), **models})
        (temporary / "README.md").write_text(_card(detector), encoding="utf-8")


def _content(detector: DetectorInterface) -> dict[str, Any]:
    return {
        "method": DETECTORS.name_of(type(detector)),
        "config": detector.config,
        "runtime": asdict(detector.runtime),
        "alpha": detector.alpha,
        "seed": detector.seed,
        "preprocessing": detector.preprocessing.to_dict(),
        "provenance": detector.provenance,
    }


def _model(detector: DetectorInterface, folder: Path, link: Path | None) -> dict[str, str] | None:
    if detector.diffusion is None:
        return None
    if link is None:
        detector.diffusion.save(folder / "diffusion")
        return {"path": "diffusion", "hash": detector.diffusion.content_hash}
    return {**_ways(folder.resolve(), link.resolve()), "hash": detector.diffusion.content_hash}


def _ways(folder: Path, link: Path) -> dict[str, str]:
    """To a linked model: its path, and the way from the detector's folder, which stays when both move together."""
    if link.drive != folder.drive:
        return {"path": str(link)}
    return {"path": str(link), "beside": Path(os.path.relpath(link, folder)).as_posix()}


def _inside(network: FeatureExtractor | Classifier | None, folder: Path) -> str | None:
    """Saves a network within the detector's folder; its hash."""
    if network is None:
        return None
    network.save(folder)
    return network.content_hash


def load(folder: Path, changes: dict[str, Any]) -> Any:
    """See `farout.detectors.base.load`."""
    config = store.read_config(folder, KIND)
    detector = _unfitted(folder, config)
    detector.alpha, detector.seed = config["alpha"], config["seed"]
    detector.preprocessing = Preprocessing.from_dict(config["preprocessing"])
    detector.provenance = config["provenance"]
    for name in ("statistics", "calibration"):
        setattr(detector, f"{name}_hashes", store.read_hashes(folder / f"{name}.txt"))
    if config.get("features") is not None:
        from farout.features.extractor import FeatureExtractor

        detector.features = _read_inside(FeatureExtractor, folder / "features", config["features"])
    if config.get("classifier") is not None:
        from farout.classifiers.model import Classifier

        detector.classifier = _read_inside(Classifier, folder / "classifier", config["classifier"])
    diffusion, place = _read_model(folder, config["diffusion"], detector.diffusion_of)
    detector.link = None if place is None or place.parent == folder else place.resolve()
    detector.use(diffusion, _runtime(Runtime(**config["runtime"]), changes))
    detector.restore({name: t.numpy() for name, t in store.load_tensors(folder / "fitted.safetensors").items()})
    detector.statistics = Measurements.read(folder / "statistics.parquet")
    calibrate(detector, Measurements.read(folder / "calibration.parquet"))
    return detector


def _unfitted(folder: Path, config: dict[str, Any]) -> Any:
    method = DETECTORS[config["method"]].load()
    try:
        detector: DetectorInterface = method(**_tuples(config["config"]))
    except (FaroutError, TypeError) as error:
        raise StoreError(f"{folder} has settings that this version rejects; fit it again: {error}") from error
    return detector


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only; sequences in configurations are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}


def _read_inside(kind: type[N], folder: Path, wanted: str) -> N:
    network = kind.load(folder)
    if network.content_hash != wanted:
        raise StoreError(
            f"the {folder.name} in {folder.parent} are not the ones this detector was fitted with (hash differs)"
        )
    return network


def _read_model(
    folder: Path, entry: dict[str, str] | None, data: Literal["images", "features"]
) -> tuple[DiffusionModel | FeatureDiffusion | None, Path | None]:
    """The diffusion model and its folder; a linked one may have moved together with the detector."""
    if entry is None:
        return None, None
    places = [folder / entry[name] for name in ("path", "beside") if name in entry]
    there = [place for place in places if place.is_dir()]
    if not there:
        raise StoreError(f"{folder} requires the diffusion model in {places[0]}, and there is none")
    for place in there:
        model = diffusion_class(data).load(place)
        if model.content_hash == entry["hash"]:
            return model, place
    raise StoreError(f"the diffusion model in {there[0]} is not the one this detector was fitted with (hash differs)")


def _runtime(fitted: Runtime, changes: dict[str, Any]) -> Runtime:
    """The fitted settings with the caller's changes; a device that is not here gives way to `auto`."""
    runtime = replace(fitted, **{"device": _device(fitted.device), **changes}).resolved()
    if runtime.precision != fitted.precision:
        message = (
            f"fitted with precision {fitted.precision}, now {runtime.precision}: p-values and flags are not reliable; "
            f"use precision {fitted.precision}, or fit again"
        )
        warnings.warn(message, TrapWarning, stacklevel=4)
    return runtime


def _device(fitted: str) -> str:
    try:
        resolve_device(fitted)
    except FaroutError:
        return "auto"
    return fitted


def _card(detector: DetectorInterface) -> str:
    about = detector.describe()
    lines = [f"# A farout detector: {about.pop('method')}", ""]
    lines += [f"- {name}: {value}" for name, value in {**about, **detector.provenance}.items()]
    return "\n".join([*lines, "", "Score images with `farout score FOLDER SOURCE --out RESULTS`.", ""])
