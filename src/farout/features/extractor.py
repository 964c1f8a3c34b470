"""Pooled and per-position features of images from several layers of a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from farout.core import store
from farout.core.backends import Backend, NetworkRunner
from farout.core.chunking import BatchSize, call_in_chunks
from farout.core.devices import Precision
from farout.core.errors import FaroutError, StoreError
from farout.core.names import expand_path
from farout.core.network_size import check_network
from farout.core.profiling import timed
from farout.core.schema import Schema, check_content
from farout.features import backbones
from farout.features.batch_norm_folding import fold_batch_norm
from farout.features.feature_maps import GridMaps, NormalizedMaps, PooledMaps

__all__ = ["KIND", "FeatureExtractor"]

KIND = "feature extractor"
_MAX_SIZE, _MAX_PARAMETERS = 4096, 10**10
"""Largest side of the input in pixels; parameters of the largest network, of which some layers may not be saved."""


class _Content(Schema):
    """`config.json` of a feature extractor."""

    name: str
    layers: list[Annotated[int, Field(ge=0, lt=1000)]]
    size: Annotated[int, Field(ge=1, le=_MAX_SIZE)]
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    origin: str
    content_hash: str


class FeatureExtractor:
    """A frozen backbone and the layers whose features are extracted.

    Args:
        network: returns one feature map (B, c, h, w) per layer, or (B, h, w, c) according to its `output_fmt`.
        name: name in timm.
        layers: indices of the layers, as in timm.
        size: side of the square input in pixels.
        mean: mean of each input channel.
        std: standard deviation of each input channel.
        origin: description of where the weights come from.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        layers: Sequence[int],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        origin: str,
    ) -> None:
        self.network, self.name, self.layers, self.size, self.origin = network, name, tuple(layers), size, origin
        self.mean, self.std = tuple(mean), tuple(std)
        self.channels: tuple[int, ...] = tuple(backbones.feature_channels(network))
        self.device = torch.device("cpu")
        # transformer features are taken before the final norm, where a few channels would dominate the others
        self.normalize = backbones.is_transformer(network)
        self.is_channels_last = backbones.is_channels_last(network)

    @classmethod
    def create(
        cls,
        backbone: str = "lite0",
        weights: str | None = None,
        layers: Sequence[int] | None = None,
        size: int | None = None,
    ) -> Self:
        """Builds a preset (`lite0`, `b4`, `resnet50`, `dinov2`) or any timm network by name.

        `weights`, `layers` and `size` override the preset's; see `farout.features.backbones.create_backbone`, also
        for errors.
        """
        if layers is not None and not layers:
            raise FaroutError("layers is empty; give at least one, or leave it out for the backbone's default")
        preset = backbones.BACKBONES.get(backbone)
        name = preset.name if preset else backbone
        taps = layers or backbones.default_layers(backbone)
        config = backbones.get_input_config(name)
        side = size if size is not None else preset.size if preset else int(config.input_size[-1])
        network, origin = backbones.create_backbone(name, tuple(sorted(taps)), side, weights)
        return cls(network, name, sorted(taps), side, config.mean, config.std, origin)

    @property
    def width(self) -> int:
        """Number of features, all layers together."""
        return sum(self.channels)

    def to(self, device: torch.device | str) -> Self:
        """Moves the network."""
        self.network.to(device)
        self.device = torch.device(device)
        for name in ("evaluated_network", "_maps", "_pooling", "_grids"):
            self.__dict__.pop(name, None)
        return self

    @cached_property
    def evaluated_network(self) -> nn.Module:
        """The network that is evaluated, without batch normalizations; `network` keeps the original weights."""
        return fold_batch_norm(self.network, self.size)

    @cached_property
    def _maps(self) -> NormalizedMaps:
        return NormalizedMaps(self.evaluated_network, self.mean, self.std, self.is_channels_last, self.normalize)

    @cached_property
    def _pooling(self) -> NetworkRunner:
        return NetworkRunner(PooledMaps(self._maps), f"backbone {self.name}")

    @cached_property
    def _grids(self) -> dict[int, NetworkRunner]:
        """By side of the grid."""
        return {}

    def pooled_features(
        self,
        images: Tensor,
        batch_size: BatchSize = "auto",
        precision: Precision = "fp32",
        backend: Backend = "eager",
    ) -> Tensor:
        """Features (B, width) float32 of images (B, 3, size, size) in [0, 1]: means over positions, layer by layer."""
        return self._call_network(self._pooling, images, batch_size, precision, backend)

    def feature_grid(
        self,
        images: Tensor,
        side: int,
        batch_size: BatchSize = "auto",
        precision: Precision = "fp32",
        backend: Backend = "eager",
    ) -> Tensor:
        """Images (B, 3, size, size) in [0, 1] -> features (B, width, side, side) float32: every layer averaged, or
        enlarged bilinearly, to one grid.
        """
        if side not in self._grids:
            self._grids[side] = NetworkRunner(GridMaps(self._maps, side), f"backbone {self.name}")
        return self._call_network(self._grids[side], images, batch_size, precision, backend)

    @timed("network")
    def _call_network(
        self, runner: NetworkRunner, images: Tensor, batch_size: BatchSize, precision: Precision, backend: Backend
    ) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise FaroutError(f"the backbone requires images (B, 3, H, W), got {tuple(images.shape)}")
        with torch.no_grad():
            ready = images.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
            call = partial(runner, precision=precision, backend=backend)
            return call_in_chunks(self.evaluated_network, call, ready, batch_size=batch_size)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the weights and of all settings that decide the features, except preprocessing and precision."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        described = f"{self.name} {self.layers} {self.size} {self.mean} {self.std} {self.normalize}"
        return store.hash_tensors({**tensors, described: torch.zeros(1)})

    def describe(self) -> dict[str, Any]:
        """Network, layers and weights, for the model card."""
        return {
            "backbone": self.name,
            "weights": self.origin,
            "layers": list(self.layers),
            "channels": list(self.channels),
            "input": self.size,
        }

    def save(self, folder: str | Path) -> None:
        """Writes configuration and weights, so that no hub is needed to load them."""
        with store.atomic_folder(folder, KIND) as temporary:
            store.save_tensors(temporary / "model.safetensors", self.network.state_dict())
            content = {
                "name": self.name,
                "layers": list(self.layers),
                "size": self.size,
                "mean": list(self.mean),
                "std": list(self.std),
                "origin": self.origin,
                "content_hash": self.content_hash,
            }
            store.write_config(temporary, KIND, content)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Loads a saved extractor; raises StoreError for a folder that is missing, altered or of another kind."""
        folder = expand_path(folder)
        config = store.read_config(folder, KIND)
        check_content(config, _Content, str(folder / "config.json"))
        store.check_hashes(folder)
        name, layers, size = config["name"], tuple(config["layers"]), config["size"]
        weights = folder / "model.safetensors"
        with store.explain_load_errors(folder):
            check_network(
                lambda: backbones.build_network(name, layers, size),
                weights,
                f"{name} of timm {backbones.TIMM_VERSION}",
                largest=_MAX_PARAMETERS,
            )
            network, _ = backbones.create_backbone(name, layers, size, "random")
            network.load_state_dict(store.load_tensors(weights))
            extractor = cls(network, name, layers, size, config["mean"], config["std"], config["origin"])
        if extractor.content_hash != config["content_hash"]:
            raise StoreError(f"{folder}: the weights are not those that were saved (their hash differs)")
        return extractor
