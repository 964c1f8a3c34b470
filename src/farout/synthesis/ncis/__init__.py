"""Images as class vectors, a flat manifold per class, and images of its thin outskirts (Doorenbos et al. 2024)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from farout.core import store
from farout.core.errors import FaroutError
from farout.data.indices import readable
from farout.synthesis.base import SynthesisContext
from farout.synthesis.class_space import PAPER_DECODING, ClassVectors, VectorSynthesizer
from farout.synthesis.ncis.inversion import Inversion, embed, read_embeddings
from farout.synthesis.ncis.labelled_vectors import check_counts, split
from farout.synthesis.ncis.manifold import Manifold, ManifoldConfig, fit_manifold

__all__ = ["NCIS"]

_EMBEDDINGS, _MANIFOLD, _TRAINING, _DRAWN = "embeddings", "manifold", "manifold.training", "drawn.safetensors"


class NCIS(VectorSynthesizer):
    """Synthetic outliers from low-density regions of the generator's class space.

    Doorenbos, Sznitman and Marquez-Neila, "Non-linear outlier synthesis for out-of-distribution detection",
    arXiv 2411.13619. Four stages, each with files of its own in the folder of outliers:

    - `embed`: every image becomes a vector of the class space (`embeddings/`, shards that are gone on with);
    - `manifold`: a volume-preserving network flattens the classes, a Gaussian each (`manifold/`; an interrupted
      training goes on from its last checkpoint);
    - `draw`: vectors of low density (`drawn.safetensors`: vectors, labels, log_density, distance);
    - `decode`: a vector becomes an image under class guidance (`images/`, `manifest.csv`).

    The manifest's `distance` is the squared Mahalanobis distance from the class, divided by the dimensions.

    As published, the generator is Stable Diffusion and a class vector the input embedding of the class's one-word name
    (`prompts`); any other class-conditional model has a class space of its own. The preset `paper` is for the former:
    with a model that has a table of classes, give `prompts=Prompts()` beside it.

    Args:
        inversion: how images become class vectors.
        manifold: density of class vectors, and sampling from it.
        images_per_vector: outliers generated from the same class vector with different noise; 8 in the published code.
        fixed_noise: start all class vectors from the same noise; with several images per vector, from the same few.
    """

    stages: ClassVar[tuple[str, ...]] = ("embed", "manifold", "draw", "decode")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "inversion": Inversion(steps=3, draws=32, stratified=False, lr=0.01),
            "manifold": ManifoldConfig.from_preset("paper"),
            "images_per_vector": 8,
            **PAPER_DECODING,
        },
        "linear": {"manifold": ManifoldConfig(map="linear")},
    }

    def __init__(
        self,
        *,
        inversion: Inversion = Inversion(),  # noqa: B008
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

    @classmethod
    def tiny(cls, resources: Any) -> NCIS:
        """One step down, a few batches, three steps of decoding."""
        manifold = ManifoldConfig(layers=2, steps=4, validations=1, draws=20, kept=5)
        return cls(inversion=Inversion(steps=1, draws=2), manifold=manifold, steps=3)

    # -- stages --------------------------------------------------------------------------------------------------

    def run_stage(self, context: SynthesisContext, stage: str) -> None:
        """Does `embed`, `manifold` or `draw`."""
        {"embed": self._embed, "manifold": self._fit, "draw": self._draw}[stage](context)

    def check(self, context: SynthesisContext) -> None:
        """Refuses images that cannot be read, levels that the schedule lacks, and classes that are too small for a
        Gaussian, or to hold vectors out where these are to choose a shrinkage; see also `VectorSynthesizer.check`.
        """
        self.inversion.grid(context.generator.schedule)
        places = _numbered(context, context.labels[readable(context.source)])
        check_counts(places, context.present_names)
        if self.manifold.regularization == "held_out":  # classes too small for it are refused before the embedding
            split(places, len(context.classes), self.manifold, context.seed)
        super().check(context)

    def _embed(self, context: SynthesisContext) -> None:
        folder = context.folder / _EMBEDDINGS
        embed(
            context.source,
            context.labels,
            context.generator,
            folder,
            self.inversion,
            seed=context.seed,
            runtime=context.runtime,
        )

    def _fit(self, context: SynthesisContext) -> None:
        """Once: embeddings and settings decide it, and a folder of outliers has only one of each. Checkpoints of the
        training stand in a folder beside until it is there.
        """
        folder, training = context.folder / _MANIFOLD, context.folder / _TRAINING
        if not folder.is_dir():
            found = read_embeddings(context.folder / _EMBEDDINGS)
            places = _numbered(context, found.labels)
            device = context.runtime.device if self.manifold.device == "auto" else self.manifold.device
            config = replace(self.manifold, device=device)
            fit_manifold(found.vectors, places, config, context.present_names, context.seed, training).save(folder)
        shutil.rmtree(training, ignore_errors=True)

    def _draw(self, context: SynthesisContext) -> None:
        """As many as are wanted now; the first ones are the same, however many follow."""
        drawn = Manifold.load(context.folder / _MANIFOLD).draw(
            self._place(context, context.count - 1) + 1, context.seed
        )
        tensors = {
            "vectors": drawn.vectors,
            "labels": torch.tensor(context.classes)[drawn.labels],
            "log_density": drawn.log_density,
            "distance": drawn.distance,
        }
        store.save_tensors(context.folder / _DRAWN, tensors)

    def _place(self, context: SynthesisContext, index: int) -> int:
        """Which of its class's vectors outlier number `index` is made of."""
        return index // len(context.classes) // self.images_per_vector

    def find_vectors(self, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]) -> ClassVectors:
        """The drawn vectors; nothing of the class's images is left in them but the density."""
        drawn: dict[str, Tensor] = context.cached(_DRAWN, lambda: store.load_tensors(context.folder / _DRAWN))
        starts = {label: int((drawn["labels"] == label).nonzero()[0]) for label in set(labels)}
        rows = [starts[label] + self._place(context, index) for index, label in zip(indices, labels, strict=True)]
        columns = {name: drawn[name][rows].tolist() for name in ("distance", "log_density")}
        return ClassVectors(drawn["vectors"][rows], columns)

    def noise_indices(self, context: SynthesisContext, indices: Sequence[int]) -> Sequence[int]:
        """Where it is fixed, the same for every vector: images that share one would be copies with one for all."""
        if not self.fixed_noise:
            return indices
        return [index // len(context.classes) % self.images_per_vector for index in indices]


def _numbered(context: SynthesisContext, labels: Tensor) -> Tensor:
    """Labels as positions among the classes that have images."""
    return torch.tensor([context.classes.index(label) for label in labels.tolist()], dtype=torch.int64)
