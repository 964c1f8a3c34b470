"""The folder of a fitted detector: configuration, measurements, statistics, and its networks or links to them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import torch
import yaml
from pydantic import Field

from farout.core import store
from farout.core.backends import Backend, explain_unusable_backend
from farout.core.devices import resolve_device
from farout.core.errors import FaroutError, MisleadingResultWarning, StoreError
from farout.core.runtime import Runtime
from farout.core.schema import Schema, check_arguments, check_content, create_dataclass
from farout.data.preprocessing import Preprocessing
from farout.detectors import DETECTORS
from farout.detectors.calibration import check_fitted, set_calibration
from farout.detectors.interface import DetectorInterface
from farout.detectors.networks import diffusion_class
from farout.detectors.results import Measurements

if TYPE_CHECKING:
    from farout.classifiers.model import Classifier
    from farout.features.extractor import FeatureExtractor

__all__ = ["KIND", "compute_fingerprint", "describe_detector", "load", "save"]

logger = logging.getLogger(__name__)

KIND = "detector"
_PARTS = "parts"
"""Folder of the detectors that a detector combines."""
N = TypeVar("N", "FeatureExtractor", "Classifier")


class _DiffusionContent(Schema):
    """The diffusion model of a detector: its content hash, and its folder, within that of the detector or outside."""

    path: str
    relative_path: str | None = None
    hash: str


class _DetectorContent(Schema):
    """`config.json` of a detector; `config`, `runtime` and `preprocessing` are checked by what they are passed to."""

    method: str
    config: dict[str, Any]
    runtime: dict[str, Any]
    alpha: Annotated[float, Field(gt=0, lt=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    preprocessing: dict[str, Any]
    provenance: dict[str, Any]
    state: list[str]
    diffusion: _DiffusionContent | None
    features: str | None
    classifier: str | None
    parts: dict[Annotated[str, Field(pattern=r"^\w[\w-]*$")], str] = Field({})


def save(detector: DetectorInterface, folder: Path, link: Path | None) -> None:
    """Write a fitted detector; see `Detector.save`."""
    check_fitted(detector)
    if not hasattr(detector, "preprocessing"):
        raise FaroutError("a detector fitted to plain features cannot be saved: it has no preprocessing of images")
    with store.atomic_folder(folder, KIND) as temporary:
        detector.statistics.write_parquet(temporary / "statistics.parquet")
        detector.calibration.write_parquet(temporary / "calibration.parquet")
        store.write_hashes(temporary / "statistics.txt", detector.statistics_hashes)
        store.write_hashes(temporary / "calibration.txt", detector.calibration_hashes)
        state = {name: torch.as_tensor(value) for name, value in detector.get_state().items()}
        if state:  # safetensors cannot read an empty file
            store.save_tensors(temporary / "fitted.safetensors", state)
        diffusion: dict[str, str] | None = None
        if detector.diffusion is not None:
            diffusion = {"path": "diffusion", "hash": detector.diffusion.content_hash}
            if link is None:
                detector.diffusion.save(temporary / "diffusion")
            else:
                diffusion["path"] = str(link.resolve())
                if link.resolve().drive == folder.resolve().drive:
                    # stays valid when detector and model are moved together
                    relative = os.path.relpath(link.resolve(), folder.resolve())
                    diffusion["relative_path"] = Path(relative).as_posix()
        hashes: dict[str, str | None] = {}
        for name, network in {"features": detector.features, "classifier": detector.classifier}.items():
            hashes[name] = None if network is None else network.content_hash
            if network is not None:
                network.save(temporary / name)
        for name, part in detector.parts.items():
            save(
                part,
                temporary / _PARTS / name,
                (part.linked_model or link) if part.requirements.diffusion == "images" else None,
            )
        content: dict[str, Any] = {
            "method": DETECTORS.name_of(type(detector)),
            "config": detector.config,
            "runtime": asdict(detector.runtime),
            "alpha": detector.alpha,
            "seed": detector.seed,
            "preprocessing": detector.preprocessing.to_dict(),
            "provenance": detector.provenance,
            "state": sorted(state),
            "diffusion": diffusion,
            **hashes,
        }
        if detector.parts:
            content["parts"] = {name: compute_fingerprint(part) for name, part in detector.parts.items()}
        store.write_config(temporary, KIND, content)
        facts = {**describe_detector(detector), **detector.provenance}
        plain = json.loads(json.dumps(facts, default=str))  # tuples as lists
        card = [
            f"# A farout detector: {facts.pop('method')}",
            "",
            "```yaml",
            yaml.safe_dump(_drop_empty(plain), sort_keys=False, allow_unicode=True, width=1000).rstrip(),
            "```",
            "",
            "Score images with `farout score FOLDER SOURCE --out RESULTS`.",
            "",
        ]
        (temporary / "README.md").write_text("\n".join(card), encoding="utf-8")


def _drop_empty(value: Any) -> Any:
    """The value without entries that are None or empty, at any depth."""
    if not isinstance(value, dict):
        return value
    entries = {key: _drop_empty(each) for key, each in value.items()}
    return {key: each for key, each in entries.items() if each is not None and each not in ("", [], {})}


def load(folder: Path, runtime: dict[str, Any]) -> Any:
    """Load a detector; see `farout.detectors.base.load`."""
    config = store.read_config(folder, KIND)
    where = str(folder / "config.json")
    check_content(config, _DetectorContent, where)
    try:
        method = DETECTORS[config["method"]].load()
        detector: DetectorInterface = method(**check_arguments(method, config["config"], "config"))
    except (FaroutError, TypeError, ValueError) as error:
        raise StoreError(f"{folder} has settings that this version rejects; fit it again: {error}") from error
    fitted_runtime = create_dataclass(Runtime, config["runtime"], f"{where}: runtime")
    detector.preprocessing = create_dataclass(Preprocessing, config["preprocessing"], f"{where}: preprocessing")
    # values first: the message about a value says more than that the file was changed
    store.check_hashes(folder)
    adapted_runtime = _adapt_runtime(fitted_runtime, runtime)
    with store.explain_load_errors(folder):
        _load_networks(detector, folder, config)
        parts = config.get("parts", {})
        detector.parts = {name: _load_part(folder / _PARTS / name, parts[name], adapted_runtime) for name in parts}
    detector.attach_runtime(adapted_runtime)
    _restore_backend(detector)
    with store.explain_load_errors(folder):
        _load_fitted(detector, folder, config["state"])
    return detector


def _restore_backend(detector: DetectorInterface) -> None:
    """In bf16, where backends round differently, use that of the calibration, unless another was given."""
    backend: Backend = detector.provenance.get("backend", "eager")
    if backend == "eager" or detector.runtime.backend != "auto" or detector.precision == "fp32":
        return
    reason = explain_unusable_backend(backend, torch.device(detector.runtime.device), detector.precision)
    if reason:
        message = f"calibrated with the backend {backend}, which cannot be used ({reason}); torch rounds differently"
        warnings.warn(message, MisleadingResultWarning, stacklevel=4)
        return
    detector.use_backend(backend)


def _load_part(folder: Path, fingerprint: str, runtime: Runtime) -> DetectorInterface:
    """Load one of the detectors that a detector combines."""
    part: DetectorInterface = load(folder, asdict(runtime))
    if compute_fingerprint(part) != fingerprint:
        raise StoreError(f"{folder} is not the detector that was combined here (fingerprint differs)")
    return part


def _load_networks(detector: DetectorInterface, folder: Path, config: dict[str, Any]) -> None:
    """Load the networks and the lists of images."""
    detector.loaded_from = folder
    detector.alpha, detector.seed = config["alpha"], config["seed"]
    detector.provenance = config["provenance"]
    detector.statistics_hashes = store.read_hashes(folder / "statistics.txt")
    detector.calibration_hashes = store.read_hashes(folder / "calibration.txt")
    if config["features"] is not None:
        from farout.features.extractor import FeatureExtractor  # a detector imports only the networks that it has

        detector.features = _load_network(FeatureExtractor, folder / "features", config["features"])
    if config["classifier"] is not None:
        from farout.classifiers.model import Classifier

        detector.classifier = _load_network(Classifier, folder / "classifier", config["classifier"])
    if config["diffusion"] is not None:
        _load_diffusion(detector, folder, config["diffusion"])


def _load_fitted(detector: DetectorInterface, folder: Path, state_names: list[str]) -> None:
    """Load the fitted arrays, the statistics and the calibration, once the networks are ready."""
    if state_names:
        state = store.load_tensors(folder / "fitted.safetensors")
        if sorted(state) != sorted(state_names):
            raise StoreError(f"{folder / 'fitted.safetensors'} has {sorted(state)}, expected {sorted(state_names)}")
        detector.set_state({name: tensor.numpy() for name, tensor in state.items()})
    detector.statistics = Measurements.read_parquet(folder / "statistics.parquet")
    # sorted scores are not saved but recomputed from the measurements
    set_calibration(detector, Measurements.read_parquet(folder / "calibration.parquet"))
    if not len(detector.calibration):
        raise StoreError(f"{folder / 'calibration.parquet'} has no images")


def compute_fingerprint(detector: DetectorInterface) -> str:
    """SHA-256 of everything that decides a score: configuration, networks, statistics and calibration."""
    plain: dict[str, Any] = {
        "config": detector.config,
        "seed": detector.seed,
        "alpha": detector.alpha,
        "preprocessing": detector.preprocessing.to_dict(),
    }
    networks = {"diffusion": detector.diffusion, "features": detector.features, "classifier": detector.classifier}
    if detector.parts:
        plain["parts"] = {name: compute_fingerprint(part) for name, part in detector.parts.items()}
    plain |= {name: "" if network is None else network.content_hash for name, network in networks.items()}
    arrays = detector.get_state() | {f"calibration.{name}": v for name, v in detector.calibration_scores.items()}
    fitted = store.hash_tensors({name: torch.as_tensor(np.ascontiguousarray(v)) for name, v in arrays.items()})
    return hashlib.sha256((json.dumps(plain, sort_keys=True, default=list) + fitted).encode()).hexdigest()


def describe_detector(detector: DetectorInterface) -> dict[str, Any]:
    """Method, configuration, runtime and counts, for the model card and the reports."""
    features = {} if detector.features is None else {"features": detector.features.describe()}
    return {
        "method": DETECTORS.find_name(type(detector)) or type(detector).__name__,
        "config": detector.config,
        **features,
        "runtime": asdict(detector.runtime),
        "alpha": detector.alpha,
        "seed": detector.seed,
        "statistics_images": len(detector.statistics),
        "calibration_images": len(detector.calibration),
        **detector.describe_statistics(),
    }


def _load_network(cls: type[N], folder: Path, content_hash: str) -> N:
    network = cls.load(folder)
    if network.content_hash != content_hash:
        raise StoreError(
            f"the {folder.name} in {folder.parent} are not the ones this detector was fitted with (hash differs)"
        )
    return network


def _load_diffusion(detector: DetectorInterface, folder: Path, entry: dict[str, str]) -> None:
    """Load the diffusion model; a linked model may have been moved together with the detector."""
    if detector.requirements.diffusion is None:
        raise StoreError(f"{folder} names a diffusion model, which its method does not use")
    cls = diffusion_class(detector.requirements.diffusion)
    candidates = [folder / entry[name] for name in ("path", "relative_path") if name in entry]
    existing = [path for path in candidates if path.is_dir()]
    if not existing:
        raise StoreError(f"{folder} requires the diffusion model in {candidates[0]}, and there is none")
    for path in existing:
        model = cls.load(path)
        if model.content_hash == entry["hash"]:
            detector.diffusion = model
            detector.linked_model = None if path.parent == folder else path.resolve()
            return
    raise StoreError(
        f"the diffusion model in {existing[0]} is not the one this detector was fitted with (hash differs)"
    )


def _adapt_runtime(fitted: Runtime, changes: dict[str, Any]) -> Runtime:
    """The runtime of the fit with the caller's changes; a device that this machine lacks is replaced by `auto`."""
    device = fitted.device
    if device.startswith("cuda:") and "LOCAL_RANK" in os.environ:
        device = "cuda"  # each of several processes uses its own
    try:
        resolve_device(device)
    except FaroutError:
        device = "auto"
    runtime = replace(fitted, **{"device": device, "backend": "auto", **changes}).resolve_auto()
    if "backend" not in changes and fitted.backend != "auto":
        precision: Any = runtime.precision  # resolved, so not `auto`
        reason = explain_unusable_backend(fitted.backend, torch.device(runtime.device), precision)
        if reason:
            logger.warning("backend: %s, that of the fit, cannot be used (%s)", fitted.backend, reason)
        else:
            runtime = replace(runtime, backend=fitted.backend)
    if runtime.precision != fitted.precision:
        message = (
            f"fitted with precision {fitted.precision}, now {runtime.precision}: p-values and flags are not reliable; "
            f"use precision {fitted.precision}, or fit again"
        )
        warnings.warn(message, MisleadingResultWarning, stacklevel=4)
    return runtime
