"""Read the specification of a benchmark from a preset or a YAML file, and check all names and values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from farout.benchmark.presets import preset_file, preset_names
from farout.benchmark.specification import (
    SECTIONS,
    BenchmarkSpec,
    DetectorSpec,
    NetworkSpec,
    OutlierSpec,
    ReconstructionSpec,
)
from farout.benchmark.validation import build, require_mapping, to_plain_values
from farout.classifiers.config import ClassifierConfig
from farout.classifiers.outlier_exposure import Exposure
from farout.classifiers.presets import PRESETS as CLASSIFIER_PRESETS
from farout.core.errors import FaroutError, suggest_names
from farout.core.names import encode_name_once, find_path
from farout.core.registry import Registry
from farout.core.yaml_files import YAMLError, describe_kind, dump_yaml, read_yaml
from farout.data.preprocessing import Protocol
from farout.detectors import DETECTORS
from farout.diffusion.config import PRESETS as DIFFUSION_PRESETS
from farout.diffusion.config import DiffusionConfig
from farout.evaluation.trivial_baselines import NAME as TRIVIAL
from farout.synthesis import SYNTHESIZERS
from farout.training.config import TrainingConfig

__all__ = ["parse_benchmark", "random_weights_name", "read_benchmark", "to_yaml"]

MethodSpec = TypeVar("MethodSpec", OutlierSpec, DetectorSpec)

_RANDOM_WEIGHTS = ", random weights"
_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+,()=-]*")
_NETWORK_KINDS: dict[str, tuple[type[DiffusionConfig | ClassifierConfig], Mapping[str, Any]]] = {
    "diffusion": (DiffusionConfig, DIFFUSION_PRESETS),
    "classifier": (ClassifierConfig, CLASSIFIER_PRESETS),
}
_KIND_TITLES = {"diffusion": "diffusion model", "classifier": "classifier"}


def random_weights_name(detector: str) -> str:
    """The name of a detector's random-weights baseline."""
    return f"{detector}{_RANDOM_WEIGHTS}"


def read_benchmark(
    benchmark: str | Path,
    *,
    limit: int | None = None,
    seeds: tuple[int, ...] | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> BenchmarkSpec:
    """Read the specification of a preset, or of a YAML file.

    Args:
        benchmark: the name of a preset, or the path of a file (with a suffix or a separator).
        limit, seeds: override the specification.
        runtime: single settings that override those of the specification.

    Raises FaroutError for an unknown preset, a missing file, and everything that `parse_benchmark` refuses.
    """
    text = str(benchmark)
    if Path(text).suffix or re.search(r"[/\\]", text):
        path = find_path(text)
    elif text in preset_names():
        path = preset_file(text)
    else:
        raise FaroutError(f"there is no benchmark {text!r}; {suggest_names(text, preset_names())}; a file is NAME.yaml")
    if not path.exists():
        known = ", ".join(preset_names())
        raise FaroutError(f"there is no file {path}; give a YAML file, or a preset: {known}")
    try:
        content = read_yaml(path)
    except YAMLError as error:
        raise FaroutError(f"{path} is not a YAML file ({error})") from error
    if not isinstance(content, dict | None):
        raise FaroutError(
            f"{path} contains {describe_kind(content)}; expected settings by name, such as `train: SOURCE`"
        )
    values = {"name": path.stem, **require_mapping(content, str(path))}
    values["runtime"] = {**require_mapping(values.get("runtime"), "runtime"), **(runtime or {})}
    overrides = {"limit": limit, "seeds": seeds}
    return parse_benchmark({**values, **{name: value for name, value in overrides.items() if value is not None}})


def parse_benchmark(content: Mapping[str, Any]) -> BenchmarkSpec:
    """Build a specification from YAML values; all settings are filled in from presets and defaults.

    Raises FaroutError that names the YAML key: for unknown keys, methods, presets and names, wrong types, values out of
    range, and networks that do not fit together.
    """
    values = dict(content)
    missing = [name for name in ("name", "train", "id", "ood", "detectors") if not values.get(name)]
    if missing:
        raise FaroutError(
            f"the benchmark lacks {', '.join(missing)}; expected at least name, train, id, ood, detectors"
        )
    if not isinstance(values["ood"], Mapping):
        raise FaroutError(f"ood requires lists of sources by group, such as near and far, got {values['ood']!r}")
    # a single source need not be a list
    values["ood"] = {name: [each] if isinstance(each, str) else each for name, each in values["ood"].items()}
    values |= {name: _encode_sources(values[name]) for name in ("train", "id", "ood")}
    protocol = values.get("protocol", BenchmarkSpec.protocol)
    if protocol not in get_args(Protocol):
        raise FaroutError(f"protocol must be one of {', '.join(get_args(Protocol))}, got {protocol!r}")

    entries = {section: require_mapping(values.get(section), section) for section in SECTIONS if section != "detectors"}
    entries["detectors"] = _name_detectors(values["detectors"])
    for section, named in entries.items():
        for name in named:  # names become parts of folder names
            if not _NAME_PATTERN.fullmatch(name) or name == TRIVIAL or name.endswith(_RANDOM_WEIGHTS):
                raise FaroutError(
                    f"{section} has the name {name!r}; expected letters, digits, spaces and . _ + , ( ) = -; "
                    f"{TRIVIAL} and names that end in {_RANDOM_WEIGHTS!r} are reserved"
                )
    values["networks"] = {
        name: _parse_network(entry, f"networks.{name}", protocol) for name, entry in entries["networks"].items()
    }
    values["outliers"] = {
        name: _parse_method(OutlierSpec, SYNTHESIZERS, entry, f"outliers.{name}")
        for name, entry in entries["outliers"].items()
    }
    values["reconstructions"] = {
        name: build(ReconstructionSpec, entry, f"reconstructions.{name}")
        for name, entry in entries["reconstructions"].items()
    }
    values["detectors"] = {
        name: _parse_method(DetectorSpec, DETECTORS, entry, f"detectors.{name}")
        for name, entry in entries["detectors"].items()
    }
    spec = build(BenchmarkSpec, values, "")
    _check_references(spec)
    return spec


def _encode_sources(value: Any) -> Any:
    """Write sources as in the tables of results, where they are names of columns and rows."""
    if isinstance(value, Mapping):
        return {name: _encode_sources(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_encode_sources(each) for each in value]
    return encode_name_once(value) if isinstance(value, str) else value


def to_yaml(spec: BenchmarkSpec) -> str:
    """The specification with every setting, as a file that `read_benchmark` reads."""
    content = to_plain_values(spec)
    for section in SECTIONS:
        content[section] = {
            name: {key: value for key, value in entry.items() if value is not None}
            for name, entry in content[section].items()
        }
    content["detectors"] = [{"name": name, **entry} for name, entry in content["detectors"].items()]
    return dump_yaml(content, width=120)


def _name_detectors(items: Any) -> dict[str, dict[str, Any]]:
    """The list of detectors by name; the default name is that of the method."""
    if not isinstance(items, list):
        raise FaroutError(f"detectors must be a list of entries with a method, got {items!r}")
    detectors: dict[str, dict[str, Any]] = {}
    for number, item in enumerate(items):
        entry = {"method": item} if isinstance(item, str) else require_mapping(item, f"detectors[{number}]")
        name = entry.pop("name", entry.get("method"))
        if name is None:
            raise FaroutError(f"detectors[{number}] lacks a method; {suggest_names('', DETECTORS)}")
        name = str(name)
        if name.lower() in map(str.lower, detectors):
            raise FaroutError(f"two detectors are called {name}; give one of them another name")
        detectors[name] = entry
    return detectors


def _parse_network(entry: Any, where: str, protocol: str) -> NetworkSpec:
    values = require_mapping(entry, where)
    kind, preset = values.get("kind"), values.get("preset", NetworkSpec.preset)
    if kind not in _NETWORK_KINDS:
        raise FaroutError(f"{where}: kind is {kind!r}; expected one of {', '.join(_NETWORK_KINDS)}")
    config_class, presets = _NETWORK_KINDS[kind]
    if preset not in presets:
        raise FaroutError(
            f"{where}: there is no preset {preset!r} of a {_KIND_TITLES[kind]}; {suggest_names(str(preset), presets)}"
        )
    base = presets[preset]
    values["model"] = build(
        config_class, values.get("model"), f"{where}.model", base={**base["model"], "protocol": protocol}
    )
    values["training"] = build(TrainingConfig, values.get("training"), f"{where}.training", base=base["training"])
    if kind == "classifier":
        has_outliers, has_reconstructions = (values.get(key) is not None for key in ("outliers", "reconstructions"))
        base_exposure, given = base.get("exposure", {}), values.get("exposure")
        # with another loss than that of the preset, the preset's settings of its own loss have no effect
        exposure = build(Exposure, given, f"{where}.exposure", base=base_exposure)
        unused = exposure.unused_settings(has_outliers, has_reconstructions)
        values["exposure"] = build(Exposure, given, f"{where}.exposure", base={**base_exposure, **unused})
    network = build(NetworkSpec, values, where)

    if network.folder is not None and not network.folder.startswith("hf://") and not find_path(network.folder).is_dir():
        raise FaroutError(f"{where}: there is no folder {network.folder}")
    if network.model.protocol != protocol:
        raise FaroutError(
            f"{where}: protocol is {network.model.protocol}, that of the benchmark is {protocol}; give it once"
        )
    if network.kind == "diffusion" and network.exposure is not None:
        raise FaroutError(f"{where}: exposure is for classifiers; leave it out")
    if network.kind == "diffusion" and (network.outliers or network.reconstructions):
        raise FaroutError(f"{where}: outliers and reconstructions are for classifiers; leave them out")
    if network.folder is not None and (network.outliers or network.reconstructions):
        raise FaroutError(f"{where}: {network.folder} is trained already; leave outliers and reconstructions out")
    if network.exposure is not None and network.folder is None:
        try:
            network.exposure.resolve_defaults(network.outliers is not None, network.reconstructions is not None)
        except FaroutError as error:
            raise FaroutError(f"{where}: {error}") from error
    return network


def _parse_method(spec_class: type[MethodSpec], registry: Registry, entry: Any, where: str) -> MethodSpec:
    """An entry with all settings of its method, from the preset and `arguments`."""
    values = require_mapping(entry, where)
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
    values["arguments"] = build(method, values.get("arguments"), f"{where}.arguments", base=base).config
    return build(spec_class, values, where)


def _check_references(spec: BenchmarkSpec) -> None:
    """Check that every entry that is named exists, is of the right kind, and is used."""
    for section in SECTIONS:
        for name, entry in spec.section(section).items():
            where = f"{section}.{name}"
            for other_section, other in entry.dependencies:
                known = spec.section(other_section)
                if other not in known:
                    raise FaroutError(
                        f"{where}: there is no {other!r} in {other_section}; {suggest_names(other, known)}"
                    )
            for kind in _KIND_TITLES:
                network = getattr(entry, kind, None)
                if network is not None and spec.networks[network].kind != kind:
                    other_kind = _KIND_TITLES[spec.networks[network].kind]
                    raise FaroutError(f"{where}: {network} is a {other_kind}, expected a {_KIND_TITLES[kind]}")

    for name, detector_spec in spec.detectors.items():
        where, detector = f"detectors.{name}", detector_spec.build_detector()
        requirements = detector.requirements
        uses = {"diffusion": requirements.diffusion == "images", "classifier": requirements.classifier}
        _check_networks(uses, detector_spec, where)
        network = spec.networks.get(detector_spec.diffusion or "")
        if network is not None and network.folder is None:
            assert isinstance(network.model, DiffusionConfig)
            try:
                detector.configure_diffusion(network.model)
            except FaroutError as error:
                raise FaroutError(f"{where}: {error}") from error

    for name, outlier_spec in spec.outliers.items():
        where, synthesizer = f"outliers.{name}", outlier_spec.build_synthesizer()
        required = synthesizer.requirements
        uses = {"diffusion": required.diffusion, "classifier": required.classifier}
        _check_networks(uses, outlier_spec, where)
        network = spec.networks.get(outlier_spec.diffusion or "")
        is_conditional = network is None or network.folder is not None or getattr(network.model, "classes", False)
        if required.class_conditional and not is_conditional:
            raise FaroutError(
                f"{where}: {outlier_spec.method} requires a class-conditional diffusion model; give "
                f"{outlier_spec.diffusion} model.classes"
            )


def _check_networks(uses: Mapping[str, bool], entry: OutlierSpec | DetectorSpec, where: str) -> None:
    """Check that an entry names the networks that its method uses, and no others."""
    for kind, is_used in uses.items():
        named = getattr(entry, kind)
        if is_used and named is None:
            raise FaroutError(
                f"{where}: {entry.method} requires a {_KIND_TITLES[kind]}; name one of the networks ({kind}: NAME)"
            )
        if named is not None and not is_used:
            raise FaroutError(f"{where}: {entry.method} takes no {_KIND_TITLES[kind]}; leave it out")
