"""NCIS: images as class vectors, a flat manifold per class, and outliers of low density (Doorenbos et al. 2024)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from farout.core import store
from farout.core.errors import FaroutError
from farout.data.indices import readable_indices
from farout.synthesis.base import SynthesisContext
from farout.synthesis.class_space import PAPER_DECODING, ClassVectors, VectorSynthesizer
from farout.synthesis.ncis.inversion import InversionConfig, embed_images, read_embeddings
from farout.synthesis.ncis.manifold import Manifold, ManifoldConfig, check_class_sizes, fit_manifold, split_vectors

__all__ = ["NCIS"]

EMBEDDINGS_FOLDER, MANIFOLD_FOLDER, SAMPLES_FILE = "embeddings", "manifold", "samples.safetensors"
_TRAINING_FOLDER = "manifold.training"


class NCIS(VectorSynthesizer):
    """Synthetic outliers from low-density regions of the generator's class space.

    Doorenbos, Sznitman and Marquez-Neila, "Non-linear outlier synthesis for out-of-distribution detection",
    arXiv 2411.13619. Four stages, each with files of its own in the folder of outliers:

    - `embed`: embeds every image as a vector of the class space (`embeddings/`; resumed shard by shard);
    - `manifold`: trains a volume-preserving network that flattens the classes, and fits a Gaussian to each
      (`manifold/`; an interrupted training continues from its last checkpoint);
    - `sample`: samples vectors of low density (`samples.safetensors`: vectors, labels, log_density, distance);
    - `decode`: decodes each vector to an image with classifier-free guidance (`images/`, `manifest.csv`).

    The manifest's `distance` is the squared Mahalanobis distance from the class, divided by the dimensions.

    As published, the generator is Stable Diffusion and a class vector is the input embedding of the class's one-word
    name (`prompts`); any other class-conditional model has a class space of its own. The preset `paper` is for Stable
    Diffusion; with a model that has a class table, also give `prompts=Prompts()`.

    Args:
        inversion: embedding of images as class vectors.
        manifold: density of class vectors, and sampling from it.
        images_per_vector: outliers generated from the same class vector with different noise; 8 in the published code.
        fixed_noise: start all class vectors from the same noise; with several images per vector, from the same few.
    """

    stages: ClassVar[tuple[str, ...]] = ("embed", "manifold", "sample", "decode")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "inversion": InversionConfig(steps=3, draws=32, stratified=False, lr=0.01),
            "manifold": ManifoldConfig.from_preset("paper"),
            "images_per_vector": 8,
            **PAPER_DECODING,
        },
        "linear": {"manifold": ManifoldConfig(map="linear")},
    }

    test_arguments: ClassVar[Mapping[str, Any]] = {
        "inversion": InversionConfig(steps=1, draws=2),
        "manifold": ManifoldConfig(layers=2, steps=4, validations=1, candidates=20, kept=5),
        "steps": 3,
    }

    def __init__(
        self,
        *,
        inversion: InversionConfig = InversionConfig(),  # noqa: B008
        manifold: ManifoldConfig = ManifoldConfig(),  # noqa: B008
        images_per_vector: int = 1,
        fixed_noise: bool = False,
        **decoding: Any,
    ) -> None:
        super().__init__(**decoding)
        if images_per_vector < 1:
            raise FaroutError(f"images_per_vector must be 1 or more, got {images_per_vector}")
        self.inversion, self.manifold = inversion, manifold
        self.images_per_vector, self.fixed_noise = images_per_vector, fixed_noise

    def check(self, context: SynthesisContext) -> None:
        """Raise FaroutError for unreadable images, noise levels that the schedule lacks, and classes that are too small
        for a Gaussian, or for held-out vectors if these choose the shrinkage; see also `VectorSynthesizer.check`.
        """
        self.inversion.timesteps(context.generator.schedule)
        positions = _class_positions(context, context.labels[readable_indices(context.source)])
        check_class_sizes(positions, context.present_names)
        if self.manifold.regularization == "held_out":  # fails now, not after the embedding
            split_vectors(positions, len(context.classes), self.manifold, context.seed)
        super().check(context)

    # -- stages --------------------------------------------------------------------------------------------------

    def run_stage(self, context: SynthesisContext, stage: str) -> None:
        """Run `embed`, `manifold` or `sample`."""
        if stage == "embed":
            self._embed_images(context)
        elif stage == "manifold":
            self._fit_manifold(context)
        else:
            self._sample_vectors(context)

    def _embed_images(self, context: SynthesisContext) -> None:
        embed_images(
            context.source,
            context.labels,
            context.generator,
            context.folder / EMBEDDINGS_FOLDER,
            self.inversion,
            seed=context.seed,
            runtime=context.runtime,
        )

    def _fit_manifold(self, context: SynthesisContext) -> None:
        """Fit the manifold once: it depends only on the embeddings and settings, which are fixed for a folder.

        Until it is finished, the checkpoints of its training are in a folder next to it.
        """
        folder, training = context.folder / MANIFOLD_FOLDER, context.folder / _TRAINING_FOLDER
        if not folder.is_dir():
            embeddings = read_embeddings(context.folder / EMBEDDINGS_FOLDER)
            positions = _class_positions(context, embeddings.labels)
            device = context.runtime.device if self.manifold.device == "auto" else self.manifold.device
            config = replace(self.manifold, device=device)
            manifold = fit_manifold(
                embeddings.vectors, positions, config, context.present_names, context.seed, training
            )
            manifold.save(folder)
        shutil.rmtree(training, ignore_errors=True)

    def _sample_vectors(self, context: SynthesisContext) -> None:
        """Sample the vectors of the requested outliers; more outliers later add vectors and change none."""
        per_class = self._vector_index(context, context.count - 1) + 1
        samples = Manifold.load(context.folder / MANIFOLD_FOLDER).sample(per_class, context.seed)
        tensors = {
            "vectors": samples.vectors,
            "labels": torch.tensor(context.classes)[samples.labels],
            "log_density": samples.log_density,
            "distance": samples.distance,
        }
        store.save_tensors(context.folder / SAMPLES_FILE, tensors)

    def _vector_index(self, context: SynthesisContext, index: int) -> int:
        """The index, among the vectors of its class, of the vector of outlier `index`."""
        return index // len(context.classes) // self.images_per_vector

    def find_vectors(self, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]) -> ClassVectors:
        """The sampled vectors."""
        samples = context.cached("samples", lambda: store.load_tensors(context.folder / SAMPLES_FILE))
        first_rows = {label: int((samples["labels"] == label).nonzero()[0]) for label in set(labels)}
        rows = [first_rows[label] + self._vector_index(context, index) for index, label in zip(indices, labels)]
        columns = {name: samples[name][rows].tolist() for name in ("distance", "log_density")}
        return ClassVectors(samples["vectors"][rows], columns)

    def noise_indices(self, context: SynthesisContext, indices: Sequence[int]) -> Sequence[int]:
        """With `fixed_noise`, the same indices for every vector.

        Images of the same vector get different ones, because they would be copies otherwise.
        """
        if not self.fixed_noise:
            return indices
        return [index // len(context.classes) % self.images_per_vector for index in indices]


def _class_positions(context: SynthesisContext, labels: Tensor) -> Tensor:
    """Labels as positions among the classes that have images."""
    return torch.tensor([context.classes.index(label) for label in labels.tolist()], dtype=torch.int64)
