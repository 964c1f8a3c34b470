"""Images as directions of class vectors, and images of points beyond the boundary of each class (Du et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from farout.classifiers.config import ClassifierConfig
from farout.core.errors import StoreError
from farout.core.progress import task
from farout.data.indices import readable
from farout.synthesis.base import SynthesisContext
from farout.synthesis.class_space import PAPER_DECODING, ClassVectors, VectorSynthesizer, class_conditioning
from farout.synthesis.dream_ood.alignment import Alignment, align, check_directions, read_aligned
from farout.synthesis.dream_ood.boundary import BoundarySampling, ClassBoundary
from farout.synthesis.dream_ood.boundary_folder import COLUMNS, extend_drawn, read_drawn

__all__ = ["DreamOOD"]

_ALIGN, _DRAWN = "align", "drawn"


class DreamOOD(VectorSynthesizer):
    """Synthetic outliers from beyond the class boundaries in the generator's class space.

    Du, Sun, Zhu and Li, "Dream the impossible: outlier imagination with diffusion models", NeurIPS 2023,
    arXiv 2309.13415. Three stages, each with files of its own in the folder of outliers:

    - `align`: a classifier is trained whose classes are the generator's class vectors e_y, told apart by cosines; every
      image becomes a direction (`align/`);
    - `draw`: directions beyond the boundary of each class, times |e_y| (`drawn/`, a file a class, which is added to);
    - `decode`: a vector becomes an image under class guidance (`images/`, `manifest.csv`).

    The manifest's `boundary_image` is the image on the boundary that an outlier's direction was drawn around, of whose
    pixels nothing is in it; `distance` is that of the direction to its k-th nearest image of the class,
    `boundary_distance` that of the image on the boundary to its own, `cosine` the direction's with e_y. The published
    code keeps features of varied images (`--alignment.augmented`); the default keeps those of the plain ones. Images
    that the classifier takes for another class lie far from their own and come first on its boundary: it is the class's
    own where few images are told wrongly.

    The presets `paper` and `paper_imagenet` are for Stable Diffusion: with a model that has a table of classes, give
    `prompts=Prompts()` beside them.

    Args:
        model: network and data augmentation of the classifier.
        alignment: how it is trained.
        boundary: how directions are sampled.
    """

    stages: ClassVar[tuple[str, ...]] = ("align", "draw", "decode")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "model": ClassifierConfig(network="resnet34", crop_padding=4, flip=True),
            "alignment": Alignment(steps=39200, batch_size=256, warmup=0, augmented=True),
            "boundary": BoundarySampling(k=300, select=50, noise=0.07 * math.sqrt(768), candidates=1500),
            **PAPER_DECODING,
        },
        "paper_imagenet": {
            "model": ClassifierConfig(
                network="resnet34", stem="imagenet", size=224, protocol="direct", resized_crop=True, flip=True
            ),
            "alignment": Alignment(steps=81300, batch_size=160, warmup=0, augmented=True),
            "boundary": BoundarySampling(k=300, select=200, noise=0.03 * math.sqrt(768), candidates=1500),
            **PAPER_DECODING,
        },
        "inliers": {"boundary": BoundarySampling(side="inliers", select=1000, noise=0.01 * math.sqrt(768), kept=1)},
    }
    """`paper`: CIFAR-100's, 200 epochs of 196 updates; `paper_imagenet`: ImageNet-100's, 100 epochs of 813, where the
    released code keeps the `small` stem at 224 pixels, 16 times the work (`--model.stem small`); `inliers`: more images
    of the classes, which the paper trains with for generalisation. The filter is the mended one in all
    (`--boundary.filter published`).
    """

    def __init__(
        self,
        *,
        model: ClassifierConfig = ClassifierConfig(network="wrn16_1", crop_padding=2, flip=False),  # noqa: B008
        alignment: Alignment = Alignment(),  # noqa: B008
        boundary: BoundarySampling = BoundarySampling(),  # noqa: B008
        **decoding: Any,
    ) -> None:
        super().__init__(**decoding)
        self.model, self.alignment, self.boundary = model, alignment, boundary

    @classmethod
    def tiny(cls, resources: Any) -> DreamOOD:
        """A few batches, a few candidates, three steps of decoding."""
        model = ClassifierConfig(network="wrn16_1", crop_padding=1, flip=False)
        boundary = BoundarySampling(points=2, candidates=8, kept=1)
        return cls(model=model, alignment=Alignment(steps=3, batch_size=8, warmup=0), boundary=boundary, steps=3)

    def check(self, context: SynthesisContext) -> None:
        """Refuses class vectors that are no directions, fewer than two classes, and a class of fewer than two images;
        see also `VectorSynthesizer.check`.
        """
        classes = list(context.classes)
        check_directions(class_conditioning(context.generator).class_vectors()[classes], context.present_names)
        counts = context.labels[readable(context.source)].bincount(minlength=len(context.class_names))
        self.boundary.check(counts[classes].tolist(), context.present_names)
        super().check(context)

    # -- stages --------------------------------------------------------------------------------------------------

    def run_stage(self, context: SynthesisContext, stage: str) -> None:
        """Does `align` or `draw`."""
        {"align": self._align, "draw": self._draw}[stage](context)

    def _align(self, context: SynthesisContext) -> None:
        align(context, context.folder / _ALIGN, self.model, self.alignment)

    def _draw(self, context: SynthesisContext) -> None:
        """As many as are wanted now; the first ones are the same, however many follow."""
        aligned, space = read_aligned(context.folder / _ALIGN), class_conditioning(context.generator)
        if aligned.features.shape[1] != space.dim:
            raise StoreError(
                f"{context.folder / _ALIGN} holds directions of {aligned.features.shape[1]} dimensions, the "
                f"generator's class vectors have {space.dim}; remove it and align the images again"
            )
        vectors, wanted = space.class_vectors().cpu(), self._place(context, context.count - 1) + 1
        with task("drawing beyond the boundaries", len(context.classes), unit="classes", item="classes") as bar:
            for label in context.classes:
                rows = aligned.labels == label
                features = aligned.features[rows].to(context.runtime.device)
                boundary = ClassBoundary(features, self.boundary, context.seed, label)
                extend_drawn(context.folder / _DRAWN, boundary, aligned.index[rows], vectors[label], wanted)
                bar.advance(1)

    def _place(self, context: SynthesisContext, index: int) -> int:
        """Which of its class's vectors outlier number `index` is made of."""
        return index // len(context.classes)

    def find_vectors(self, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]) -> ClassVectors:
        """The drawn vectors, and the images that they were drawn around."""
        drawn: dict[int, dict[str, Tensor]] = context.cached(_DRAWN, lambda: read_drawn(context.folder / _DRAWN))
        rows = [(drawn[label], self._place(context, index)) for index, label in zip(indices, labels, strict=True)]
        columns: dict[str, list[Any]] = {name: [float(known[name][row]) for known, row in rows] for name in COLUMNS}
        columns["boundary_image"] = [context.source.keys[int(known["index"][row])] for known, row in rows]
        return ClassVectors(torch.stack([known["vectors"][row] for known, row in rows]), columns)
