"""A diffusion model of feature vectors: their encoding, a learned denoiser, and the vectors that it was trained on."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor

from farout.core import store
from farout.core.chunking import BatchSize
from farout.core.devices import Precision
from farout.core.errors import FaroutError, StoreError
from farout.core.network_size import limit_parameters, read_shapes
from farout.core.schema import Schema, check_content, create_dataclass
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.diffusers_folders import local_folder
from farout.diffusion.schedule import NoiseSchedule
from farout.features.densities import Mahalanobis, PrincipalAxes, pack_arrays, unpack_arrays
from farout.features.encoding import FeatureEncoding, Standardize
from farout.features.feature_denoiser import FeatureDenoiser
from farout.features.residual_denoiser import ResidualDenoiser, ResidualNetwork

N = TypeVar("N", FeatureDenoiser, ResidualNetwork)

__all__ = ["KIND", "DenoiserKind", "FeatureDiffusion", "paper_schedule"]

KIND = "feature diffusion model"
DenoiserKind = Literal["residual", "lfdn"]
"""`residual`: a Gaussian's exact denoiser and a learned residual; `lfdn`: the network of Yang et al. (2024)."""


class _EncodingContent(Schema):
    channels: list[int]
    standardize: Standardize
    summaries: bool


class _Content(Schema):
    """`config.json` of a feature diffusion model; the schedule is checked by what it is passed to."""

    denoiser: DenoiserKind = "lfdn"  # folders of older versions have no other
    network: dict[str, Any]
    encoding: _EncodingContent
    schedule: dict[str, Any] | None
    backbone: str
    content_hash: str
    provenance: dict[str, Any]


def paper_schedule() -> NoiseSchedule:
    """100 levels, betas linear in their square root from .0015 to .0195 (Yang et al. 2024).

    The signal is still strong at the last level (abar = .41), because reconstruction only uses the first ones.
    """
    return NoiseSchedule("scaled_linear", 0.0015, 0.0195, num_levels=100)


class FeatureDiffusion:
    """Encodes features and denoises the encoded vectors.

    Args:
        network: the trained network: a `FeatureDenoiser` predicts x0; a `ResidualNetwork` is the learned part of a
            `ResidualDenoiser`.
        encoding: maps features to the encoded vectors.
        schedule: the schedule of the training of a `FeatureDenoiser`; None for a `ResidualNetwork`.
        backbone: content hash of the feature extractor that it was trained with.
        first: the denoiser after the first epoch, for the likelihood-regret score; None: without.
        gaussian: mean and covariance of the encoded training features; None: unknown.
        axes: the coordinates in which a `ResidualNetwork` denoises.
        vectors: the encoded training features (n, width), float32, for the empirical denoiser; None: not stored.
        neighbor_distances: distance of each of the vectors to its tenth neighbor (n,), float64; None: not stored.
        trained_on: content hashes of the training images.
        provenance: seed, data fingerprint, training settings and similar.
    """

    def __init__(
        self,
        network: FeatureDenoiser | ResidualNetwork,
        encoding: FeatureEncoding,
        schedule: NoiseSchedule | None,
        backbone: str,
        *,
        first: FeatureDenoiser | None = None,
        gaussian: Mahalanobis | None = None,
        axes: PrincipalAxes | None = None,
        vectors: Tensor | None = None,
        neighbor_distances: Tensor | None = None,
        trained_on: Collection[str] = (),
        provenance: dict[str, Any] | None = None,
    ) -> None:
        is_residual = isinstance(network, ResidualNetwork)
        if is_residual != (axes is not None) or is_residual != (schedule is None):
            raise FaroutError("a ResidualNetwork requires axes, a FeatureDenoiser a schedule, and neither the other's")
        width = encoding.width
        if network.config["width"] != width:
            raise FaroutError(f"the network has width {network.config['width']}, the encoded vectors {width}")
        if axes is not None:
            axes.check(width)
        if vectors is not None and not (
            vectors.ndim == 2 and len(vectors) and vectors.shape[1] == width and vectors.isfinite().all()
        ):
            shape = tuple(vectors.shape)
            raise FaroutError(f"expected finite training vectors (n, {width}) with n >= 1, got shape {shape}")
        if neighbor_distances is not None and not (
            vectors is not None
            and neighbor_distances.shape == vectors.shape[:1]
            and neighbor_distances.isfinite().all()
            and (neighbor_distances > 0).all()
        ):
            shape = tuple(neighbor_distances.shape)
            raise FaroutError(f"expected a positive neighbor distance for each training vector, got shape {shape}")
        self.network, self.encoding, self.backbone = network.eval(), encoding, backbone
        self._schedule, self.axes, self.vectors = schedule, axes, vectors
        self.neighbor_distances = neighbor_distances
        self.first, self.gaussian = None if first is None else first.eval(), gaussian
        self.trained_on = frozenset(trained_on)
        self.provenance = dict(provenance or {})

    @property
    def denoiser(self) -> DenoiserKind:
        """The kind of the learned denoiser."""
        return "lfdn" if self.axes is None else "residual"

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule; raises FaroutError for a residual denoiser, which has none."""
        if self._schedule is None:
            raise FaroutError("this feature diffusion model has a residual denoiser; one with lfdn is required")
        return self._schedule

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Moves the networks."""
        for network in self._networks().values():
            network.to(device)  # type: ignore[arg-type]  # the wrapper of diffusers is typed without self
        return self

    def _networks(self) -> dict[str, FeatureDenoiser | ResidualNetwork]:
        return {"network": self.network} if self.first is None else {"network": self.network, "first": self.first}

    def denoisers(self, batch_size: BatchSize = "auto", precision: Precision = "fp32") -> list[NetworkDenoiser]:
        """The trained network of the kind `lfdn` as a denoiser, followed by the early one if there is one."""
        return [NetworkDenoiser(n, self.schedule, "sample", batch_size, precision) for n in self._networks().values()]

    def residual_denoiser(self, batch_size: BatchSize = "auto", precision: Precision = "fp32") -> ResidualDenoiser:
        """The denoiser of the kind `residual`, of vectors in the coordinates `axes`."""
        if self.axes is None:
            raise FaroutError("this feature diffusion model has the denoiser lfdn; one with residual is required")
        return ResidualDenoiser(self.network, torch.from_numpy(self.axes.variances), batch_size, precision)

    def encode(self, features: Tensor) -> Tensor:
        """Encodes features (B, sum of channels) to x0 (B, width) on the networks' device."""
        return self.encoding(features.to(self.device, torch.float32))

    @property
    def parameters(self) -> int:
        """Number of the denoiser's parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def content_hash(self) -> str:
        """SHA-256 of the weights and of all settings that decide what they compute."""
        tensors = {f"{n}.{key}": v for n, net in self._networks().items() for key, v in net.state_dict().items()}
        schedule = {} if self._schedule is None else {"sigma": self._schedule.sigma}
        tensors |= {**schedule, **self._statistics()}
        tensors[json.dumps([self._config(), self.backbone], sort_keys=True)] = torch.zeros(1)
        return store.hash_tensors(tensors)

    def _statistics(self) -> dict[str, Tensor]:
        fitted = {"gaussian": self.gaussian, "axes": self.axes}
        arrays = pack_arrays({name: part for name, part in fitted.items() if part is not None})
        statistics = {name: torch.from_numpy(array) for name, array in arrays.items()}
        table = {"vectors": self.vectors, "neighbor_distances": self.neighbor_distances}
        stored = {name: tensor for name, tensor in table.items() if tensor is not None}
        return {"shift": self.encoding.shift, "scale": self.encoding.scale, **statistics, **stored}

    def _config(self) -> dict[str, Any]:
        """Configuration of network and encoding, as JSON values."""
        network = {name: value for name, value in dict(self.network.config).items() if not name.startswith("_")}
        encoding = {
            "channels": list(self.encoding.channels),
            "standardize": self.encoding.standardize,
            "summaries": self.encoding.summaries,
        }
        kind = {} if self.denoiser == "lfdn" else {"denoiser": self.denoiser}  # as in hashes of older versions
        return {**kind, "network": network, "encoding": encoding}

    def with_random_weights(self, seed: int = 0) -> FeatureDiffusion:
        """The same model with random weights, each tensor sampled with its own mean and standard deviation."""
        generator = torch.Generator().manual_seed(seed)
        model = copy.copy(self)
        model.network, model.first = copy.deepcopy(self.network), copy.deepcopy(self.first)
        # trained_on is kept: encoding and covariance depend on the training images
        model.provenance = {"random_weights": seed}
        with torch.no_grad():
            for parameter in [p for network in model._networks().values() for p in network.parameters()]:
                drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.copy_(parameter.mean() + parameter.std(correction=0) * drawn)
        return model

    def save(self, folder: str | Path) -> None:
        """Writes a folder: `network/` and `first/` in diffusers' layout, the features' statistics, `config.json`."""
        with store.atomic_folder(folder, KIND) as temporary:
            for name, network in self._networks().items():
                network.save_pretrained(temporary / name)
            store.save_tensors(temporary / "statistics.safetensors", self._statistics())
            content = {
                **self._config(),
                "schedule": None if self._schedule is None else self._schedule.to_dict(),
                "backbone": self.backbone,
                "content_hash": self.content_hash,
                "provenance": self.provenance,
            }
            store.write_config(temporary, KIND, content)
            store.write_hashes(temporary / "trained_on.txt", self.trained_on)
            (temporary / "README.md").write_text(self._model_card(), encoding="utf-8")

    def _model_card(self) -> str:
        lines = ["# A farout diffusion model of features", ""]
        if self._schedule is None:
            lines.append(f"- network: {self.parameters:,} parameters, the residual of a Gaussian's exact denoiser")
        else:
            lines.append(f"- network: {self.parameters:,} parameters, predicts x0")
            lines.append(f"- schedule: {self._schedule.kind}, {self._schedule.num_levels} levels")
        lines.append(f"- backbone: {self.backbone}")
        lines += [f"- {name}: {value}" for name, value in self.provenance.items()]
        return "\n".join([*lines, "", "Load it with `farout.FeatureDiffusion.load(folder)`.", ""])

    @classmethod
    def load(cls, folder: str | Path) -> FeatureDiffusion:
        """Loads a folder, or `hf://owner/name`.

        Raises StoreError for a folder that is missing, incomplete, altered or of another kind.
        """
        path = local_folder(folder)
        config = store.read_config(path, KIND)
        where = str(path / "config.json")
        check_content(config, _Content, where)
        is_residual = config.get("denoiser", "lfdn") == "residual"
        if is_residual != (config["schedule"] is None):
            raise StoreError(f"{where}: a schedule belongs to the denoiser lfdn, and only to it")
        schedule = None if is_residual else create_dataclass(NoiseSchedule, config["schedule"], f"{where}: schedule")
        store.check_hashes(path)
        with store.explain_load_errors(path):
            model = cls._read(path, config, schedule)
        if model.content_hash != config["content_hash"]:
            raise StoreError(f"{path}: the weights are not those that were saved (their hash differs)")
        return model

    @classmethod
    def _read(cls, path: Path, config: dict[str, Any], schedule: NoiseSchedule | None) -> FeatureDiffusion:
        statistics = store.load_tensors(path / "statistics.safetensors")
        arrays = {name: tensor.numpy() for name, tensor in statistics.items()}
        gaussian, axes = unpack_arrays(arrays, "gaussian"), unpack_arrays(arrays, "axes")
        encoding = {**config["encoding"], "channels": tuple(config["encoding"]["channels"])}
        return cls(
            _read_network(path / "network", FeatureDenoiser if schedule is not None else ResidualNetwork),
            FeatureEncoding(**encoding, shift=statistics["shift"], scale=statistics["scale"]),
            schedule,
            config["backbone"],
            first=_read_network(path / "first", FeatureDenoiser) if (path / "first").is_dir() else None,
            gaussian=Mahalanobis.from_arrays(gaussian) if gaussian else None,
            axes=PrincipalAxes.from_arrays(axes) if axes else None,
            vectors=statistics.get("vectors"),
            neighbor_distances=statistics.get("neighbor_distances"),
            trained_on=store.read_hashes(path / "trained_on.txt"),
            provenance=config["provenance"],
        )


def _read_network(folder: Path, network: type[N]) -> N:
    shapes = read_shapes(folder / "diffusion_pytorch_model.safetensors")
    store.read_json(folder / "config.json")  # raises for what diffusers cannot read
    try:
        with limit_parameters(sum(map(math.prod, shapes.values())), "the network of its config.json", folder):
            return network.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"the weights in {folder} cannot be read ({error})") from error
