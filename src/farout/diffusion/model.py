"""A diffusion model: network, schedule, preprocessing, and optionally an autoencoder and a conditioning."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from farout.core import store
from farout.core.backends import Backend
from farout.core.chunking import BatchSize, call_in_chunks
from farout.core.devices import Precision
from farout.core.errors import FaroutError, StoreError
from farout.core.schema import Schema, check_content, create_dataclass
from farout.data.preprocessing import Preprocessing
from farout.diffusion import diffusers_folders as folders
from farout.diffusion.conditioning.base import Conditioning
from farout.diffusion.conditioning.prompts import Prompts
from farout.diffusion.denoiser import ClampedDenoiser, Denoiser, NetworkDenoiser, Prediction, check_prediction
from farout.diffusion.group_norms import speed_up_group_norms
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.unets import network_config

__all__ = ["KIND", "DiffusionModel", "WeightFormat"]

KIND = "diffusion model"
"""What `config.json` calls a folder of this class."""
_TEXT_MODEL_RESIZING: dict[str, Any] = {"kernel": "bilinear", "fill": True}
"""Preprocessing of text-conditional models, which are trained on cropped images that keep their aspect ratio."""


WeightFormat = Literal["fp32", "fp16"]
"""How `save` stores the weights of the network; they are computed with in fp32 or as `precision` says."""


class _Content(Schema):
    """`config.json` of a diffusion model; schedule and preprocessing are checked by what they are passed to."""

    prediction: Prediction
    data_range: Annotated[list[float], Field(min_length=2, max_length=2)]
    b_scale: Annotated[float, Field(gt=0)]
    schedule: dict[str, Any]
    preprocessing: dict[str, Any]
    conditioning: dict[str, Any] | None
    content_hash: str
    provenance: dict[str, Any]
    # folders of earlier versions do not have these
    patch: Annotated[int, Field(ge=1)] = 1
    weights: WeightFormat = "fp32"


class DiffusionModel:
    """Encodes images in [0, 1] to the network's space, denoises them there, and decodes them.

    Args:
        network: a diffusers network (`UNet2DModel`, `UNet2DConditionModel`).
        schedule: the schedule of its training.
        preprocessing: how images become the (C, H, W) tensors that `encode` takes.
        prediction: what the network predicts.
        data_range: values to which 0 and 1 of an image are mapped; (0, 1) in the reconstruction paper.
        b_scale: factor on the data before noising, which multiplies the signal-to-noise ratio by b^2.
        patch: side of the square patches of pixels (or latents) that become channels of one position of the network's
            space (space to depth); 1: none. It is a permutation, so that noise and errors stay what they are.
        autoencoder: diffusers' `AutoencoderKL` or `VQModel`; None: the network works on pixels.
        conditioning: the classes of the network; None: it is unconditional.
        trained_on: content hashes of the training images.
        provenance: command, seed, data fingerprint and similar, stored in `config.json`.

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
        patch: int = 1,
        autoencoder: nn.Module | None = None,
        conditioning: Conditioning | None = None,
        trained_on: Collection[str] = (),
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.network, self.schedule, self.preprocessing = network.eval(), schedule, preprocessing
        speed_up_group_norms(self.network)
        self.prediction, self.data_range, self.b_scale = check_prediction(prediction), data_range, b_scale
        self.patch = patch
        self.weight_format: WeightFormat = "fp32"
        self.autoencoder = None if autoencoder is None else autoencoder.eval().requires_grad_(False)
        self.conditioning = conditioning
        self.trained_on = frozenset(trained_on)
        self.provenance = dict(provenance or {})

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Moves network, autoencoder and conditioning."""
        self.network.to(device)
        if self.conditioning is not None:
            self.conditioning.to(device)
        if self.autoencoder is not None:
            self.autoencoder.to(device)
        return self

    def denoiser(
        self, batch_size: BatchSize = "auto", precision: Precision = "fp32", backend: Backend = "eager"
    ) -> NetworkDenoiser:
        """The network as a `Denoiser`, called with at most `batch_size` rows.

        A class-conditional network is given the null condition for rows without a condition; it raises FaroutError if
        it has none.
        """
        # kernels depend on the layout of the weights; one layout gives one result, after training and after loading
        self.network.to(memory_format=torch.channels_last)
        null = None if self.conditioning is None else self.conditioning.null_condition
        return NetworkDenoiser(self.network, self.schedule, self.prediction, batch_size, precision, null, backend)

    def clamp_x0(self, denoiser: Denoiser) -> Denoiser:
        """A denoiser of this model whose x0 is clamped to the range of images; for latents the denoiser unchanged.

        Without clamping, a small error of the network at high noise levels is multiplied by sigma, and samples become
        saturated (Ho et al. 2020 clip x0 too).
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
        """Encodes images (B, C, H, W) in [0, 1] to x0 in the network's space, float32.

        Images of another size are resized; sizes that the network cannot halve are padded by repeating the edge. An
        autoencoder's latents are the mode of its posterior, or with `noise` (of the latents' shape) a sample of it.
        """
        images = self._resize(images.to(self.device, torch.float32))
        low, high = self.data_range
        x = low + (high - low) * images
        if self.autoencoder is not None:
            factor = _autoencoder_factor(self.autoencoder)
            below, right = -x.shape[-2] % factor, -x.shape[-1] % factor
            x = _encode_latents(self.autoencoder, functional.pad(x, (0, right, 0, below), mode="replicate"), noise)
        padded = functional.pad(x, self._padding(x.shape[-2], x.shape[-1]), mode="replicate")
        return self.b_scale * functional.pixel_unshuffle(padded, self.patch)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Decodes x0 in the network's space to images (B, C, H, W) of the preprocessing's size, clamped to [0, 1]."""
        x = functional.pixel_shuffle(x / self.b_scale, self.patch)
        height, width = self._inner_size()
        left, _, top, _ = self._padding(height, width)
        x = x[..., top : top + height, left : left + width]
        if self.autoencoder is not None:
            height, width = self.preprocessing.size
            x = _decode_latents(self.autoencoder, x)[..., :height, :width]
        low, high = self.data_range
        return ((x - low) / (high - low)).clamp(0, 1)

    def _resize(self, images: Tensor) -> Tensor:
        channels, size = self.preprocessing.channels, self.preprocessing.size
        if images.ndim != 4 or images.shape[1] != channels:
            raise FaroutError(f"this model takes images (B, {channels}, H, W), got {tuple(images.shape)}")
        if tuple(images.shape[-2:]) == tuple(size):
            return images
        resized = functional.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return resized.clamp(0, 1)

    def _inner_size(self) -> tuple[int, int]:
        """Height and width of pixels or latents, before padding."""
        factor = 1 if self.autoencoder is None else _autoencoder_factor(self.autoencoder)
        height, width = self.preprocessing.size
        return -(-height // factor), -(-width // factor)

    def _padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) after which both sides are multiples of the network's downsampling factor."""
        factor = self._network_factor()
        x, y = -width % factor, -height % factor
        return x // 2, x - x // 2, y // 2, y - y // 2

    def _network_factor(self) -> int:
        """Downsampling factor of the network's innermost feature maps, patches included."""
        return int(self.patch * 2 ** (len(network_config(self.network)["block_out_channels"]) - 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of x0 in the network's space."""
        height, width = self._inner_size()
        left, right, top, bottom = self._padding(height, width)
        channels = int(network_config(self.network)["in_channels"])
        return (channels, (height + top + bottom) // self.patch, (width + left + right) // self.patch)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the noise of `encode`: of the autoencoder's latents, before padding."""
        return (self.shape[0] // self.patch**2, *self._inner_size())

    # -- identity ------------------------------------------------------------------------------------------------

    @property
    def content_hash(self) -> str:
        """SHA-256 of the weights and of all settings that decide what they compute."""
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
            "network": _public_config(network_config(self.network)),
            "autoencoder": None if self.autoencoder is None else _public_config(network_config(self.autoencoder)),
        }
        if self.conditioning is not None:  # keeps the hash of unconditional models
            described["conditioning"] = self.conditioning.describe()
        if self.patch != 1:  # keeps the hash of models of earlier versions
            described["patch"] = self.patch
        weights[json.dumps(described, sort_keys=True)] = torch.zeros(1)
        return store.hash_tensors(weights)

    @cached_property
    def gmacs(self) -> float:
        """Billions of multiply-accumulates of one network evaluation of one row."""
        network = copy.deepcopy(self.network).cpu().float()
        condition = {} if self.conditioning is None else self.conditioning(torch.zeros(1, dtype=torch.int64)).tensors
        from torch.utils.flop_counter import FlopCounterMode  # imports triton

        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, *self.shape), torch.zeros(1), **{n: value.cpu() for n, value in condition.items()})
        return counter.get_total_flops() / 2e9

    @property
    def parameters(self) -> int:
        """Number of the network's parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def with_conditioning(self, conditioning: Conditioning | None) -> DiffusionModel:
        """The same networks, not copied, with another conditioning."""
        model = self._copy()
        model.conditioning = conditioning
        return model

    def _copy(self) -> DiffusionModel:
        """A shallow copy without cached properties."""
        model = copy.copy(self)
        model.__dict__.pop("gmacs", None)
        return model

    def with_image_size(self, side: int) -> DiffusionModel:
        """The same networks, not copied, for square images of another size than that of the training images.

        Args:
            side: in pixels: a multiple of the downsampling factor of the autoencoder (or, without one, of the network),
                or the model's own size.

        Raises FaroutError for another side.
        """
        factor = self._network_factor() if self.autoencoder is None else _autoencoder_factor(self.autoencoder)
        own = tuple(self.preprocessing.size)
        if (side, side) != own and (side < factor or side % factor):
            part = "this network" if self.autoencoder is None else "this model's autoencoder"
            raise FaroutError(
                f"{part} downsamples images by {factor}, so the side in pixels must be a multiple of {factor}, or its "
                f"own {own[0]} x {own[1]}; got {side}"
            )
        model = self._copy()
        model.preprocessing = replace(self.preprocessing, size=(side, side))
        return model

    def with_random_weights(self, seed: int = 0) -> DiffusionModel:
        """The same model with random weights, as an untrained baseline.

        Every weight tensor is sampled with its own mean and standard deviation: a newly built network would predict
        zero, because its last layer starts at zero.
        """
        generator = torch.Generator().manual_seed(seed)
        model = self._copy()
        model.network = copy.deepcopy(self.network)
        model.conditioning = None if self.conditioning is None else self.conditioning.copy_for(model.network)
        model.trained_on, model.provenance = frozenset(), {"random_weights": seed}
        extra = [] if model.conditioning is None else model.conditioning.parameters()
        with torch.no_grad():
            for parameter in (*model.network.parameters(), *extra):
                drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                std = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
                parameter.copy_(parameter.mean() + std * drawn)
        return model

    # -- folders -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def round_weights(self) -> None:
        """Rounds the network's weights to fp16, as which `save` then stores them, in half the space."""
        for parameter in self.network.parameters():
            parameter.copy_(parameter.half().float())
        self.weight_format = "fp16"

    def save(self, folder: str | Path) -> None:
        """Writes a folder in diffusers' layout with farout's `config.json`, complete or not at all."""
        with store.atomic_folder(folder, KIND) as temporary:
            self._write_files(temporary)

    def _write_files(self, folder: Path) -> None:
        network = self.network if self.weight_format == "fp32" else copy.deepcopy(self.network).half()
        folders.write_network(folder, network, self.schedule, self.prediction, self.autoencoder)
        folders.write_conditioning(folder, self.conditioning)
        content = {
            "prediction": self.prediction,
            "data_range": list(self.data_range),
            "b_scale": self.b_scale,
            "patch": self.patch,
            "weights": self.weight_format,
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

        Code from a folder or hub is never run, and weights are read without unpickling objects.

        Args:
            folder: the folder.
            class_names: names of the classes. A Stable Diffusion folder (unet, vae, text_encoder, tokenizer, scheduler)
                requires them for its prompts; a folder that `save` then writes contains them. For a class-conditional
                `UNet2DModel` of diffusers they name the rows of its table; the last row may be a null row.
            prompts: prompts of a Stable Diffusion folder; default: "An image of a ...", with contexts as class vectors.
                The null condition is the empty prompt.
            conditioning: a ready conditioning, instead of class names and prompts.

        Raises FaroutError for class names or prompts that do not match the folder, StoreError for a folder that is
        missing, incomplete, altered or of another kind.
        """
        path = folders.local_folder(folder)
        if not folders.is_farout_folder(path):
            return cls._load_diffusers(path, class_names, prompts, conditioning)
        if class_names is not None or prompts is not None or conditioning is not None:
            raise FaroutError(f"{path} was written by farout and names its own classes; leave class_names out")
        config = store.read_config(path, KIND)
        where = str(path / "config.json")
        check_content(config, _Content, where)
        schedule = create_dataclass(NoiseSchedule, config["schedule"], f"{where}: schedule")
        preprocessing = create_dataclass(Preprocessing, config["preprocessing"], f"{where}: preprocessing")
        store.check_hashes(path)
        with store.explain_load_errors(path):
            network, autoencoder = folders.read_networks(path)
            conditioning = folders.read_conditioning(path, network, config["conditioning"])
            model = cls(
                network,
                schedule,
                preprocessing,
                prediction=config["prediction"],
                data_range=tuple(config["data_range"]),
                b_scale=config["b_scale"],
                patch=config.get("patch", 1),
                autoencoder=autoencoder,
                conditioning=conditioning,
                trained_on=store.read_hashes(path / "trained_on.txt"),
                provenance=config["provenance"],
            )
        model.weight_format = config.get("weights", "fp32")
        if model.content_hash != config["content_hash"]:
            raise StoreError(f"{path}: the weights are not those that were saved (their hash differs)")
        return model

    @classmethod
    def _load_diffusers(
        cls, path: Path, class_names: Sequence[str] | None, prompts: Prompts | None, conditioning: Conditioning | None
    ) -> DiffusionModel:
        if conditioning is not None and (class_names is not None or prompts is not None):
            raise FaroutError("a conditioning has its own class names and prompts; leave class_names and prompts out")
        # first, because it may raise for the names
        text_conditioning = conditioning or folders.text_conditioning(path, class_names, prompts)
        network, autoencoder = folders.read_networks(path)
        table = text_conditioning or folders.class_table_conditioning(path, network, class_names)
        scheduler = folders.read_scheduler(path)
        factor = 1 if autoencoder is None else _autoencoder_factor(autoencoder)
        height, width = folders.read_sample_size(path, network)
        size = (height * factor, width * factor)
        channels = int(network_config(network if autoencoder is None else autoencoder)["in_channels"])
        resizing = {} if text_conditioning is None else _TEXT_MODEL_RESIZING
        with store.explain_load_errors(path):
            return cls(
                network,
                NoiseSchedule.from_diffusers_config(scheduler),
                Preprocessing(size=size, channels=channels, native=size, **resizing),
                prediction=scheduler.get("prediction_type", "epsilon"),
                autoencoder=autoencoder,
                conditioning=table,
                provenance={"loaded_from": str(path)},
            )


def _encode_latents(autoencoder: Any, x: Tensor, noise: Tensor | None) -> Tensor:
    scale = float(getattr(network_config(autoencoder), "scaling_factor", 1.0))

    def call(x: Tensor, *noise: Tensor) -> Tensor:
        encoded: Any = autoencoder.encode(x)
        if hasattr(encoded, "latents"):
            return encoded.latents * scale
        posterior = encoded.latent_dist
        return (posterior.mean + posterior.std * noise[0] if noise else posterior.mode()) * scale

    given = [x] if noise is None else [x, noise.to(x.device)]
    return call_in_chunks(autoencoder, call, *given)


def _decode_latents(autoencoder: Any, latents: Tensor) -> Tensor:
    scale = float(getattr(network_config(autoencoder), "scaling_factor", 1.0))
    return call_in_chunks(autoencoder, lambda chunk: autoencoder.decode(chunk / scale).sample, latents)


def _public_config(config: Any) -> dict[str, Any]:
    """A network's configuration without the entries on the version and path of the file."""
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


def _autoencoder_factor(autoencoder: nn.Module) -> int:
    return 2 ** (len(network_config(autoencoder)["block_out_channels"]) - 1)
