"""Dream-OOD: images as directions of class vectors, and outliers from beyond the boundary of each class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from farout.classifiers.config import ClassifierConfig
from farout.core.errors import StoreError
from farout.core.progress import task
from farout.data.indices import readable_indices
from farout.synthesis.base import SynthesisContext
from farout.synthesis.class_space import PAPER_DECODING, ClassVectors, VectorSynthesizer, class_conditioning
from farout.synthesis.dream_ood.alignment import (
    AlignmentConfig,
    align_images,
    normalize_class_vectors,
    read_aligned_images,
)
from farout.synthesis.dream_ood.boundary import (
    SAMPLE_COLUMNS,
    BoundaryConfig,
    ClassBoundary,
    extend_samples,
    read_samples,
)

__all__ = ["DreamOOD"]

ALIGNMENT_FOLDER, SAMPLES_FOLDER = "align", "samples"


class DreamOOD(VectorSynthesizer):
    """Synthetic outliers from beyond the class boundaries in the generator's class space.

    Du, Sun, Zhu and Li, "Dream the impossible: outlier imagination with diffusion models", NeurIPS 2023,
    arXiv 2309.13415. Three stages, each with files of its own in the folder of outliers:

    - `align`: trains a classifier whose class weights are the generator's class vectors e_y, with cosine logits; every
      image becomes a direction (`align/`);
    - `sample`: samples directions beyond the boundary of each class and multiplies them by |e_y| (`samples/`, one file
      per class, which is extended when more outliers are requested);
    - `decode`: decodes each vector to an image with classifier-free guidance (`images/`, `manifest.csv`).

    The manifest's `boundary_image` is the boundary image that an outlier's direction was sampled around (none of its
    pixels are used); `distance` is the distance of the direction to its k-th nearest image of the class,
    `boundary_distance` that of the boundary image, and `cosine` the direction's cosine with e_y. The published code
    uses features of augmented images (`--alignment.augmented`); the default uses those of the original ones. Images
    that the classifier assigns to another class are far from their own class and are therefore first on its boundary:
    the boundary is that of the class only if few images are misclassified.

    The presets `paper` and `paper_imagenet` are for Stable Diffusion; with a model that has a class table, also give
    `prompts=Prompts()`.

    Args:
        model: network and data augmentation of the classifier.
        alignment: training of the classifier.
        boundary: sampling of directions.
    """

    stages: ClassVar[tuple[str, ...]] = ("align", "sample", "decode")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "model": ClassifierConfig(network="resnet34", crop_padding=4, flip=True),
            "alignment": AlignmentConfig(steps=39200, batch_size=256, warmup=0, augmented=True),
            "boundary": BoundaryConfig(k=300, select=50, noise=0.07 * math.sqrt(768), candidates=1500),
            **PAPER_DECODING,
        },
        "paper_imagenet": {
            "model": ClassifierConfig(
                network="resnet34", stem="imagenet", size=224, protocol="direct", resized_crop=True, flip=True
            ),
            "alignment": AlignmentConfig(steps=81300, batch_size=160, warmup=0, augmented=True),
            "boundary": BoundaryConfig(k=300, select=200, noise=0.03 * math.sqrt(768), candidates=1500),
            **PAPER_DECODING,
        },
        "inliers": {"boundary": BoundaryConfig(side="inliers", select=1000, noise=0.01 * math.sqrt(768), kept=1)},
    }
    """`paper`: settings for CIFAR-100, 200 epochs of 196 updates; `paper_imagenet`: for ImageNet-100, 100 epochs of 813
    updates (the released code keeps the `small` stem at 224 pixels, which costs 16 times as much: `--model.stem
    small`); `inliers`: additional images of the classes, which the paper uses in training to improve generalization.
    All use the corrected filter (`--boundary.filter published` for that of the released code).
    """

    test_arguments: ClassVar[Mapping[str, Any]] = {
        "model": ClassifierConfig(network="wrn16_1", crop_padding=1, flip=False),
        "alignment": AlignmentConfig(steps=3, batch_size=8, warmup=0),
        "boundary": BoundaryConfig(points=2, candidates=8, kept=1),
        "steps": 3,
    }

    def __init__(
        self,
        *,
        model: ClassifierConfig = ClassifierConfig(network="wrn16_1", crop_padding=2, flip=False),  # noqa: B008
        alignment: AlignmentConfig = AlignmentConfig(),  # noqa: B008
        boundary: BoundaryConfig = BoundaryConfig(),  # noqa: B008
        **decoding: Any,
    ) -> None:
        super().__init__(**decoding)
        self.model, self.alignment, self.boundary = model, alignment, boundary

    def check(self, context: SynthesisContext) -> None:
        """Raise FaroutError for class vectors without a direction, fewer than two classes, and a class with fewer than
        two images; see also `VectorSynthesizer.check`.
        """
        classes = list(context.classes)
        normalize_class_vectors(class_conditioning(context.generator).class_vectors()[classes], context.present_names)
        counts = context.labels[readable_indices(context.source)].bincount(minlength=len(context.class_names))
        self.boundary.check_class_sizes(counts[classes].tolist(), context.present_names)
        super().check(context)

    # -- stages --------------------------------------------------------------------------------------------------

    def run_stage(self, context: SynthesisContext, stage: str) -> None:
        """Run `align` or `sample`."""
        if stage == "align":
            align_images(context, context.folder / ALIGNMENT_FOLDER, self.model, self.alignment)
        else:
            self._sample_vectors(context)

    def _sample_vectors(self, context: SynthesisContext) -> None:
        """Sample the vectors of the requested outliers; more outliers later extend them and change none."""
        folder = context.folder / ALIGNMENT_FOLDER
        aligned, conditioning = read_aligned_images(folder), class_conditioning(context.generator)
        if aligned.features.shape[1] != conditioning.dim:
            raise StoreError(
                f"{folder} contains directions of {aligned.features.shape[1]} dimensions, the generator's "
                f"class vectors have {conditioning.dim}; remove it and align the images again"
            )
        class_vectors = conditioning.class_vectors().cpu()
        count = self._sample_index(context, context.count - 1) + 1
        with task("sampling beyond the class boundaries", len(context.classes), unit="classes", item="classes") as bar:
            for label in context.classes:
                rows = aligned.labels == label
                features = aligned.features[rows].to(context.runtime.device)
                boundary = ClassBoundary(features, self.boundary, context.seed, label)
                extend_samples(
                    context.folder / SAMPLES_FOLDER, boundary, aligned.index[rows], class_vectors[label], count
                )
                bar.advance(1)

    def _sample_index(self, context: SynthesisContext, index: int) -> int:
        """The index, among the vectors of its class, of the vector of outlier `index`."""
        return index // len(context.classes)

    def find_vectors(self, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]) -> ClassVectors:
        """The sampled vectors and their boundary images."""
        samples = context.cached("samples", lambda: read_samples(context.folder / SAMPLES_FOLDER))
        rows: list[dict[str, Tensor]] = []
        for index, label in zip(indices, labels, strict=True):
            row = self._sample_index(context, index)
            rows.append({name: samples[label][name][row] for name in ("vectors", "index", *SAMPLE_COLUMNS)})
        columns: dict[str, list[Any]] = {name: [float(row[name]) for row in rows] for name in SAMPLE_COLUMNS}
        columns["boundary_image"] = [context.source.keys[int(row["index"])] for row in rows]
        return ClassVectors(torch.stack([row["vectors"] for row in rows]), columns)
