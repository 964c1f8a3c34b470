"""Images as vectors of a generator's class space: a short inversion of many images at once.

For each image x0 of class y the vector e, which begins as the class's own e_y, takes a few steps of Adam down

    L(e) = mean over K draws of (t, noise), and over C, H, W, of (network(x_t, t, e) - target)^2 + R ||e - e_y||^2,

with the network's native prediction and its training target, and without guidance (Doorenbos, Sznitman and
Marquez-Neila, "Non-linear outlier synthesis for out-of-distribution detection", 2411.13619, section 3; a per-image
form of textual inversion, Gal et al. 2023). The weights stay as they are. What is minimised is the SUM over images, and
Adam works on every number alone: each image goes the way that it would go by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from farout.core import store
from farout.core.chunking import blocks_with
from farout.core.errors import FaroutError, StoreError
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import batches
from farout.data.image_source import ImageSource
from farout.diffusion.conditioning.base import Conditioning, check_labels
from farout.diffusion.denoiser import NetworkDenoiser, expand_dims
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import NoiseKind, seeded_generator
from farout.diffusion.noise_levels import leading_levels
from farout.diffusion.schedule import NoiseSchedule
from farout.synthesis.base import describe_inputs
from farout.synthesis.class_space import class_conditioning, class_table_std

__all__ = ["KIND", "Embeddings", "Inversion", "Inverter", "embed", "read_embeddings"]

KIND = "embeddings"
"""What `config.json` calls a folder of embeddings."""


@dataclass(frozen=True)
class Inversion:
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
        if self.lr is not None and self.lr_scale != Inversion.lr_scale:
            raise FaroutError(
                f"lr={self.lr} is the rate itself, so that lr_scale={self.lr_scale} would have no effect; leave one out"
            )
        if self.noise not in ("image", "shared"):
            raise FaroutError(f"noise is 'shared' or drawn per 'image', got {self.noise!r}")

    def learning_rate(self, conditioning: Conditioning) -> float:
        """Adam's, absolute."""
        return self.lr if self.lr is not None else self.lr_scale * class_table_std(conditioning)

    def grid(self, schedule: NoiseSchedule) -> Tensor:
        """The levels t that are drawn from, int64: T u / levels + 1 for u = 0, 1, …; of 1000 levels 1, 21, …, 981.

        Raises FaroutError for more levels than the schedule has.
        """
        return torch.tensor(leading_levels(schedule, self.levels))

    def draw(self, key: str, shape: Sequence[int], step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Places in the grid (K,) and noise (K, *shape) of one image in one step: from (seed, key, step) alone."""
        generator = seeded_generator(seed, "inversion", self.noise, key if self.noise == "image" else "", step)
        u = torch.rand(self.draws, generator=generator)
        if self.stratified:
            u = (torch.arange(self.draws) + u) / self.draws
        places = (u * self.levels).long().clamp(max=self.levels - 1)
        return places, torch.randn(self.draws, *shape, generator=generator)


class Inverter:
    """Inverts images of one model; see the module for what is minimised.

    Args:
        model: a class-conditional diffusion model; images are inverted where it is.
        inversion: how.
        seed: of the draws.
        runtime: batch size and precision, resolved.

    Raises:
        FaroutError: for an unconditional model.
    """

    def __init__(self, model: DiffusionModel, inversion: Inversion, seed: int, runtime: Runtime) -> None:
        self.model, self.inversion, self.seed = model, inversion, seed
        self.space = class_conditioning(model)
        self.denoiser: NetworkDenoiser = model.denoiser(precision=runtime.precision)  # type: ignore[arg-type]
        # the gradient keeps all activations of a call
        self.rows = 32 if runtime.batch_size == "auto" else runtime.batch_size
        self.sigmas = model.schedule.sigma_of(inversion.grid(model.schedule)).float()

    def __call__(self, x0: Tensor, labels: Tensor, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Vectors (B, D) and the loss before each step (B, steps), float32, on the CPU.

        Args:
            x0: the encoded images (B, …).
            labels: their classes (B,).
            keys: their content hashes (`Batch.identities`), which seed their draws.
        """
        labels = check_labels(labels, self.space.num_classes).cpu()
        start = self.space.class_vectors().cpu()[labels].to(x0.device)
        vectors = start.clone()
        optimizer = torch.optim.Adam([vectors], lr=self.inversion.learning_rate(self.space))
        losses = []
        with _frozen(self.model.network):
            for step in range(self.inversion.steps):
                loss, vectors.grad = self.slopes(x0, vectors, start, keys, step, labels)
                losses.append(loss)
                optimizer.step()
        return vectors.cpu(), torch.stack(losses, dim=1).cpu()

    def slopes(
        self, x0: Tensor, vectors: Tensor, start: Tensor, keys: Sequence[str], step: int, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Each image's loss (B,) and its gradient (B, D), with the draws of `step`.

        A network call holds the draws of as many whole images as go into its rows, or a part of one image's, and its
        graph is let go before the next: memory grows neither with the batch nor with the draws.

        Args:
            x0, keys: as for the call.
            vectors: (B, D), where the slopes are taken.
            start: the class vectors (B, D).
            step: names the draws.
            labels: the classes (B,), for models whose vectors stand in prompts of their classes.
        """
        size = max(1, self.rows // self.inversion.draws)
        losses, slopes = [], []
        for first in range(0, len(x0), size):
            some = slice(first, first + size)
            told = None if labels is None else labels[some]
            loss, slope = self._errors(x0[some], vectors[some].detach(), told, keys[some], step)
            losses.append(loss)
            slopes.append(slope)
        apart = (vectors - start).detach()
        pull = self.inversion.pull
        return torch.cat(losses) + pull * apart.square().sum(1), torch.cat(slopes) + 2 * pull * apart

    def _errors(
        self, x0: Tensor, vectors: Tensor, labels: Tensor | None, keys: Sequence[str], step: int
    ) -> tuple[Tensor, Tensor]:
        """The mean squared errors (B,) of a few images and their gradients (B, D), a network call at a time."""
        draws = self.inversion.draws
        drawn = [self.inversion.draw(key, x0.shape[1:], step, self.seed) for key in keys]
        places = torch.stack([places for places, _ in drawn])
        noise = torch.stack([values for _, values in drawn])
        loss, slope = x0.new_zeros(len(x0)), torch.zeros_like(vectors)
        # in half precision small gradients vanish; a power of two is taken out again without rounding
        scale = 2.0 ** round(math.log2(draws * x0[0].numel()))
        for first in range(0, draws, self.rows):
            some = slice(first, first + self.rows)
            with torch.enable_grad():
                leaf = vectors.clone().requires_grad_()
                error = self._error(x0, leaf, labels, self.sigmas[places[:, some]], noise[:, some]) / draws
                slope += torch.autograd.grad(scale * error.sum(), leaf)[0] / scale
            loss += error.detach()
        return loss, slope

    def _error(self, x0: Tensor, vectors: Tensor, labels: Tensor | None, sigma: Tensor, noise: Tensor) -> Tensor:
        """The sums (B,) of the mean squared errors of draws sigma (B, K) and noise (B, K, …)."""
        draws = sigma.shape[1]
        clean, noise, sigma = x0.repeat_interleave(draws, 0), noise.flatten(0, 1).to(x0.device), sigma.flatten().to(x0)
        told = self.space(vectors, labels).repeat(draws)
        answer = self.denoiser.predict(clean + expand_dims(sigma, clean) * noise, sigma, told)
        error = (answer - self.denoiser.target(clean, noise, sigma)).square().flatten(1).mean(1)
        return error.reshape(-1, draws).sum(1)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """No gradients of weights inside: they would be computed and thrown away."""
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learnt:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learnt:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Embeddings:
    """Images as vectors, in the order of their places in the source.

    Attributes:
        index: places in the source, int64 (N,).
        labels: classes, int64 (N,).
        vectors: float32 (N, D).
        losses: before each step, float32 (N, steps).
    """

    index: Tensor
    labels: Tensor
    vectors: Tensor
    losses: Tensor

    def __len__(self) -> int:
        return len(self.index)


def embed(
    source: ImageSource,
    labels: Tensor,
    model: DiffusionModel,
    out: str | Path,
    inversion: Inversion = Inversion(),
    *,
    seed: int = 0,
    runtime: Runtime | None = None,
) -> Embeddings:
    """Inverts all images of a source into `out`, those that are there already not again.

    `config.json` says how; every batch leaves a shard `<first index>.safetensors` of `index`, `label`, `embedding` and
    `loss`, in no order that matters.

    Args:
        source: the images; unreadable ones are left out under the policy `skip`.
        labels: the class of each (N,), a number of the model's table.
        model: a class-conditional diffusion model.
        out: the folder.
        inversion: how images are inverted.
        seed: of the draws.
        runtime: how the network is run; None: `Runtime()`.

    Raises:
        FaroutError: for an unconditional model, or labels that do not go with the source or the model.
        StoreError: where `out` holds something else, or embeddings that were made otherwise.
    """
    if len(labels) != len(source):
        raise FaroutError(f"{len(source)} images require a label each, got {len(labels)}")
    folder, runtime = Path(out), (runtime or Runtime()).resolved()
    inverter = Inverter(model.to(runtime.device), inversion, seed, runtime)
    check_labels(labels, inverter.space.num_classes)
    settings = {"config": asdict(inversion), "seed": seed, **describe_inputs(source, labels, model, runtime)}
    store.resume_config(folder, KIND, settings, {"source": source.name})
    there = set(read_embeddings(folder).index.tolist())
    missing = [index for index in range(len(source)) if index not in there]
    # by the images, which an autoencoder encodes all at once; the network's calls have their own size
    size = runtime.images_per_batch((model.preprocessing.channels, *model.preprocessing.size))
    planned = [index for block in blocks_with(missing, size, len(source)) for index in block]
    with task(f"embedding {source.name}", len(planned)) as bar:
        for batch in batches(source.subset(planned), model.preprocessing, size, workers=runtime.workers):
            index = torch.tensor([planned[place] for place in batch.indices])
            new = torch.tensor([place not in there for place in index.tolist()])
            if new.any():
                vectors, losses = inverter(model.encode(batch.images), labels[index], batch.identities)
                _write(folder, Embeddings(index[new], labels[index][new], vectors[new], losses[new]))
            bar.advance(len(batch.keys))
    return read_embeddings(folder)


def _write(folder: Path, shard: Embeddings) -> None:
    if not bool(torch.isfinite(shard.vectors).all()):
        raise FaroutError("some embeddings are not numbers; use precision fp32, or a smaller learning rate")
    tensors = {"index": shard.index, "label": shard.labels, "embedding": shard.vectors, "loss": shard.losses}
    # an index is missing from all shards before it is first in one, so no name comes twice
    store.save_tensors(folder / f"{int(shard.index[0]):08d}.safetensors", tensors)


def read_embeddings(folder: str | Path) -> Embeddings:
    """All shards of a folder of embeddings, as one; without shards N = 0.

    Raises StoreError for a folder that is missing or of another kind, for a shard that is cut short, and for an image
    that is in two shards.
    """
    store.read_config(folder, KIND)
    shards = [store.load_tensors(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    if not shards:
        none = torch.empty(0, dtype=torch.int64)
        return Embeddings(none, none, torch.empty(0, 0), torch.empty(0, 0))
    if any(set(shard) != {"index", "label", "embedding", "loss"} for shard in shards):
        raise StoreError(f"{folder} holds files that are not shards of embeddings; give another folder")
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    index, order = whole["index"].sort()
    if len(index.unique()) < len(index):
        raise StoreError(f"{folder} holds some images twice; remove it and embed them again")
    return Embeddings(index, whole["label"][order], whole["embedding"][order], whole["loss"][order])
