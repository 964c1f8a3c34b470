"""A classifier: network, normalisation, preprocessing and class names; logits and features in one pass."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from farout.classifiers.networks import RESNETS, NetworkSpec, Stem, find_head, find_pool, watched
from farout.classifiers.weights import HOW, fit_names, load_weights, misfits, model_card
from farout.core import store
from farout.core.chunking import BatchSize, call_in_chunks
from farout.core.devices import Precision, autocast
from farout.core.errors import FaroutError, StoreError
from farout.data.preprocessing import Preprocessing
from farout.diffusion.diffusers_folders import local_folder
from farout.features.backbones import read_weights

__all__ = ["KIND", "Classifier", "Outputs"]

KIND = "classifier"
"""What `config.json` calls a folder of this class."""


@dataclass(frozen=True)
class Outputs:
    """What one pass gives, float32: logits (B, K), features (B, D) = the input of the last linear layer, and where
    they were asked for, maps (B, D, h, w) = the input of the last global average pool.
    """

    logits: Tensor
    features: Tensor
    maps: Tensor | None = None


class Classifier:
    """All that turns images in [0, 1] into logits.

    Args:
        module: normalised images (B, C, H, W) -> logits (B, K). It is put into eval mode, its weights channels-last.
        mean: mean of each channel, for images in [0, 1].
        std: standard deviation of each channel; the network receives (x - mean) / std.
        preprocessing: how images become the (C, H, W) tensors that it takes.
        features: name of the last linear layer; None: it is found.
        class_names: name of each class; None: their numbers.
        network: what builds `module` anew; None: the classifier cannot be saved.
        trained_on: content hashes of the images that the weights have seen.
        provenance: command, seed, data fingerprint and the like, kept in `config.json`.

    Raises FaroutError where these do not go together; the network is tried on one grey image.
    """

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        preprocessing: Preprocessing,
        *,
        features: str | None = None,
        class_names: Sequence[str] | None = None,
        network: NetworkSpec | None = None,
        trained_on: Collection[str] = (),
        provenance: dict[str, Any] | None = None,
    ) -> None:
        # kernels follow the weights' layout; one layout, whether trained just now or loaded, gives one result
        self.module = module.eval().to(memory_format=torch.channels_last)
        self.mean, self.std, self.preprocessing = tuple(map(float, mean)), tuple(map(float, std)), preprocessing
        self.network, self.trained_on = network, frozenset(trained_on)
        self.provenance = dict(provenance or {})
        _check_normalisation(self.mean, self.std, preprocessing.channels)
        self.head_name = find_head(module, features)
        self.pool_name = self._find_pool()
        self.class_names = tuple(class_names) if class_names is not None else tuple(map(str, range(self.classes)))
        if len(self.class_names) != self.classes:
            raise FaroutError(f"{len(self.class_names)} class names for a network of {self.classes} classes")

    def _find_pool(self) -> str | None:
        probe = torch.full((1, self.preprocessing.channels, *self.preprocessing.size), 0.5, device=self.device)
        try:
            return find_pool(self.module, self.head_name, self._normalised(probe))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise FaroutError(f"the network does not take images {tuple(probe.shape[1:])}: {reason}") from error

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def head(self) -> nn.Linear:
        """The last linear layer: logits = features W^T + b."""
        return self.module.get_submodule(self.head_name)

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
        """Whether `outputs(maps=True)` gives maps: the network pools by a layer, not by a function."""
        return self.pool_name is not None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Moves the network."""
        self.module.to(device)
        return self

    @cached_property
    def parameters(self) -> int:
        """Number of the network's parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def with_random_weights(self, seed: int = 0) -> Classifier:
        """The same network with fresh weights: a control that has learnt nothing.

        Raises FaroutError for a module that could not be built again.
        """
        if self.network is None:
            raise FaroutError("this classifier's module cannot be built again with fresh weights; pass network=...")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            fresh = self.network.build().to(self.device)
        known: dict[str, Any] = {"class_names": self.class_names, "network": self.network}
        about = {"random_weights": seed}
        return Classifier(fresh, self.mean, self.std, self.preprocessing, provenance=about, **known)

    # -- running it ----------------------------------------------------------------------------------------------

    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1], on the classifier's device; differentiable in the images
        and the weights. One call of the network, in the mode that it is in.
        """
        return self.module(self.normalise(images.to(self.device, torch.float32)))

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> the network's input (x - mean) / std; another size is resized.

        Raises FaroutError for other shapes.
        """
        channels, size = self.preprocessing.channels, tuple(self.preprocessing.size)
        if images.ndim != 4 or images.shape[1] != channels:
            raise FaroutError(f"this classifier takes images (B, {channels}, H, W), got {tuple(images.shape)}")
        if tuple(images.shape[-2:]) != size:
            images = functional.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
        return self._normalised(images)

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    @torch.no_grad()
    def outputs(
        self, images: Tensor, batch_size: BatchSize = "auto", precision: Precision = "fp32", maps: bool = False
    ) -> Outputs:
        """Logits, features and maps of images (B, C, H, W) in [0, 1], from one pass, on the classifier's device.

        Args:
            images: of any size; they are resized to the preprocessing's.
            batch_size: the most rows of one network call; `auto`: by memory.
            precision: of the network; what comes out is float32.
            maps: also give the maps.

        Raises FaroutError for images of other channels, and for maps of a network without a pooling layer.
        """
        if maps and not self.has_maps:
            raise FaroutError("this network has no layer that pools its feature maps, so they cannot be had")
        mode = self.module.training
        self.module.eval()
        shapes: list[torch.Size] = []
        places = {"features": self.head_name, **({"maps": str(self.pool_name)} if maps else {})}
        try:
            with watched(self.module, **places) as seen:

                def call(chunk: Tensor) -> Tensor:
                    with autocast(self.device, precision):
                        logits = self.module(chunk)
                    parts = [logits, *(seen[kind] for kind in places)]
                    shapes[:] = [part.shape[1:] for part in parts]
                    return torch.cat([part.float().flatten(1) for part in parts], dim=1)

                ready = self.normalise(images.to(self.device, torch.float32))
                together = call_in_chunks(self.module, call, ready, batch_size=batch_size)
        finally:
            self.module.train(mode)
        parts = together.split([shape.numel() for shape in shapes], dim=1)
        return Outputs(*[part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)])

    # -- identity ------------------------------------------------------------------------------------------------

    @property
    def content_hash(self) -> str:
        """SHA-256 of the weights and of everything that decides what they compute."""
        described = {
            "mean": self.mean,
            "std": self.std,
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": self.class_names,
            "head": self.head_name,
            "network": self.network.to_dict() if self.network is not None else type(self.module).__qualname__,
        }
        mark = json.dumps(described, sort_keys=True)
        return store.hash_tensors({**self.module.state_dict(), mark: torch.zeros(1)})

    # -- made from others' ---------------------------------------------------------------------------------------

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        size: int | tuple[int, int],
        channels: int = 3,
        features: str | None = None,
        class_names: Sequence[str] | None = None,
        network: str | NetworkSpec | None = None,
    ) -> Classifier:
        """Any torch network that turns normalised images into logits.

        Args:
            module: normalised images (B, C, H, W) -> logits (B, K); it is put into eval mode.
            mean: mean of each channel, for images in [0, 1].
            std: standard deviation of each channel.
            size: of the images that it takes, in pixels: a side, or (height, width).
            channels: 1 or 3.
            features: name of its last linear layer; None: the last one registered.
            class_names: name of each class; None: their numbers.
            network: name of the network that it is (see `NetworkSpec`): only with it can the classifier be saved.
                It is built anew with these weights and checked to give the same logits.

        Raises FaroutError where the network does not take such images, or is not the named one.
        """
        preprocessing = _preprocessing(size, channels)
        given = cls(module, mean, std, preprocessing, features=features, class_names=class_names)
        return given if network is None else given._named(network)

    def _named(self, network: str | NetworkSpec) -> Classifier:
        """The same classifier on a network that can be built again."""
        for spec in self._specs(network):
            built = spec.build()
            names = fit_names(self.module.state_dict(), built.state_dict(), find_head(built))
            if misfits(names, built.state_dict()):
                continue
            built.load_state_dict(names)
            known: dict[str, Any] = {"class_names": self.class_names, "network": spec}
            twin = Classifier(built.to(self.device), self.mean, self.std, self.preprocessing, **known)
            probe = torch.rand(2, self.preprocessing.channels, *self.preprocessing.size)
            if torch.allclose(twin.outputs(probe).logits, self.outputs(probe).logits, rtol=1e-3, atol=1e-4):
                return twin
        name = network if isinstance(network, str) else network.name
        raise FaroutError(f"this module is not the network {name}: its weights or its logits differ")

    def _specs(self, network: str | NetworkSpec) -> list[NetworkSpec]:
        if isinstance(network, NetworkSpec):
            return [network]
        stems = get_args(Stem) if network in RESNETS else (None,)
        known = (self.classes, self.preprocessing.channels, self.preprocessing.size)
        return [NetworkSpec(network, *known, stem) for stem in stems]

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
        """A named network with the weights of a file: `.safetensors`, or a state dict in `.pt`, `.pth` or `.ckpt`,
        read without unpickling objects. OpenOOD's checkpoints are `network="resnet18"`.

        Args:
            path: the file.
            network: see `NetworkSpec`.
            stem: see `NetworkSpec`.
            channels: see `NetworkSpec`.
            size: see `NetworkSpec`.
            mean: mean of each channel, for images in [0, 1], as in training.
            std: standard deviation of each channel, as in training.
            classes: number of classes; None: what the file's last layer has.
            class_names: name of each class; None: their numbers.

        Raises StoreError for a file that cannot be read or does not fit, naming what is missing or not expected.
        """
        tensors = read_weights(Path(path), HOW)
        preprocessing = _preprocessing(size, channels)
        draft = NetworkSpec(network, classes or 2, channels, preprocessing.size, stem).build()
        head = find_head(draft)
        found = fit_names(tensors, draft.state_dict(), head).get(f"{head}.weight")
        if found is None:
            raise StoreError(f"{path} has no last layer {head}; expected the weights of {network} with a head")
        spec = NetworkSpec(network, classes or len(found), channels, preprocessing.size, stem)
        module = spec.build()
        load_weights(module, tensors, str(path), network)
        about = {"weights": Path(path).name}
        return cls(module, mean, std, preprocessing, class_names=class_names, network=spec, provenance=about)

    # -- folders -------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes `config.json`, `model.safetensors`, `trained_on.txt` and a model card; nothing half-written is left.

        Raises FaroutError for a module that could not be built again.
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
        spec = NetworkSpec.from_dict(config["network"])
        module = spec.build()
        load_weights(module, store.load_tensors(path / "model.safetensors"), str(path), spec.name)
        classifier = cls(
            module,
            config["mean"],
            config["std"],
            Preprocessing.from_dict(config["preprocessing"]),
            class_names=config["class_names"],
            network=spec,
            trained_on=store.read_hashes(path / "trained_on.txt"),
            provenance=config["provenance"],
        )
        if classifier.content_hash != config["content_hash"]:
            raise StoreError(f"{path}: the weights are not those that were saved (their hash differs)")
        return classifier


def _preprocessing(size: int | tuple[int, int], channels: int) -> Preprocessing:
    sides = (size, size) if isinstance(size, int) else size
    return Preprocessing(size=sides, channels=channels, native=sides)


def _check_normalisation(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
        raise FaroutError(
            f"mean {list(mean)} and std {list(std)}: expected {channels} numbers each, those of std positive"
        )
