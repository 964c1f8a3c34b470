"""A diffusion model: network, schedule, preprocessing and, where there is one, autoencoder."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from farout.core import store
from farout.core.chunking import BatchSize, call_in_chunks
from farout.core.devices import Precision
from farout.core.errors import FaroutError, StoreError
from farout.data.preprocessing import Preprocessing
from farout.diffusion import diffusers_folders as folders
from farout.diffusion.conditioning.base import Conditioning
from farout.diffusion.conditioning.prompts import Prompts
from farout.diffusion.denoiser import ClampedDenoiser, Denoiser, NetworkDenoiser, Prediction, check_prediction
from farout.diffusion.schedule import NoiseSchedule

__all__ = ["KIND", "DiffusionModel"]

KIND = "diffusion model"
"""What `config.json` calls a folder of this class."""
_FILLING: dict[str, Any] = {"kernel": "bilinear", "fill": True}
"""How images are brought to the size of a text-conditional model, which has seen cut pictures and no squeezed ones."""


class DiffusionModel:
    """All that turns images in [0, 1] into the network's space, denoises there, and comes back.

    Args:
        network: a diffusers network (`UNet2DModel`, `UNet2DConditionModel`).
        schedule: the schedule that it was trained with.
        preprocessing: how images become the (C, H, W) tensors that `encode` takes.
        prediction: what the network predicts.
        data_range: the values that 0 and 1 of an image become; (0, 1) in the reconstruction paper.
        b_scale: factor on the data before noising; it raises the signal-to-noise ratio by b^2.
        autoencoder: diffusers' `AutoencoderKL` or `VQModel`; None: the network works on pixels.
        conditioning: how the network is told classes; None: it is unconditional.
        trained_on: content hashes of the images that the weights have seen.
        provenance: command, seed, data fingerprint and the like, kept in `config.json`.

    Raises FaroutError for an unknown prediction.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        preprocessing: Preprocessing,
        *,
        prediction: Prediction = "epsilon",
        data_range: tuple[float, float] = (-1.0, 1.0),
        b_scale: float = 1.0,
        autoencoder: nn.Module | None = None,
        conditioning: Conditioning | None = None,
        trained_on: Collection[str] = (),
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.network, self.schedule, self.preprocessing = network.eval(), schedule, preprocessing
        self.prediction, self.data_range, self.b_scale = check_prediction(prediction), data_range, b_scale
        self.autoencoder = None if autoencoder is None else autoencoder.eval().requires_grad_(False)
        self.conditioning = conditioning
        self.trained_on = frozenset(trained_on)
        self.provenance = dict(provenance or {})

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Moves network, autoencoder and conditioning."""
        self.network.to(device)
        if self.conditioning is not None:
            self.conditioning.to(device)
        if self.autoencoder is not None:
            self.autoencoder.to(device)
        return self

    def denoiser(self, batch_size: BatchSize = "auto", precision: Precision = "fp32") -> NetworkDenoiser:
        """The network behind the `Denoiser` contract, in network calls of at most `batch_size` rows.

        A class-conditional network that is given no condition gets the null condition, and so answers
        unconditionally; it raises FaroutError where it has none.
        """
        # kernels follow the weights' layout; one layout, whether trained just now or loaded, gives one result
        self.network.to(memory_format=torch.channels_last)
        null = None if self.conditioning is None else self.conditioning.null_condition
        return NetworkDenoiser(self.network, self.schedule, self.prediction, batch_size, precision, null)

    def clamp_x0(self, denoiser: Denoiser) -> Denoiser:
        """A denoiser of this model whose answers are clamped to what images can be; as it is for latents, which have no
        such range.

        Without it a network's small error at high noise levels, multiplied by sigma, leaves samples saturated (Ho et
        al. 2020 clip x0 alike).
        """
        return denoiser if self.x0_range is None else ClampedDenoiser(denoiser, *self.x0_range)

    @property
    def x0_range(self) -> tuple[float, float] | None:
        """The smallest and largest value of images in the network's space; None for latents."""
        low, high = self.data_range
        return None if self.autoencoder is not None else (self.b_scale * low, self.b_scale * high)

    # -- between images and the network's space ------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> x0 in the network's space, float32.

        Images of another size are resized; sizes that the network cannot halve are padded by repeating the edge. With
        an autoencoder the mode of its posterior is taken, or the sample that `noise` (of the latents' shape) gives.
        """
        images = self._fit(images.to(self.device, torch.float32))
        low, high = self.data_range
        x = low + (high - low) * images
        if self.autoencoder is not None:
            factor = _downsampling(self.autoencoder)
            below, right = -x.shape[-2] % factor, -x.shape[-1] % factor
            x = _latents(self.autoencoder, functional.pad(x, (0, right, 0, below), mode="replicate"), noise)
        return self.b_scale * functional.pad(x, self._padding(x.shape[-2], x.shape[-1]), mode="replicate")

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """x0 in the network's space -> images (B, C, H, W) of the preprocessing's size, clamped to [0, 1]."""
        x = x / self.b_scale
        height, width = self._inner_size()
        left, _, top, _ = self._padding(height, width)
        x = x[..., top : top + height, left : left + width]
        if self.autoencoder is not None:
            height, width = self.preprocessing.size
            x = _pixels(self.autoencoder, x)[..., :height, :width]
        low, high = self.data_range
        return ((x - low) / (high - low)).clamp(0, 1)

    def _fit(self, images: Tensor) -> Tensor:
        channels, size = self.preprocessing.channels, self.preprocessing.size
        if images.ndim != 4 or images.shape[1] != channels:
            raise FaroutError(f"this model takes images (B, {channels}, H, W), got {tuple(images.shape)}")
        if tuple(images.shape[-2:]) == tuple(size):
            return images
        resized = functional.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return resized.clamp(0, 1)

    def _inner_size(self) -> tuple[int, int]:
        """Height and width of the data that the network works on, before padding."""
        factor = 1 if self.autoencoder is None else _downsampling(self.autoencoder)
        height, width = self.preprocessing.size
        return -(-height // factor), -(-width // factor)

    def _padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) that makes both sides multiples of what the network halves."""
        factor = self._halvings()
        x, y = -width % factor, -height % factor
        return x // 2, x - x // 2, y // 2, y - y // 2

    def _halvings(self) -> int:
        """How many times smaller the network's innermost maps are than what it works on."""
        return int(2 ** (len(self.network.config["block_out_channels"]) - 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of x0 in the network's space."""
        height, width = self._inner_size()
        left, right, top, bottom = self._padding(height, width)
        return (int(self.network.config["in_channels"]), height + top + bottom, width + left + right)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the noise that `encode` takes: of the autoencoder's latents, before they are padded."""
        return (self.shape[0], *self._inner_size())

    # -- identity ------------------------------------------------------------------------------------------------

    @property
    def content_hash(self) -> str:
        """SHA-256 of the weights and of everything that decides what they compute."""
        weights = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        if self.autoencoder is not None:
            weights |= {f"autoencoder.{name}": value for name, value in self.autoencoder.state_dict().items()}
        if self.conditioning is not None:
            weights |= {f"conditioning.{name}": value for name, value in self.conditioning.tensors().items()}
        numbers = [*self.schedule.sigma.tolist(), *self.data_range, self.b_scale]
        weights["numbers"] = torch.tensor(numbers, dtype=torch.float64)
        described: dict[str, Any] = {
            "prediction": self.prediction,
            "preprocessing": self.preprocessing.to_dict(),
            "network": _plain(self.network.config),
            "autoencoder": None if self.autoencoder is None else _plain(self.autoencoder.config),
        }
        if self.conditioning is not None:  # unconditional models keep the identity that they had without this entry
            described["conditioning"] = self.conditioning.describe()
        weights[json.dumps(described, sort_keys=True)] = torch.zeros(1)
        return store.hash_tensors(weights)

    @cached_property
    def gmacs(self) -> float:
        """Billions of multiply-accumulates of one network evaluation of one row."""
        twin = copy.deepcopy(self.network).cpu().float()
        told = {} if self.conditioning is None else self.conditioning(torch.zeros(1, dtype=torch.int64)).tensors
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin(torch.zeros(1, *self.shape), torch.zeros(1), **{name: value.cpu() for name, value in told.items()})
        return counter.get_total_flops() / 2e9

    @property
    def parameters(self) -> int:
        """Number of the network's parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def with_conditioning(self, conditioning: Conditioning | None) -> DiffusionModel:
        """The same networks, not copied, told their classes by another conditioning."""
        twin = self._twin()
        twin.conditioning = conditioning
        return twin

    def _twin(self) -> DiffusionModel:
        """A model that shares everything with this one, but for what follows from its parts."""
        twin = copy.copy(self)
        twin.__dict__.pop("gmacs", None)
        return twin

    def with_image_size(self, side: int) -> DiffusionModel:
        """The same networks, not copied, for square images of another size, which they have not been trained on: what
        they make of it is theirs.

        Args:
            side: in pixels: a multiple of what the autoencoder shrinks by, without one of what the network halves to,
                or the model's own.

        Raises FaroutError for another side.
        """
        factor = self._halvings() if self.autoencoder is None else _downsampling(self.autoencoder)
        own = tuple(self.preprocessing.size)
        if (side, side) != own and (side < factor or side % factor):
            shrinks = "this network" if self.autoencoder is None else "this model's autoencoder"
            raise FaroutError(
                f"{shrinks} shrinks images {factor} times, so that a side in pixels is a multiple of {factor}, or its "
                f"own {own[0]} x {own[1]}; got {side}"
            )
        twin = self._twin()
        twin.preprocessing = replace(self.preprocessing, size=(side, side))
        return twin

    def with_random_weights(self, seed: int = 0) -> DiffusionModel:
        """The same model with random weights: a control that has learnt nothing.

        Every weight tensor is drawn anew with its own mean and standard deviation: a network left as built would
        answer zero, because its last layer starts at zero.
        """
        generator = torch.Generator().manual_seed(seed)
        twin = self._twin()
        twin.network = copy.deepcopy(self.network)
        twin.conditioning = None if self.conditioning is None else self.conditioning.copy_for(twin.network)
        twin.trained_on, twin.provenance = frozenset(), {"random_weights": seed}
        beside = [] if twin.conditioning is None else twin.conditioning.parameters()
        with torch.no_grad():
            for parameter in (*twin.network.parameters(), *beside):
                drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                spread = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
                parameter.copy_(parameter.mean() + spread * drawn)
        return twin

    # -- folders -------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes a folder in diffusers' layout with our `config.json` beside it; nothing half-written is left."""
        with store.atomic_folder(folder, KIND) as temporary:
            self._write(temporary)

    def _write(self, folder: Path) -> None:
        folders.write_network(folder, self.network, self.schedule, self.prediction, self.autoencoder)
        folders.write_conditioning(folder, self.conditioning)
        content = {
            "prediction": self.prediction,
            "data_range": list(self.data_range),
            "b_scale": self.b_scale,
            "schedule": self.schedule.to_dict(),
            "preprocessing": self.preprocessing.to_dict(),
            "conditioning": None if self.conditioning is None else self.conditioning.describe(),
            "content_hash": self.content_hash,
            "provenance": self.provenance,
        }
        store.write_config(folder, KIND, content)
        store.write_hashes(folder / "trained_on.txt", self.trained_on)
        (folder / "README.md").write_text(folders.model_card(self.parameters, content), encoding="utf-8")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        class_names: Sequence[str] | None = None,
        prompts: Prompts | None = None,
        conditioning: Conditioning | None = None,
    ) -> DiffusionModel:
        """Loads a folder that farout wrote, a diffusers folder, or `hf://owner/name`.

        A Stable Diffusion folder (unet, vae, text_encoder, tokenizer, scheduler) wants `class_names`, of which prompts
        are made; its null condition is the empty prompt. Without `prompts` these are "An image of a …", and class
        vectors are their contexts. What `save` then writes is loaded without names. For a class-conditional
        `UNet2DModel` of diffusers `class_names` name the rows of its table, of which the last may be a null row where
        there is one more than names. A `conditioning` that is ready takes the place of both.

        Raises FaroutError where names or prompts do not go with the folder, StoreError for a folder that is missing,
        incomplete, altered or of another kind. Code from a folder or hub is never run, and weights are read without
        unpickling objects.
        """
        path = folders.local_folder(folder)
        if not folders.is_farout_folder(path):
            return cls._foreign(path, class_names, prompts, conditioning)
        if class_names is not None or prompts is not None or conditioning is not None:
            raise FaroutError(f"{path} was written by farout and names its own classes; leave class_names out")
        config = store.read_config(path, KIND)
        network, autoencoder = folders.read_networks(path)
        conditioning = folders.read_conditioning(path, network, config.get("conditioning"))
        model = cls(
            network,
            NoiseSchedule.from_dict(config["schedule"]),
            Preprocessing.from_dict(config["preprocessing"]),
            prediction=config["prediction"],
            data_range=tuple(config["data_range"]),
            b_scale=config["b_scale"],
            autoencoder=autoencoder,
            conditioning=conditioning,
            trained_on=store.read_hashes(path / "trained_on.txt"),
            provenance=config["provenance"],
        )
        if model.content_hash != config["content_hash"]:
            raise StoreError(f"{path}: the weights are not those that were saved (their hash differs)")
        return model

    @classmethod
    def _foreign(
        cls, path: Path, class_names: Sequence[str] | None, prompts: Prompts | None, conditioning: Conditioning | None
    ) -> DiffusionModel:
        if conditioning is not None and (class_names is not None or prompts is not None):
            raise FaroutError("a conditioning has its own class names and prompts; leave class_names and prompts out")
        told = conditioning or folders.text_conditioning(path, class_names, prompts)  # first: it may refuse the names
        network, autoencoder = folders.read_networks(path)
        scheduler = folders.read_scheduler(path)
        factor = 1 if autoencoder is None else _downsampling(autoencoder)
        height, width = folders.sample_size(path, network)
        size = (height * factor, width * factor)
        channels = int((network if autoencoder is None else autoencoder).config["in_channels"])
        return cls(
            network,
            NoiseSchedule.from_diffusers_config(scheduler),
            Preprocessing(size=size, channels=channels, native=size, **({} if told is None else _FILLING)),
            prediction=scheduler.get("prediction_type", "epsilon"),
            autoencoder=autoencoder,
            conditioning=told or folders.class_table_conditioning(path, network, class_names),
            provenance={"loaded_from": str(path)},
        )


def _latents(autoencoder: nn.Module, x: Tensor, noise: Tensor | None) -> Tensor:
    scale = float(getattr(autoencoder.config, "scaling_factor", 1.0))

    def call(x: Tensor, *noise: Tensor) -> Tensor:
        encoded: Any = autoencoder.encode(x)
        if hasattr(encoded, "latents"):
            return encoded.latents * scale
        posterior = encoded.latent_dist
        return (posterior.mean + posterior.std * noise[0] if noise else posterior.mode()) * scale

    given = [x] if noise is None else [x, noise.to(x.device)]
    return call_in_chunks(autoencoder, call, *given)


def _pixels(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    scale = float(getattr(autoencoder.config, "scaling_factor", 1.0))
    return call_in_chunks(autoencoder, lambda some: autoencoder.decode(some / scale).sample, latents)


def _plain(config: Any) -> dict[str, Any]:
    """A network's configuration without what says where and by which version it was written."""
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


def _downsampling(autoencoder: nn.Module) -> int:
    return 2 ** (len(autoencoder.config["block_out_channels"]) - 1)
