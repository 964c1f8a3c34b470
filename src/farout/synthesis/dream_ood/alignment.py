"""Images as directions of a generator's class space: a classifier whose classes are the generator's own class vectors.

A network gives every image x of class y a vector z of the class space, trained by the cross-entropy of the logits
cos(z, e_k) / T, with the class vectors e_k fixed (Du, Sun, Zhu and Li, "Dream the impossible: outlier imagination with
diffusion models", NeurIPS 2023, arXiv 2309.13415, section 3.1). What is kept of an image is u = z / |z|.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from farout.classifiers.config import ClassifierConfig
from farout.classifiers.model import Classifier
from farout.classifiers.train import train_on
from farout.core import store
from farout.core.errors import FaroutError, StoreError, TrapWarning
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import Batch, batches
from farout.data.indices import readable
from farout.diffusion.noise import seeded_generator
from farout.synthesis.base import SynthesisContext
from farout.synthesis.class_space import class_conditioning
from farout.training.loop import TrainingConfig

__all__ = ["Aligned", "Alignment", "align", "check_directions", "has_aligned", "read_aligned"]

_CLASSIFIER, _TRAINING, _FEATURES = "classifier", "training", "features.safetensors"
_SAME = 1e-5
_LEAST = 0.8


@dataclass(frozen=True)
class Alignment:
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
        self.training(0, Runtime(device="cpu", precision="fp32"))

    def training(self, seed: int, runtime: Runtime) -> TrainingConfig:
        """For the loop of the house; ten checkpoints, so that little is lost where a run is killed."""
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
class Aligned:
    """Images as directions, in the order of their places in the source.

    Attributes:
        index: places in the source, int64 (N,).
        labels: classes, int64 (N,).
        features: of length 1, float32 (N, D).
        told: whether the nearest class vector is that of the image's class, bool (N,).
    """

    index: Tensor
    labels: Tensor
    features: Tensor
    told: Tensor


def check_directions(vectors: Tensor, names: Sequence[str]) -> Tensor:
    """Class vectors (K, D) at length 1; raises FaroutError where they point nowhere, or two of them the same way."""
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise FaroutError(f"{len(names)} classes require a vector each, got the shape {tuple(vectors.shape)}")
    if len(names) < 2:
        raise FaroutError(
            f"all images are of one class ({', '.join(names)}), and a classifier requires more than one: give "
            "images of two or more"
        )
    lengths = vectors.norm(dim=1)
    empty = [name for name, length in zip(names, lengths.tolist(), strict=True) if not 0 < length < float("inf")]
    if empty:
        raise FaroutError(f"the class vector of {empty[0]!r} has no direction (its length is 0 or no number)")
    directions = vectors / lengths[:, None]
    alike = (torch.cdist(directions, directions, compute_mode="donot_use_mm_for_euclid_dist") < _SAME).triu(1).nonzero()
    if len(alike):
        one, two = (names[int(place)] for place in alike[0])
        raise FaroutError(
            f"the class vectors of {one!r} and {two!r} point the same way, so the generator hardly distinguishes these "
            "classes: train it for longer, or leave one of them out"
        )
    return directions


def align(context: SynthesisContext, folder: Path, model: ClassifierConfig, alignment: Alignment) -> Aligned:
    """Trains a classifier towards the generator's class vectors, and keeps the directions that it gives the images.

    Goes on from what is in `folder`: `training/` holds checkpoints until the training is done, `classifier/` is its
    result, `features.safetensors` are index, label, feature and told. Warns where few images lie nearest to their own
    class's vector.

    Args:
        context: images, labels, generator, seed and runtime, always the same ones for one folder.
        folder: where all is kept.
        model: the network, and how images are varied.
        alignment: how it is trained.

    Raises FaroutError for class vectors that no classifier can be trained towards, and where training diverges.
    """
    if not has_aligned(folder):
        classes = list(context.classes)
        directions = check_directions(
            class_conditioning(context.generator).class_vectors()[classes].cpu(), context.present_names
        )
        classifier = _trained(
            context, directions / alignment.temperature, context.present_names, folder, model, alignment
        )
        features, index = _features(classifier, context, model if alignment.augmented else None)
        told = torch.tensor(classes)[(features @ directions.mT).argmax(1)] == context.labels[index]
        found = {"index": index, "label": context.labels[index], "feature": features, "told": told}
        store.save_tensors(folder / _FEATURES, found)
    aligned = read_aligned(folder)
    _warn_of_poor_alignment(float(aligned.told.float().mean()))
    return aligned


def _trained(
    context: SynthesisContext,
    directions: Tensor,
    names: Sequence[str],
    folder: Path,
    model: ClassifierConfig,
    alignment: Alignment,
) -> Classifier:
    """The classifier of the folder, trained first where it is not there."""
    if not (folder / _CLASSIFIER).is_dir():
        source, training = (
            context.source.subset(readable(context.source)),
            alignment.training(context.seed, context.runtime),
        )
        out = folder / _TRAINING
        made = train_on(source, model, training, out=out, resume=True, class_names=names, directions=directions)
        made.save(folder / _CLASSIFIER)
    shutil.rmtree(folder / _TRAINING, ignore_errors=True)
    return Classifier.load(folder / _CLASSIFIER).to(context.runtime.device)


def _features(
    classifier: Classifier, context: SynthesisContext, varied: ClassifierConfig | None
) -> tuple[Tensor, Tensor]:
    """Directions (N, D) of the readable images, varied by the config where one is given, and their places (N,)."""
    prepared, parts, index = classifier.preprocessing, list[Tensor](), list[int]()
    size = context.runtime.images_per_batch((prepared.channels, *prepared.size))
    with task(f"directions of {context.source.name}", len(context.source)) as bar:
        for batch in batches(context.source, prepared, size, workers=context.runtime.workers):
            if batch.keys:
                images = batch.images if varied is None else _varied(batch, varied, context.seed)
                outputs = classifier.outputs(images, context.runtime.batch_size, context.runtime.precision)
                parts.append(functional.normalize(outputs.features.cpu(), dim=1))
            index += batch.indices
            bar.advance(len(batch.keys))
    return torch.cat(parts), torch.tensor(index)


def _varied(batch: Batch, config: ClassifierConfig, seed: int) -> Tensor:
    """Each image varied by a draw of its own, whatever else is in the batch."""
    pairs = zip(batch.images.split(1), batch.identities, strict=True)
    return torch.cat([config.augment(image, seeded_generator(seed, "varied", key)) for image, key in pairs])


def _warn_of_poor_alignment(share: float) -> None:
    if share < _LEAST:
        warnings.warn(
            f"only {share:.0%} of the images are nearest to their own class's vector, expected at least {_LEAST:.0%}: "
            "the boundaries are not those of the classes; train the alignment for longer (--alignment.steps), or a "
            "larger network (--model.network)",
            TrapWarning,
            stacklevel=3,
        )


def has_aligned(folder: str | Path) -> bool:
    """Whether `align` is done there."""
    return (Path(folder) / _FEATURES).is_file()


def read_aligned(folder: str | Path) -> Aligned:
    """What `align` has left; raises StoreError where that is missing, cut short or something else."""
    found = store.load_tensors(Path(folder) / _FEATURES)
    if set(found) != {"index", "label", "feature", "told"}:
        raise StoreError(f"{folder} holds no features of images; remove it and align them again")
    # where a file's numbers lie in memory changes the last bits of what is computed with them
    return Aligned(*(found[name].clone() for name in ("index", "label", "feature", "told")))
