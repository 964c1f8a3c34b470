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
from farout.synthesis.base import Work
from farout.synthesis.class_space import PUBLISHED, ClassPoints, VectorSynthesizer
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
            **PUBLISHED,
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

    def prepare(self, work: Work, stage: str) -> None:
        """Does `embed`, `manifold` or `draw`."""
        {"embed": self._embed, "manifold": self._fit, "draw": self._draw}[stage](work)

    def check(self, work: Work) -> None:
        """Refuses images that cannot be read, levels that the schedule lacks, and classes that are too small for a
        Gaussian, or to hold vectors out where these are to choose a shrinkage; see also `VectorSynthesizer.check`.
        """
        self.inversion.grid(work.generator.schedule)
        places = _numbered(work, work.labels[readable(work.source)])
        check_counts(places, work.present)
        if self.manifold.regularization == "held_out":  # classes too small for it are refused before the embedding
            split(places, len(work.classes), self.manifold, work.seed)
        super().check(work)

    def _embed(self, work: Work) -> None:
        folder = work.folder / _EMBEDDINGS
        embed(work.source, work.labels, work.generator, folder, self.inversion, seed=work.seed, runtime=work.runtime)

    def _fit(self, work: Work) -> None:
        """Once: embeddings and settings decide it, and a folder of outliers has only one of each. Checkpoints of the
        training stand in a folder beside until it is there.
        """
        folder, training = work.folder / _MANIFOLD, work.folder / _TRAINING
        if not folder.is_dir():
            found = read_embeddings(work.folder / _EMBEDDINGS)
            places = _numbered(work, found.labels)
            device = work.runtime.device if self.manifold.device == "auto" else self.manifold.device
            config = replace(self.manifold, device=device)
            fit_manifold(found.vectors, places, config, work.present, work.seed, training).save(folder)
        shutil.rmtree(training, ignore_errors=True)

    def _draw(self, work: Work) -> None:
        """As many as are wanted now; the first ones are the same, however many follow."""
        drawn = Manifold.load(work.folder / _MANIFOLD).draw(self._place(work, work.count - 1) + 1, work.seed)
        tensors = {
            "vectors": drawn.vectors,
            "labels": torch.tensor(work.classes)[drawn.labels],
            "log_density": drawn.log_density,
            "distance": drawn.distance,
        }
        store.save_tensors(work.folder / _DRAWN, tensors)

    def _place(self, work: Work, index: int) -> int:
        """Which of its class's vectors outlier number `index` is made of."""
        return index // len(work.classes) // self.images_per_vector

    def points(self, work: Work, indices: Sequence[int], labels: Sequence[int]) -> ClassPoints:
        """The drawn vectors; nothing of the class's images is left in them but the density."""
        drawn: dict[str, Tensor] = work.once(_DRAWN, lambda: store.load_tensors(work.folder / _DRAWN))
        starts = {label: int((drawn["labels"] == label).nonzero()[0]) for label in set(labels)}
        rows = [starts[label] + self._place(work, index) for index, label in zip(indices, labels, strict=True)]
        columns = {name: drawn[name][rows].tolist() for name in ("distance", "log_density")}
        return ClassPoints(drawn["vectors"][rows], [""] * len(rows), columns)

    def noises(self, work: Work, indices: Sequence[int]) -> Sequence[int]:
        """Where it is fixed, the same for every vector: images that share one would be copies with one for all."""
        if not self.fixed_noise:
            return indices
        return [index // len(work.classes) % self.images_per_vector for index in indices]


def _numbered(work: Work, labels: Tensor) -> Tensor:
    """Labels as positions among the classes that have images."""
    return torch.tensor([work.classes.index(label) for label in labels.tolist()], dtype=torch.int64)
