"""From YAML to a benchmark's specification: presets and files, every name and value checked before anything is done."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from farout.benchmark.presets import preset_file, preset_names
from farout.benchmark.spec import HEAD, SECTIONS, DetectorSpec, NetworkSpec, OutlierSpec, ReconstructionSpec, Spec
from farout.benchmark.typed import build, known_only, plain
from farout.classifiers.config import ClassifierConfig
from farout.classifiers.outlier_exposure import Exposure
from farout.classifiers.presets import PRESETS as CLASSIFIERS
from farout.core.errors import FaroutError, suggest_names
from farout.core.registry import Registry
from farout.core.runtime import Runtime
from farout.detectors import DETECTORS
from farout.diffusion.config import PRESETS as DIFFUSION
from farout.diffusion.config import DiffusionConfig
from farout.evaluation.baselines import TRIVIAL
from farout.synthesis import SYNTHESIZERS
from farout.training.config import TrainingConfig

__all__ = ["as_yaml", "parse_spec", "random_name", "read_spec"]

M = TypeVar("M", OutlierSpec, DetectorSpec)
_RANDOM = ", random weights"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+,()=-]*")
_NETWORKS: dict[str, tuple[type[DiffusionConfig | ClassifierConfig], Mapping[str, Any]]] = {
    "diffusion": (DiffusionConfig, DIFFUSION),
    "classifier": (ClassifierConfig, CLASSIFIERS),
}
_CALLED = {"diffusion": "diffusion model", "classifier": "classifier"}


def random_name(name: str) -> str:
    """What a detector's control with random weights is called."""
    return f"{name}{_RANDOM}"


def read_spec(given: str | Path, **changes: Any) -> Spec:
    """The specification of a preset, or of a YAML file.

    Args:
        given: the name of a preset, or the path of a file (with a suffix or a separator).
        changes: fields of `Spec` that override it; None: as it says. `runtime` changes single settings.

    Raises FaroutError for an unknown preset, a missing file, and everything that `parse_spec` refuses.
    """
    text = str(given)
    if not Path(text).suffix and not re.search(r"[/\\]", text):
        if text not in preset_names():
            raise FaroutError(
                f"there is no benchmark {text!r}; {suggest_names(text, preset_names())}; a file is NAME.yaml"
            )
        path = preset_file(text)
    else:
        path = Path(text)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(preset_names())
        raise FaroutError(f"there is no file {path}; give a YAML file, or a preset: {known}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FaroutError(f"{path} is not a YAML file ({' '.join(str(error).split())})") from error
    found = known_only(content, (f.name for f in fields(Spec)), str(path))
    runtime = known_only(found.get("runtime"), (f.name for f in fields(Runtime)), "runtime")
    runtime |= changes.pop("runtime", {})
    given_changes = {name: value for name, value in changes.items() if value is not None}
    return parse_spec({"name": path.stem, **found, **given_changes, "runtime": runtime})


def parse_spec(content: Mapping[str, Any]) -> Spec:
    """A specification from what YAML gave; all settings are filled in from presets and defaults.

    Raises FaroutError for unknown keys, methods, presets and names, wrong types, values out of range, and networks that
    do not go together.
    """
    values = known_only(content, (f.name for f in fields(Spec)), "the benchmark")
    missing = [name for name in ("name", "train", "id", "ood", "detectors") if not values.get(name)]
    if missing:
        raise FaroutError(
            f"the benchmark lacks {', '.join(missing)}; expected at least name, train, id, ood, detectors"
        )
    runtime = build(Runtime, values.get("runtime"), "runtime")
    head = {name: value for name, value in values.items() if name in HEAD}
    empty: dict[str, Any] = {"runtime": runtime, "ood": _groups(values["ood"]), **{name: {} for name in SECTIONS}}
    spec = build(Spec, head, "the benchmark", beside=empty)
    _check_head(spec)
    protocol = spec.protocol
    networks = {
        name: _network(entry, f"networks.{name}", protocol) for name, entry in _entries(values, "networks").items()
    }
    outliers = {name: _outliers(entry, f"outliers.{name}") for name, entry in _entries(values, "outliers").items()}
    again = {
        name: build(ReconstructionSpec, entry, f"reconstructions.{name}")
        for name, entry in _entries(values, "reconstructions").items()
    }
    detectors = {name: _detector(entry, f"detectors.{name}") for name, entry in _listed(values["detectors"]).items()}
    whole = replace(spec, networks=networks, outliers=outliers, reconstructions=again, detectors=detectors)
    _check_limits(whole)
    _check_references(whole)
    return whole


def as_yaml(spec: Spec) -> str:
    """The specification with every setting, as a file that `read_spec` reads."""
    found = plain(spec)
    for section in SECTIONS:
        found[section] = {name: _without_none(entry) for name, entry in found[section].items()}
    found["detectors"] = [{"name": name, **entry} for name, entry in found["detectors"].items()]
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120)


def _without_none(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value is not None}


def _groups(given: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(given, Mapping):
        raise FaroutError(f"ood requires lists of sources by group, such as near and far, got {given!r}")
    found = {}
    for name, sources in given.items():
        listed = [sources] if isinstance(sources, str) else sources
        if not isinstance(listed, list | tuple) or not all(isinstance(each, str) and each for each in listed):
            raise FaroutError(f"ood.{name} requires a list of sources, got {sources!r}")
        found[str(name)] = tuple(listed)
    return found


def _check_limits(spec: Spec) -> None:
    for section in SECTIONS:
        for name, entry in getattr(spec, section).items():
            if entry.limit is not None and entry.limit < 1:
                raise FaroutError(f"{section}.{name}: limit must be at least 1, got {entry.limit}")
    for name, detector in spec.detectors.items():
        if detector.statistics is not None and detector.statistics < 2:
            raise FaroutError(f"detectors.{name}: statistics require at least 2 images, got {detector.statistics}")


def _check_head(spec: Spec) -> None:
    every = [spec.id, *spec.sources]
    twice = sorted({source for source in every if every.count(source) > 1})
    if twice or not spec.sources:
        raise FaroutError(f"id and ood name {', '.join(twice) or 'no out-of-distribution source'}; give each set once")
    if not spec.seeds or len(set(spec.seeds)) < len(spec.seeds) or min(spec.seeds) < 0:
        raise FaroutError(f"seeds must be different whole numbers from 0, got {list(spec.seeds)}")
    if not 0 < spec.alpha < 1:
        raise FaroutError(f"alpha is a false-alarm rate between 0 and 1, got {spec.alpha}")
    for name in ("limit", "train_limit", "control_limit", "statistics"):
        if getattr(spec, name) is not None and getattr(spec, name) < 1:
            raise FaroutError(f"{name} must be at least 1, got {getattr(spec, name)}")


def _entries(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    found = values.get(section) or {}
    if not isinstance(found, Mapping):
        raise FaroutError(f"{section} requires entries by name, got {found!r}")
    for name in found:
        _check_name(name, section)
    return dict(found)


def _check_name(name: Any, section: str) -> None:
    """Names are parts of folder names."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == TRIVIAL or name.endswith(_RANDOM):
        raise FaroutError(
            f"{section} has the name {name!r}; expected letters, digits, spaces and . _ + , ( ) = -, and neither "
            f"{TRIVIAL} nor an end in {_RANDOM!r}"
        )


def _listed(given: Any) -> dict[str, dict[str, Any]]:
    """Detectors by name; one without is called as its method."""
    if not isinstance(given, list):
        raise FaroutError(f"detectors must be a list of entries with a method, got {given!r}")
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(given):
        values = {"method": entry} if isinstance(entry, str) else entry
        values = known_only(values, ("name", *(f.name for f in fields(DetectorSpec))), f"detectors[{number}]")
        name = values.pop("name", values.get("method"))
        if name is None:
            raise FaroutError(f"detectors[{number}] lacks a method; {suggest_names('', DETECTORS)}")
        _check_name(name, "detectors")
        if name.lower() in map(str.lower, found):
            raise FaroutError(f"two detectors are called {name}; give one of them another name")
        found[name] = values
    return found


def _network(entry: Any, where: str, protocol: str) -> NetworkSpec:
    values = known_only(entry, (f.name for f in fields(NetworkSpec)), where)
    kind, preset = values.get("kind"), values.get("preset", "tiny")
    if kind not in _NETWORKS:
        raise FaroutError(f"{where}: kind is {kind!r}; expected one of {', '.join(_NETWORKS)}")
    config, presets = _NETWORKS[kind]
    if preset not in presets:
        raise FaroutError(
            f"{where}: there is no preset {preset!r} of a {_CALLED[kind]}; {suggest_names(str(preset), presets)}"
        )
    parts: dict[str, Any] = {name: values.pop(name, None) for name in ("model", "training", "exposure")}
    recipe = presets[preset]
    bases = {"model": {**recipe["model"], "protocol": protocol}, "training": recipe["training"]}
    made: dict[str, Any] = {
        "model": build(config, parts["model"], f"{where}.model", base=bases["model"]),
        "training": build(TrainingConfig, parts["training"], f"{where}.training", base=bases["training"]),
        "exposure": None,
    }
    if kind == "classifier":
        base = recipe.get("exposure", {})
        made["exposure"] = _exposure(parts["exposure"], f"{where}.exposure", base, values)
    elif parts["exposure"] is not None:
        raise FaroutError(f"{where}: exposure is for classifiers; leave it out")
    network = build(NetworkSpec, values, where, beside=made)
    _check_network(network, where, protocol)
    return network


def _exposure(given: Any, where: str, base: dict[str, Any], values: dict[str, Any]) -> Exposure:
    """The preset's settings make way for another loss than the preset's; what the specification says stays."""
    read: Exposure = build(Exposure, given, where, base=base)
    idle = read.idle(values.get("outliers") is not None, values.get("reconstructions") is not None)
    found: Exposure = build(Exposure, given, where, base={**base, **idle})
    return found


def _check_network(network: NetworkSpec, where: str, protocol: str) -> None:
    if network.folder is not None and not network.folder.startswith("hf://") and not Path(network.folder).is_dir():
        raise FaroutError(f"{where}: there is no folder {network.folder}")
    if network.model.protocol != protocol:
        raise FaroutError(f"{where}: protocol is {network.model.protocol}, the benchmark's {protocol}; give it once")
    if network.kind == "diffusion" and (network.outliers or network.reconstructions):
        raise FaroutError(f"{where}: outliers and reconstructions are for classifiers; leave them out")
    if network.folder is not None and (network.outliers or network.reconstructions):
        raise FaroutError(f"{where}: {network.folder} is trained already; leave outliers and reconstructions out")
    if network.exposure is not None and network.folder is None:
        try:
            network.exposure.resolved(network.outliers is not None, network.reconstructions is not None)
        except FaroutError as error:
            raise FaroutError(f"{where}: {error}") from error


def _outliers(entry: Any, where: str) -> OutlierSpec:
    values = known_only(entry, (f.name for f in fields(OutlierSpec)), where)
    found = _of_method(OutlierSpec, SYNTHESIZERS, values, where)
    if found.count < 1:
        raise FaroutError(f"{where}: count must be at least 1, got {found.count}")
    return found


def _detector(entry: dict[str, Any], where: str) -> DetectorSpec:
    return _of_method(DetectorSpec, DETECTORS, entry, where)


def _of_method(kind: type[M], registry: Registry, values: dict[str, Any], where: str) -> M:
    """The entry with all settings of its method, which its preset and its `arguments` decide."""
    if not values.get("method"):
        raise FaroutError(f"{where} lacks a method; {suggest_names('', registry)}")
    try:
        method = registry[str(values["method"])].load()
    except FaroutError as error:
        raise FaroutError(f"{where}: {error}") from error
    preset = values.get("preset")
    if preset is not None and preset not in method.presets:
        raise FaroutError(
            f"{where}: {values['method']} has no preset {preset!r}; {suggest_names(str(preset), method.presets)}"
        )
    base = method.presets[preset] if preset is not None else {}
    made = build(method, values.pop("arguments", None), f"{where}.arguments", base=base)
    return build(kind, values, where, beside={"arguments": made.config})


def _check_references(spec: Spec) -> None:
    """Every name that is referred to is there, of the right kind, and wanted."""
    for section in SECTIONS:
        for name, entry in spec.section(section).items():
            where = f"{section}.{name}"
            for other, needed in entry.needs():
                if needed not in spec.section(other):
                    raise FaroutError(
                        f"{where}: there is no {needed!r} in {other}; {suggest_names(needed, spec.section(other))}"
                    )
            for kind in ("diffusion", "classifier"):
                _check_kind(spec, kind, getattr(entry, kind, None), where)
    for name, detector in spec.detectors.items():
        _check_detector(spec, detector, f"detectors.{name}")
    for name, outliers in spec.outliers.items():
        _check_outliers(spec, outliers, f"outliers.{name}")


def _check_kind(spec: Spec, kind: str, name: str | None, where: str) -> None:
    if name is not None and spec.networks[name].kind != kind:
        raise FaroutError(f"{where}: {name} is a {_CALLED[spec.networks[name].kind]}, expected a {_CALLED[kind]}")


def _check_wanted(wanted: Mapping[str, bool], entry: Any, where: str) -> None:
    for kind, is_wanted in wanted.items():
        named = getattr(entry, kind)
        if is_wanted and named is None:
            raise FaroutError(
                f"{where}: {entry.method} requires a {_CALLED[kind]}; name one of the networks ({kind}: NAME)"
            )
        if named is not None and not is_wanted:
            raise FaroutError(f"{where}: {entry.method} takes no {_CALLED[kind]}; leave it out")


def _check_detector(spec: Spec, entry: DetectorSpec, where: str) -> None:
    made = entry.made()
    of_images = "diffusion" in made.needs and made.diffusion_of == "images"
    _check_wanted({"diffusion": of_images, "classifier": "classifier" in made.needs}, entry, where)
    network = spec.networks.get(entry.diffusion or "")
    if network is not None and network.folder is None:
        assert isinstance(network.model, DiffusionConfig)
        try:
            made.network_config(network.model)
        except FaroutError as error:
            raise FaroutError(f"{where}: {error}") from error


def _check_outliers(spec: Spec, entry: OutlierSpec, where: str) -> None:
    made = entry.made()
    diffusion = bool({"diffusion", "classes"} & made.needs)
    _check_wanted({"diffusion": diffusion, "classifier": "classifier" in made.required_inputs}, entry, where)
    network = spec.networks.get(entry.diffusion or "")
    told = network is None or network.folder is not None or getattr(network.model, "classes", False)
    if "classes" in made.needs and not told:
        raise FaroutError(
            f"{where}: {entry.method} requires a diffusion model of classes; give {entry.diffusion} model.classes"
        )
