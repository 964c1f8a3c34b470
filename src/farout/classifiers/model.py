"""A classifier: network, normalization, preprocessing and class names; logits and features in one pass."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from farout.classifiers.networks import RESNETS, NetworkSpec, Stem, capture_inputs, find_head, find_pool, linear_layer
from farout.classifiers.weights import WEIGHTS_HINT, describe_mismatches, load_weights, model_card, rename_weights
from farout.core import store
from farout.core.backends import Backend, NetworkRunner
from farout.core.chunking import BatchSize, call_in_chunks
from farout.core.devices import Precision
from farout.core.errors import FaroutError, StoreError
from farout.core.names import find_path
from farout.core.network_size import limit_parameters
from farout.core.schema import Schema, check_content, create_dataclass
from farout.data.preprocessing import Preprocessing
from farout.diffusion.diffusers_folders import local_folder
from farout.features.backbones import read_weights

__all__ = ["KIND", "Classifier", "Outputs"]

KIND = "classifier"
"""What `config.json` calls a folder of this class."""


class _Content(Schema):
    """`config.json` of a classifier; `network` and `preprocessing` are checked by what they are passed to."""

    network: dict[str, Any]
    mean: list[float]
    std: list[float]
    class_names: list[str]
    preprocessing: dict[str, Any]
    content_hash: str
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Outputs:
    """The outputs of a classifier for a batch, float32.

    Attributes:
        logits: (B, K).
        features: (B, D), the input of the last linear layer.
        maps: (B, D, h, w), the input of the last global average pooling; None if they were not requested.
    """

    logits: Tensor
    features: Tensor
    maps: Tensor | None = None


class _FlatOutputs(nn.Module):
    """Logits and the inputs of named layers, one after the other, float32 (B, values).

    Attributes:
        shapes: the shape of each output of one row, once the module was called.
    """

    def __init__(self, module: nn.Module, layers: dict[str, str]) -> None:
        super().__init__()
        self.module, self.layers, self.shapes = module, layers, list[torch.Size]()

    def forward(self, x: Tensor) -> Tensor:
        with capture_inputs(self.module, **self.layers) as captured:
            outputs = [self.module(x), *(captured[name] for name in self.layers)]
        self.shapes = [output.shape[1:] for output in outputs]
        return torch.cat([output.float().flatten(1) for output in outputs], dim=1)


class Classifier:
    """A network with everything that is needed to turn images in [0, 1] into logits.

    Args:
        module: normalized images (B, C, H, W) -> logits (B, K). It is set to eval mode and channels-last weights.
        mean: mean of each channel, for images in [0, 1]: the network's input is (x - mean) / std.
        std: standard deviation of each channel.
        preprocessing: how images become the tensors (C, H, W) that the network takes.
        head: name of the last linear layer; None: it is found.
        class_names: name of each class; None: their numbers.
        network: configuration from which `module` can be built; None: the classifier cannot be saved.
        trained_on: content hashes of the images that the weights have seen.
        provenance: command, seed, data fingerprint and the like, kept in `config.json`.

    Raises:
        FaroutError: if these do not go together; the network is tested on one gray image.
    """

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        preprocessing: Preprocessing,
        *,
        head: str | None = None,
        class_names: Sequence[str] | None = None,
        network: NetworkSpec | None = None,
        trained_on: Collection[str] = (),
        provenance: dict[str, Any] | None = None,
    ) -> None:
        # Kernels depend on the memory layout; with one layout, a trained and a loaded classifier give equal results.
        self.module = module.eval().to(memory_format=torch.channels_last)
        self.mean, self.std, self.preprocessing = tuple(map(float, mean)), tuple(map(float, std)), preprocessing
        self.network, self.trained_on = network, frozenset(trained_on)
        self.provenance = dict(provenance or {})
        channels = preprocessing.channels
        if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
            raise FaroutError(
                f"mean {list(mean)} and std {list(std)}: expected {channels} numbers each, those of std positive"
            )
        self.head_name = find_head(module, head)
        probe = torch.full((1, channels, *preprocessing.size), 0.5, device=self.device)
        try:
            self.pool_name = find_pool(self.module, self.head_name, self.normalize(probe))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise FaroutError(f"the network does not take images {tuple(probe.shape[1:])}: {reason}") from error
        self.class_names = tuple(class_names) if class_names is not None else tuple(map(str, range(self.classes)))
        if len(self.class_names) != self.classes:
            raise FaroutError(f"{len(self.class_names)} class names for a network of {self.classes} classes")

    @property
    def head(self) -> nn.Linear:
        """The last linear layer: logits = features W^T + b."""
        return linear_layer(self.module, self.head_name)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.head.out_features)

    @property
    def width(self) -> int:
        """Number of features."""
        return int(self.head.in_features)

    @property
    def has_maps(self) -> bool:
        """Whether `outputs(maps=True)` is possible: the network pools its maps by a layer, not by a function."""
        return self.pool_name is not None

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.module.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the network to a device."""
        self.module.to(device)
        return self

    @cached_property
    def parameters(self) -> int:
        """Number of the network's parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def with_random_weights(self, seed: int = 0) -> Classifier:
        """The same network with random weights, a control without training.

        Raises:
            FaroutError: if the configuration of the network is not known.
        """
        if self.network is None:
            raise FaroutError("this classifier's module cannot be built again with fresh weights; pass network=...")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = self.network.build().to(self.device)
        return Classifier(
            module,
            self.mean,
            self.std,
            self.preprocessing,
            class_names=self.class_names,
            network=self.network,
            provenance={"random_weights": seed},
        )

    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1], from one call of the network in its current mode.

        They are on the classifier's device, and differentiable in the images and the weights.
        """
        logits: Tensor = self.module(self.normalize(images.to(self.device, torch.float32)))
        return logits

    def normalize(self, images: Tensor) -> Tensor:
        """The network's input (x - mean) / std for images x (B, C, H, W) in [0, 1]; other sizes are resized.

        Raises:
            FaroutError: for other shapes.
        """
        channels, size = self.preprocessing.channels, tuple(self.preprocessing.size)
        if images.ndim != 4 or images.shape[1] != channels:
            raise FaroutError(f"this classifier takes images (B, {channels}, H, W), got {tuple(images.shape)}")
        if tuple(images.shape[-2:]) != size:
            images = functional.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    @cached_property
    def _without_maps(self) -> NetworkRunner:
        return NetworkRunner(_FlatOutputs(self.module, {"features": self.head_name}), "classifier")

    @cached_property
    def _with_maps(self) -> NetworkRunner:
        layers = {"features": self.head_name, **({} if self.pool_name is None else {"maps": self.pool_name})}
        return NetworkRunner(_FlatOutputs(self.module, layers), "classifier")

    @torch.no_grad()
    def outputs(
        self,
        images: Tensor,
        batch_size: BatchSize = "auto",
        precision: Precision = "fp32",
        maps: bool = False,
        backend: Backend = "eager",
    ) -> Outputs:
        """Logits, features and maps of images, from one forward pass in eval mode, on the classifier's device.

        Args:
            images: (B, C, H, W) in [0, 1]; other sizes are resized.
            batch_size: maximum number of rows of one network call; `auto`: by memory.
            precision: precision of the network; the outputs are float32.
            maps: also return the maps.
            backend: the library that evaluates the network.

        Raises:
            FaroutError: for images of other channels, and for maps of a network without a pooling layer.
        """
        if maps and not self.has_maps:
            raise FaroutError("this network has no layer that pools its feature maps, so they cannot be had")
        outputs = self._with_maps if maps else self._without_maps
        module: Any = outputs.module
        was_training = self.module.training
        self.module.eval()
        try:
            x = self.normalize(images.to(self.device, torch.float32))
            call = partial(outputs, precision=precision, backend=backend)
            flat = call_in_chunks(self.module, call, x, batch_size=batch_size)
        finally:
            self.module.train(was_training)
        shapes = module.shapes
        columns = torch.split(flat, [shape.numel() for shape in shapes], dim=1)
        return Outputs(*[values.reshape(-1, *shape) for values, shape in zip(columns, shapes, strict=True)])

    @property
    def content_hash(self) -> str:
        """SHA-256 of the weights and of everything that decides what they compute."""
        description = {
            "mean": self.mean,
            "std": self.std,
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": self.class_names,
            "head": self.head_name,
            "network": self.network.to_dict() if self.network is not None else type(self.module).__qualname__,
        }
        key = json.dumps(description, sort_keys=True)
        return store.hash_tensors({**self.module.state_dict(), key: torch.zeros(1)})

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        size: int | tuple[int, int],
        channels: int = 3,
        head: str | None = None,
        class_names: Sequence[str] | None = None,
        network: str | NetworkSpec | None = None,
    ) -> Classifier:
        """A classifier from any torch module.

        Args:
            module: normalized images (B, C, H, W) -> logits (B, K); it is set to eval mode.
            mean: mean of each channel, for images in [0, 1].
            std: standard deviation of each channel.
            size: size of the images in pixels: a side, or (height, width).
            channels: 1 or 3.
            head: name of the last linear layer; None: the last one registered.
            class_names: name of each class; None: their numbers.
            network: name or configuration of the network (see `NetworkSpec`); without it the classifier cannot be
                saved. The network is built with these weights and must give the same logits.

        Raises:
            FaroutError: if the module does not take such images, or is not the named network.
        """
        preprocessing = _preprocessing_of_size(size, channels)
        classifier = cls(module, mean, std, preprocessing, head=head, class_names=class_names)
        if network is None:
            return classifier
        if isinstance(network, NetworkSpec):
            specs = [network]
        else:
            stems = get_args(Stem) if network in RESNETS else (None,)
            specs = [NetworkSpec(network, classifier.classes, channels, preprocessing.size, stem) for stem in stems]
        probe = torch.rand(2, channels, *preprocessing.size)
        logits = classifier.outputs(probe).logits
        for spec in specs:
            built = spec.build()
            weights = rename_weights(module.state_dict(), built.state_dict(), find_head(built))
            if describe_mismatches(weights, built.state_dict()):
                continue
            built.load_state_dict(weights)
            built = built.to(classifier.device)
            rebuilt = cls(built, mean, std, preprocessing, class_names=classifier.class_names, network=spec)
            if torch.allclose(rebuilt.outputs(probe).logits, logits, rtol=1e-3, atol=1e-4):
                return rebuilt
        name = network if isinstance(network, str) else network.name
        raise FaroutError(f"this module is not the network {name}: its weights or its logits differ")

    @classmethod
    def from_weights(
        cls,
        path: str | Path,
        *,
        network: str,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | tuple[int, int],
        channels: int = 3,
        stem: Stem | None = None,
        classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Classifier:
        """A classifier from the weights of a file.

        The file is a `.safetensors` file, or a state dict in `.pt`, `.pth` or `.ckpt`, which is read without unpickling
        objects. For checkpoints of OpenOOD the network is `resnet18`.

        Args:
            path: the file.
            network: name of the network, see `NetworkSpec`.
            mean: mean of each channel in the training of the weights, for images in [0, 1].
            std: standard deviation of each channel, likewise.
            size: size of the images in pixels: a side, or (height, width).
            channels: 1 or 3.
            stem: first layers of a ResNet, see `NetworkSpec`.
            classes: number of classes; None: that of the last layer in the file.
            class_names: name of each class; None: their numbers.

        Raises:
            StoreError: for a file that cannot be read or does not fit; the message names what is missing or unexpected.
        """
        tensors = read_weights(find_path(path), WEIGHTS_HINT)
        preprocessing = _preprocessing_of_size(size, channels)
        draft = NetworkSpec(network, classes or 2, channels, preprocessing.size, stem).build()
        head = find_head(draft)
        head_weight = rename_weights(tensors, draft.state_dict(), head).get(f"{head}.weight")
        if head_weight is None:
            raise StoreError(f"{path} has no last layer {head}; expected the weights of {network} with a head")
        spec = NetworkSpec(network, classes or len(head_weight), channels, preprocessing.size, stem)
        module = spec.build()
        load_weights(module, tensors, str(path), network)
        provenance = {"weights": Path(path).name}
        return cls(module, mean, std, preprocessing, class_names=class_names, network=spec, provenance=provenance)

    def save(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors`, `trained_on.txt` and a model card, atomically.

        Raises:
            FaroutError: if the configuration of the network is not known.
        """
        if self.network is None:
            raise FaroutError(
                "this classifier's module cannot be built again from a folder; pass network=... (resnet18, wrn40_2, a "
                "name of timm's, …) to from_module, so that it can be saved"
            )
        with store.atomic_folder(folder, KIND) as temporary:
            content = {
                "network": self.network.to_dict(),
                "mean": list(self.mean),
                "std": list(self.std),
                "class_names": list(self.class_names),
                "preprocessing": self.preprocessing.to_dict(),
                "content_hash": self.content_hash,
                "provenance": self.provenance,
            }
            store.write_config(temporary, KIND, content)
            store.save_tensors(temporary / "model.safetensors", self.module.state_dict())
            store.write_hashes(temporary / "trained_on.txt", self.trained_on)
            (temporary / "README.md").write_text(model_card(self.parameters, content), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Classifier:
        """Loads a folder that farout wrote, or `hf://owner/name` of one.

        Raises StoreError for a folder that is missing, incomplete, altered or of another kind.
        """
        path = local_folder(folder)
        config = store.read_config(path, KIND)
        where = str(path / "config.json")
        check_content(config, _Content, where)
        spec = create_dataclass(NetworkSpec, config["network"], f"{where}: network")
        preprocessing = create_dataclass(Preprocessing, config["preprocessing"], f"{where}: preprocessing")
        store.check_hashes(path)
        with store.explain_load_errors(path):
            tensors = store.load_tensors(path / "model.safetensors")
            with limit_parameters(sum(map(torch.numel, tensors.values())), spec.name, path):
                module = spec.build()
            load_weights(module, tensors, str(path), spec.name)
            classifier = cls(
                module,
                config["mean"],
                config["std"],
                preprocessing,
                class_names=config["class_names"],
                network=spec,
                trained_on=store.read_hashes(path / "trained_on.txt"),
                provenance=config["provenance"],
            )
        if classifier.content_hash != config["content_hash"]:
            raise StoreError(f"{path}: the weights are not those that were saved (their hash differs)")
        return classifier


def _preprocessing_of_size(size: int | tuple[int, int], channels: int) -> Preprocessing:
    sides = (size, size) if isinstance(size, int) else size
    return Preprocessing(size=sides, channels=channels, native=sides)
