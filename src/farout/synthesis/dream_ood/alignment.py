"""Images as directions of a generator's class space, by a classifier whose class weights are the class vectors.

A network maps every image x of class y to a vector z of the class space. It is trained by the cross-entropy of the
logits cos(z, e_k) / T, with fixed class vectors e_k (Du, Sun, Zhu and Li, "Dream the impossible: outlier imagination
with diffusion models", NeurIPS 2023, arXiv 2309.13415, section 3.1). The image becomes the direction u = z / |z|.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from farout.classifiers.config import ClassifierConfig
from farout.classifiers.model import Classifier
from farout.classifiers.train import train_on_source
from farout.core import store
from farout.core.devices import Precision
from farout.core.errors import FaroutError, MisleadingResultWarning, StoreError
from farout.core.names import expand_path
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import iterate_batches
from farout.data.indices import readable_indices
from farout.diffusion.noise import seeded_generator
from farout.synthesis.base import SynthesisContext
from farout.synthesis.class_space import class_conditioning
from farout.training.loop import TrainingConfig

__all__ = [
    "AlignedImages",
    "AlignmentConfig",
    "align_images",
    "has_aligned_images",
    "normalize_class_vectors",
    "read_aligned_images",
]

_FEATURES_FILE = "features.safetensors"
_MIN_DIRECTION_DISTANCE = 1e-5
_MIN_ACCURACY = 0.8


@dataclass(frozen=True)
class AlignmentConfig:
    """Training of the classifier on class vectors: SGD, Nesterov momentum 0.9, cosine decay to 1e-6.

    Args:
        temperature: temperature that divides the cosines; published: 0.1.
        steps: number of training updates.
        batch_size: images per update.
        learning_rate: peak learning rate.
        weight_decay: weight decay of all weights.
        warmup: updates of linear learning-rate warm-up.
        augmented: use features of augmented images, as the released code does; default: of the plain images.
        workers: number of data loading processes; 0: load in the training process.
    """

    temperature: float = 0.1
    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    warmup: int = 60
    augmented: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise FaroutError(f"the temperature of cosines must be a positive number, got {self.temperature}")
        self.training_config(0, Runtime(device="cpu", precision="fp32"))

    def training_config(self, seed: int, runtime: Runtime) -> TrainingConfig:
        """The settings of the training loop, with ten checkpoints, so that an interrupted run loses little."""
        return TrainingConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            optimizer="sgd",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            final_learning_rate=min(1e-6, self.learning_rate),
            ema=None,
            clip=None,
            precision=runtime.precision,
            seed=seed,
            workers=self.workers,
            checkpoint_every=max(1, self.steps // 10),
            device=runtime.device,
        )


@dataclass(frozen=True)
class AlignedImages:
    """Images as directions, in the order of the source.

    Attributes:
        index: indices of the images in the source, int64 (N,).
        labels: classes, int64 (N,).
        features: directions u of length 1, float32 (N, D).
        is_correct: whether the nearest class vector is that of the image's class, bool (N,).
    """

    index: Tensor
    labels: Tensor
    features: Tensor
    is_correct: Tensor


def normalize_class_vectors(vectors: Tensor, names: Sequence[str]) -> Tensor:
    """Class vectors (K, D) scaled to length 1.

    Raises FaroutError for a vector without a direction, and for two vectors with the same direction.
    """
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise FaroutError(f"{len(names)} classes require a vector each, got the shape {tuple(vectors.shape)}")
    if len(names) < 2:
        raise FaroutError(
            f"all images are of one class ({', '.join(names)}), and a classifier requires more than one: give "
            "images of two or more"
        )
    lengths = vectors.norm(dim=1)
    for name, length in zip(names, lengths.tolist(), strict=True):
        if not 0 < length < float("inf"):
            raise FaroutError(f"the class vector of {name!r} has no direction (its length is 0 or no number)")
    directions = vectors / lengths[:, None]
    # not by matrix multiplication, which cancels for vectors that are almost equal
    distances = torch.cdist(directions, directions, compute_mode="donot_use_mm_for_euclid_dist")
    equal = (distances < _MIN_DIRECTION_DISTANCE).triu(1).nonzero()
    if len(equal):
        first, second = (names[int(index)] for index in equal[0])
        raise FaroutError(
            f"the class vectors of {first!r} and {second!r} point the same way, so the generator hardly distinguishes "
            "these classes: train it for longer, or leave one of them out"
        )
    return directions


def align_images(
    context: SynthesisContext, folder: Path, model: ClassifierConfig, alignment: AlignmentConfig
) -> AlignedImages:
    """Train a classifier towards the generator's class vectors, and store the directions of the images.

    Continues from the files in `folder`: `training/` contains checkpoints until the training is finished,
    `classifier/` is its result, `features.safetensors` contains index, label, feature and is_correct. Warns if few
    images are nearest to the vector of their own class.

    Args:
        context: images, labels, generator, seed and runtime; always the same for one folder.
        folder: the folder of this stage.
        model: network and data augmentation.
        alignment: training of the classifier.

    Raises FaroutError for class vectors that no classifier can be trained towards, and if training diverges.
    """
    if not has_aligned_images(folder):
        classes = list(context.classes)
        class_vectors = class_conditioning(context.generator).class_vectors()[classes].cpu()
        directions = normalize_class_vectors(class_vectors, context.present_names)
        if not (folder / "classifier").is_dir():
            trained = train_on_source(
                context.source.subset(readable_indices(context.source)),
                model,
                alignment.training_config(context.seed, context.runtime),
                out=folder / "training",
                resume=True,
                class_names=context.present_names,
                # logits cos(z, e_k) / T
                directions=directions / alignment.temperature,
            )
            trained.save(folder / "classifier")
        shutil.rmtree(folder / "training", ignore_errors=True)
        classifier = Classifier.load(folder / "classifier").to(context.runtime.device)
        features, index = _compute_directions(classifier, context, model if alignment.augmented else None)
        nearest = torch.tensor(classes)[(features @ directions.mT).argmax(1)]
        labels = context.labels[index]
        tensors = {"index": index, "label": labels, "feature": features, "is_correct": nearest == labels}
        store.save_tensors(folder / _FEATURES_FILE, tensors)
    aligned = read_aligned_images(folder)
    accuracy = float(aligned.is_correct.float().mean())
    if accuracy < _MIN_ACCURACY:
        warnings.warn(
            f"only {accuracy:.0%} of the images are nearest to their own class's vector, expected at least "
            f"{_MIN_ACCURACY:.0%}: the boundaries are not those of the classes; train the alignment for longer "
            "(--alignment.steps), or a larger network (--model.network)",
            MisleadingResultWarning,
            stacklevel=2,
        )
    return aligned


def _compute_directions(
    classifier: Classifier, context: SynthesisContext, augmentation: ClassifierConfig | None
) -> tuple[Tensor, Tensor]:
    """Directions u = z / |z| (N, D) of the readable images, augmented if a config is given, and their indices (N,)."""
    preprocessing, runtime = classifier.preprocessing, context.runtime
    precision = cast("Precision", runtime.precision)  # the runtime is resolved, so not `auto`
    parts, index = list[Tensor](), list[int]()
    size = runtime.images_per_batch((preprocessing.channels, *preprocessing.size))
    with task(f"directions of {context.source.name}", len(context.source)) as bar:
        for batch in iterate_batches(context.source, preprocessing, size, workers=runtime.workers):
            if batch.keys:
                images = batch.images
                if augmentation is not None:
                    # the augmentation of an image depends on its content, not on the batch
                    pairs = zip(torch.split(images, 1), batch.identities, strict=True)
                    images = torch.cat(
                        [
                            augmentation.augment(image, seeded_generator(context.seed, "varied", key))
                            for image, key in pairs
                        ]
                    )
                outputs = classifier.outputs(images, runtime.batch_size, precision)
                parts.append(functional.normalize(outputs.features.cpu(), dim=1))
            index += batch.indices
            bar.advance(len(batch.keys))
    return torch.cat(parts), torch.tensor(index)


def has_aligned_images(folder: str | Path) -> bool:
    """Whether `align_images` has finished in this folder."""
    return (expand_path(folder) / _FEATURES_FILE).is_file()


def read_aligned_images(folder: str | Path) -> AlignedImages:
    """Read the result of `align_images`; raises StoreError if it is missing, cut short or something else."""
    tensors = store.load_tensors(expand_path(folder) / _FEATURES_FILE)
    if set(tensors) != {"index", "label", "feature", "is_correct"}:
        raise StoreError(f"{folder} contains no features of images; remove it and align them again")
    # the memory alignment of a mapped file changes the last bits of what is computed with its tensors
    return AlignedImages(*(tensors[name].clone() for name in ("index", "label", "feature", "is_correct")))
