"""Images as vectors of a generator's class space, by a short inversion of many images at once.

For each image x0 of class y, the vector e starts at the class vector e_y and takes a few steps of Adam on

    L(e) = mean over K draws of (t, noise) of |network(x_t, t, e) - target|^2 / dim(x0) + R |e - e_y|^2,

with the network's native prediction and its training target, without guidance (Doorenbos, Sznitman and
Marquez-Neila, "Non-linear outlier synthesis for out-of-distribution detection", arXiv 2411.13619, section 3; textual
inversion, Gal et al. 2023, for one image). The weights of the network are frozen. The loss of a batch is the SUM over
its images, and Adam treats every coordinate independently: each image is inverted as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from farout.core import store
from farout.core.chunking import blocks_containing
from farout.core.devices import Precision
from farout.core.errors import FaroutError, StoreError
from farout.core.names import expand_path
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import iterate_batches
from farout.data.image_source import ImageSource
from farout.diffusion.conditioning.base import Conditioning, check_labels
from farout.diffusion.denoiser import NetworkDenoiser, expand_dims
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import NoiseKind, seeded_generator
from farout.diffusion.noise_levels import leading_levels
from farout.diffusion.schedule import NoiseSchedule
from farout.synthesis.base import describe_inputs
from farout.synthesis.class_space import class_conditioning, class_table_std

__all__ = ["KIND", "Embeddings", "InversionConfig", "Inverter", "embed_images", "read_embeddings"]

KIND = "embeddings"
"""The kind of a folder of embeddings in `config.json`."""

_MAX_GRADIENT_ROWS = 32
"""Default number of network rows of one call: the gradient keeps all activations of a call."""


@dataclass(frozen=True)
class InversionConfig:
    """Inversion of images into class vectors. Raises FaroutError for values out of range.

    Args:
        steps: number of Adam steps per image; published: 3 with 32 draws, not stratified. 10 with 8 stratified draws
            reach a lower loss in less time.
        lr_scale: learning rate, relative to the standard deviation of the class embeddings; for small models, values
            above 0.05 increase the loss.
        lr: absolute learning rate, instead of `lr_scale`; published: 0.01; default: use `lr_scale`.
        draws: samples of (t, noise) per image and step; published: 32.
        levels: number of evenly spaced noise levels t to sample from.
        stratified: sample t from equal parts of the levels, one per draw; off: all from the whole range.
        pull: weight of the squared distance to the class's vector; used in the paper, 0 in its code.
        noise: `image`: noise per image; `shared`: the same noise for all images.
    """

    steps: int = 10
    lr_scale: float = 0.05
    lr: float | None = None
    draws: int = 8
    levels: int = 50
    stratified: bool = True
    pull: float = 0.0
    noise: NoiseKind = "image"

    def __post_init__(self) -> None:
        if min(self.steps, self.draws, self.levels) < 1:
            raise FaroutError(
                f"steps, draws and levels must be 1 or more, got {self.steps}, {self.draws}, {self.levels}"
            )
        if min(self.lr_scale, self.lr if self.lr is not None else 1.0) <= 0 or self.pull < 0:
            raise FaroutError(
                "learning rates must be above 0 and pull at least 0, got "
                f"lr_scale {self.lr_scale}, lr {self.lr} and pull {self.pull}"
            )
        if self.lr is not None and self.lr_scale != InversionConfig.lr_scale:
            raise FaroutError(
                f"lr={self.lr} is the rate itself, so that lr_scale={self.lr_scale} would have no effect; leave one out"
            )
        if self.noise not in ("image", "shared"):
            raise FaroutError(f"noise is 'shared' or drawn per 'image', got {self.noise!r}")

    def learning_rate(self, conditioning: Conditioning) -> float:
        """The absolute learning rate of Adam."""
        return self.lr if self.lr is not None else self.lr_scale * class_table_std(conditioning)

    def timesteps(self, schedule: NoiseSchedule) -> Tensor:
        """The levels t to sample from, int64: T u / levels + 1 for u = 0, 1, …; 1, 21, …, 981 for T = 1000.

        Raises FaroutError for more levels than the schedule has.
        """
        return torch.tensor(leading_levels(schedule, self.levels))

    def sample_noise(self, key: str, shape: Sequence[int], step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Indices into `timesteps` (K,) and noise (K, *shape) of one image in one step.

        They depend on (seed, key, step) only.
        """
        generator = seeded_generator(seed, "inversion", self.noise, key if self.noise == "image" else "", step)
        u = torch.rand(self.draws, generator=generator)
        if self.stratified:
            u = (torch.arange(self.draws) + u) / self.draws
        indices = (u * self.levels).long().clamp(max=self.levels - 1)
        return indices, torch.randn(self.draws, *shape, generator=generator)


class Inverter:
    """Inverts images of one model; see the module for the loss.

    Args:
        model: a class-conditional diffusion model; images are inverted on its device.
        config: settings of the inversion.
        seed: seed of the noise.
        runtime: batch size and precision, resolved.

    Raises:
        FaroutError: for an unconditional model.
    """

    def __init__(self, model: DiffusionModel, config: InversionConfig, seed: int, runtime: Runtime) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.conditioning = class_conditioning(model)
        # the runtime is resolved, so its precision is not `auto`
        self.denoiser: NetworkDenoiser = model.denoiser(precision=cast("Precision", runtime.precision))
        self.max_rows = _MAX_GRADIENT_ROWS if runtime.batch_size == "auto" else runtime.batch_size
        self.sigmas = model.schedule.sigma_of(config.timesteps(model.schedule)).float()

    def __call__(self, x0: Tensor, labels: Tensor, identities: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Vectors (B, D) and the loss before each step (B, steps), float32, on the CPU.

        Args:
            x0: the encoded images (B, …).
            labels: their classes (B,).
            identities: see `Batch.identities`; they seed the noise.
        """
        labels = check_labels(labels, self.conditioning.num_classes).cpu()
        class_vectors = self.conditioning.class_vectors().cpu()[labels].to(x0.device)
        vectors = class_vectors.clone()
        optimizer = torch.optim.Adam([vectors], lr=self.config.learning_rate(self.conditioning))
        losses = []
        with _frozen_weights(self.model.network):
            for step in range(self.config.steps):
                loss, vectors.grad = self.loss_and_gradient(x0, vectors, class_vectors, identities, step, labels)
                losses.append(loss)
                optimizer.step()
        return vectors.cpu(), torch.stack(losses, dim=1).cpu()

    def loss_and_gradient(
        self,
        x0: Tensor,
        vectors: Tensor,
        class_vectors: Tensor,
        identities: Sequence[str],
        step: int,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss (B,) of each image and its gradient (B, D), with the noise of `step`.

        One network call holds all draws of as many images as fit into its rows, or a part of the draws of one image.
        Its graph is released before the next call, so that memory does not grow with the batch or the draws.

        Args:
            x0: the encoded images (B, …).
            vectors: e, (B, D).
            class_vectors: e_y, (B, D).
            identities: see `Batch.identities`; they seed the noise.
            step: number of the step, which determines the noise.
            labels: the classes (B,), for models whose class vector is one token in the prompt of its class.
        """
        images_per_call = max(1, self.max_rows // self.config.draws)
        losses, gradients = [], []
        for first in range(0, len(x0), images_per_call):
            rows = slice(first, first + images_per_call)
            row_labels = None if labels is None else labels[rows]
            loss, gradient = self._denoising_loss(x0[rows], vectors[rows].detach(), row_labels, identities[rows], step)
            losses.append(loss)
            gradients.append(gradient)
        # + R |e - e_y|^2
        offset, pull = (vectors - class_vectors).detach(), self.config.pull
        return torch.cat(losses) + pull * offset.square().sum(1), torch.cat(gradients) + 2 * pull * offset

    def _denoising_loss(
        self, x0: Tensor, vectors: Tensor, labels: Tensor | None, identities: Sequence[str], step: int
    ) -> tuple[Tensor, Tensor]:
        """The mean squared errors (B,) of a few images and their gradients (B, D), in calls of at most `max_rows`."""
        draws = self.config.draws
        samples = [self.config.sample_noise(identity, x0.shape[1:], step, self.seed) for identity in identities]
        indices = torch.stack([indices for indices, _ in samples])
        noise = torch.stack([noise for _, noise in samples])
        loss, gradient = x0.new_zeros(len(x0)), torch.zeros_like(vectors)
        # small gradients vanish in half precision; a power of two is divided out again without rounding
        loss_scale = 2.0 ** round(math.log2(draws * x0[0].numel()))
        for first in range(0, draws, self.max_rows):
            some = slice(first, first + self.max_rows)
            sigma, some_noise = self.sigmas[indices[:, some]], noise[:, some]
            count = sigma.shape[1]
            # the draws of an image are rows of one batch
            clean, flat_noise = x0.repeat_interleave(count, 0), some_noise.flatten(0, 1).to(x0.device)
            flat_sigma = sigma.flatten().to(x0)
            x = clean + expand_dims(flat_sigma, clean) * flat_noise
            with torch.enable_grad():
                leaf = vectors.clone().requires_grad_()
                condition = self.conditioning(leaf, labels).repeat(count)
                prediction = self.denoiser.predict(x, flat_sigma, condition)
                target = self.denoiser.target(clean, flat_noise, flat_sigma)
                error = (prediction - target).square().flatten(1).mean(1).reshape(-1, count).sum(1) / draws
                gradient += torch.autograd.grad(loss_scale * error.sum(), leaf)[0] / loss_scale
            loss += error.detach()
        return loss, gradient


@contextmanager
def _frozen_weights(network: nn.Module) -> Iterator[None]:
    """A context in which no gradients of the weights are computed."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Embeddings:
    """Images as vectors, in the order of the source.

    Attributes:
        index: indices of the images in the source, int64 (N,).
        labels: classes, int64 (N,).
        vectors: float32 (N, D).
        losses: losses before each step, float32 (N, steps).
    """

    index: Tensor
    labels: Tensor
    vectors: Tensor
    losses: Tensor

    def __len__(self) -> int:
        return len(self.index)


def embed_images(
    source: ImageSource,
    labels: Tensor,
    model: DiffusionModel,
    out: str | Path,
    config: InversionConfig = InversionConfig(),
    *,
    seed: int = 0,
    runtime: Runtime | None = None,
) -> Embeddings:
    """Invert all images of a source into `out`, except those that are already there.

    `config.json` contains the settings; every batch writes a shard `<first index>.safetensors` with `index`, `label`,
    `embedding` and `loss`. The order of shards does not matter.

    Args:
        source: the images; unreadable ones are skipped under the policy `skip`.
        labels: the class of each image (N,), a label of the model.
        model: a class-conditional diffusion model.
        out: the folder.
        config: settings of the inversion.
        seed: seed of the noise.
        runtime: device, precision and batch size; None: `Runtime()`.

    Raises:
        FaroutError: for an unconditional model, or labels that do not fit the source or the model.
        StoreError: if `out` contains other files, or embeddings that were computed with other settings.
    """
    if len(labels) != len(source):
        raise FaroutError(f"{len(source)} images require a label each, got {len(labels)}")
    folder, runtime = expand_path(out), (runtime or Runtime()).resolve_auto()
    inverter = Inverter(model.to(runtime.device), config, seed, runtime)
    check_labels(labels, inverter.conditioning.num_classes)
    settings = {"config": asdict(config), "seed": seed, **describe_inputs(source, labels, model, runtime)}
    store.resume_config(folder, KIND, settings, {"source": source.name})
    finished = set(read_embeddings(folder).index.tolist())
    missing = [index for index in range(len(source)) if index not in finished]
    # the size of an image batch, which an autoencoder encodes at once; network calls have their own size
    size = runtime.images_per_batch((model.preprocessing.channels, *model.preprocessing.size))
    planned = [index for block in blocks_containing(missing, size, len(source)) for index in block]
    with task(f"embedding {source.name}", len(planned)) as bar:
        for batch in iterate_batches(source.subset(planned), model.preprocessing, size, workers=runtime.workers):
            index = torch.tensor([planned[position] for position in batch.indices])
            is_new = torch.tensor([number not in finished for number in index.tolist()])
            if is_new.any():
                vectors, losses = inverter(model.encode(batch.images), labels[index], batch.identities)
                if not bool(torch.isfinite(vectors[is_new]).all()):
                    raise FaroutError("some embeddings are not numbers; use precision fp32, or a smaller learning rate")
                tensors = {
                    "index": index[is_new],
                    "label": labels[index][is_new],
                    "embedding": vectors[is_new],
                    "loss": losses[is_new],
                }
                # an index is the first of a shard only if it is in no other shard, so names are unique
                store.save_tensors(folder / f"{int(tensors['index'][0]):08d}.safetensors", tensors)
            bar.advance(len(batch.keys))
    return read_embeddings(folder)


def read_embeddings(folder: str | Path) -> Embeddings:
    """Read all shards of a folder of embeddings as one; N = 0 without shards.

    Raises StoreError for a folder that is missing or of another kind, for a shard that is cut short, and for an image
    that is in two shards.
    """
    store.read_config(folder, KIND)
    shards = [store.load_tensors(path) for path in sorted(expand_path(folder).glob("*.safetensors"))]
    if not shards:
        empty = torch.empty(0, dtype=torch.int64)
        return Embeddings(empty, empty, torch.empty(0, 0), torch.empty(0, 0))
    if any(set(shard) != {"index", "label", "embedding", "loss"} for shard in shards):
        raise StoreError(f"{folder} contains files that are not shards of embeddings; give another folder")
    tensors = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    index, order = tensors["index"].sort()
    if len(set(index.tolist())) < len(index):
        raise StoreError(f"{folder} contains some images twice; remove it and embed them again")
    return Embeddings(index, tensors["label"][order], tensors["embedding"][order], tensors["loss"][order])
