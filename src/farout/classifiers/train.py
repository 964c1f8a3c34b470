"""Training a classifier on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from farout.classifiers.config import ClassifierConfig
from farout.classifiers.initial_weights import FRESH, Origin, start_from
from farout.classifiers.model import KIND, Classifier
from farout.classifiers.outlier_exposure import Exposed, Exposure, Outside, known_classes
from farout.classifiers.outlier_images import open_outliers, originals, read_made_of
from farout.classifiers.presets import PRESETS
from farout.core import store
from farout.core.devices import Precision, is_main_process, resolve_precision
from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import PreparedImages, batches
from farout.data.classes import (
    LabelledImages,
    check_no_class_is_empty,
    class_names_of,
    class_numbers,
    labelled_fingerprint,
)
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.data.splits import learnt_and_validating, log_split, split
from farout.training.checkpoints import discard_checkpoints, training_folder
from farout.training.loop import Step, TrainingConfig, train

__all__ = ["PRESETS", "ClassifierConfig", "accuracy_on", "train_classifier", "train_on"]


def train_on(
    source: ImageSource,
    config: ClassifierConfig,
    training: TrainingConfig,
    *,
    out: Path | None = None,
    resume: bool = False,
    class_names: Sequence[str] | None = None,
    weights: str | None = None,
    outside: Outside = Outside(),  # noqa: B008
    directions: Tensor | None = None,
) -> Classifier:
    """Trains a classifier on all of `source`; the last twentieth of the images, by hash, validates (by cross-entropy
    alone) where `training.validate_every` is set.

    Args:
        source: images with labels.
        config: what is trained.
        training: how; its seed is also that of the fresh weights.
        out: folder of the checkpoints; None: none are kept.
        resume: go on from the last checkpoint there.
        class_names: of all classes; None: those that occur in `source`, in the order of their labels.
        weights: to start from, see `start_from`; None: fresh ones. What those of a farout classifier have seen counts
            as seen; of others `provenance["weights"]` says that it is not known.
        outside: what it learns from beside them: outliers, which do not count as seen, and reconstructions of images
            of `source`, which do.
        directions: fixed directions (K, D) that tell the classes apart, see `ClassifierConfig.build`.

    Raises FaroutError where there are no labels, one class, a class without images, outliers that are among the images,
    or another number of directions; StoreError for weights that do not fit.
    """
    names = class_names_of(source) if class_names is None else class_names
    numbers = class_numbers(source, names)
    check_no_class_is_empty(numbers, names)
    classifier, origin = _start(source, config, (*names, *outside.classes), weights, training.seed, directions)
    outside.exposure.warn_of_short(numbers, training.steps * training.batch_size)
    hashes = [source.content_hash(i) for i in range(len(source))]
    labelled = LabelledImages(PreparedImages(source, classifier.preprocessing), numbers)
    learning, validation = learnt_and_validating(labelled, hashes, validate=training.validate_every > 0)
    keys = [source.keys[i] for i in (learning.indices if isinstance(learning, Subset) else range(len(source)))]
    told = outside.told()
    begun = "" if origin == FRESH else f" {origin.weights} {origin.classifier}"
    fixed = "" if directions is None else f" {store.hash_tensors({'directions': directions})}"
    result = train(
        outside.learner(classifier.module, classifier.head_name, config.loss(), training),
        _step(classifier, config),
        outside.beside(learning, names, hashes, classifier.preprocessing, training.seed, keys),
        training,
        out=out,
        validation=validation,
        resume=resume,
        fingerprint=f"{labelled_fingerprint(source, names, numbers)} {asdict(config)}{begun}{fixed}"
        + (f" {told}" if told else ""),
    )
    classifier.trained_on = origin.seen.union(hashes, outside.seen())
    classifier.provenance = {
        **{"source": source.name, "data_fingerprint": source.fingerprint(), "images": len(hashes)},
        **{"steps": result.steps, "training_accuracy": result.losses.get("accuracy"), "seed": training.seed},
        **{**origin.told(), **told, "model": asdict(config), "training": asdict(training)},
    }
    return classifier


def _step(classifier: Classifier, config: ClassifierConfig) -> Step:
    """From images, class numbers and maybe outliers to losses; all images are varied alike."""
    loss = config.loss()

    def step(network: nn.Module, batch: list[Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        images, targets, *outliers = batch
        images = torch.cat([images, *outliers])
        varied = classifier.normalise(config.augment(images, generator) if network.training else images)
        if isinstance(network, Exposed):
            return network.losses(varied, targets, generator)
        return loss(network(varied), targets)

    return step


def _start(
    source: ImageSource,
    config: ClassifierConfig,
    class_names: Sequence[str],
    weights: str | None,
    seed: int,
    directions: Tensor | None = None,
) -> tuple[Classifier, Origin]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = config.build(source, class_names, directions)
    return classifier, FRESH if weights is None else start_from(classifier.module, weights, config.network)


def accuracy_on(classifier: Classifier, source: ImageSource, precision: Precision = "fp32") -> float:
    """The share of a source's readable images whose class the classifier tells; raises FaroutError where there are no
    labels, other classes than the classifier's, or no image that can be read.
    """
    numbers, hits = class_numbers(source, classifier.class_names[: known_classes(classifier)]), list[bool]()
    with task(f"accuracy on images of {source.name}", len(source)) as bar:
        prepared = classifier.preprocessing
        size = Runtime(str(classifier.device)).images_per_batch((prepared.channels, *prepared.size))
        for batch in batches(source, prepared, size):
            if batch.keys:
                predicted = classifier.outputs(batch.images, precision=precision).logits.argmax(1).cpu()
                hits += (predicted == numbers[list(batch.indices)]).tolist()
            bar.advance(len(batch.keys))
    if not hits:
        raise FaroutError(f"{source.name} has no readable image to measure the accuracy on")
    return sum(hits) / len(hits)


def train_classifier(
    source: Any,
    out: str | Path,
    *,
    model: ClassifierConfig = ClassifierConfig(),  # noqa: B008
    training: TrainingConfig = TrainingConfig(),  # noqa: B008
    exposure: Exposure = Exposure(),  # noqa: B008
    outliers: str | None = None,
    reconstructions: str | None = None,
    weights: str | None = None,
    keep_weights: bool = False,
    limit: int | None = None,
    alpha: float = 0.05,
    statistics: int = 400,
    groups: Literal["none", "folder"] = "none",
    policy: Literal["raise", "skip"] = "raise",
    seed: int = 0,
    resume: bool = False,
) -> Classifier:
    """Train a classifier on labelled images.

    A part of the images is held out, by content hash, just as `train_diffusion` does: a later `farout fit` with this
    classifier and the same source and seed rests its statistics and p-values on them. The accuracy on them is measured
    and kept in the folder's provenance: as `held_out_accuracy`, or where the weights may have seen some of them, as
    `possibly_seen_accuracy`.

    Args:
        source: labelled images: a named set, a folder with one folder per class, a table, or hf://owner/name:split.
        out: folder of the classifier; checkpoints are in OUT.training while training runs, and stay there with
            `training.checkpoint_every`, `training.keep` or `training.tensorboard`.
        model: settings of the classifier.
        training: settings of the training.
        exposure: settings of outlier exposure.
        outliers: images for outlier exposure: a folder written by `farout synthesize`, or any image source; labels are
            ignored.
        reconstructions: labelled reconstructions of the training images, which replace part of them so that generator
            artifacts do not mark outliers: a folder written by `farout reconstruct` or by `farout synthesize …
            --reconstructions`, or any image source. Those of held-out images are left out.
        weights: initial weights: a file (such as an OpenOOD checkpoint) or the folder of a classifier, whose training
            images then count as seen; default: random.
        keep_weights: do not train: save the given weights as a classifier of the source's classes; requires model.mean
            and model.std of their training.
        limit: use a seeded random sample of this many images; default: all.
        alpha: hold out enough images for a later calibration at this false-alarm rate.
        statistics: number of images to hold out for the statistics of a later fit.
        groups: `folder`: keep images of one folder in the same part of the split.
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        seed: seed of the sample, split, weights and augmentation.
        resume: continue training from the last checkpoint.

    Raises FaroutError where there are no labels, one class, or a class of which no image is left to train on, for
    kept weights without mean and std, and where loss, its settings and outliers do not go together; StoreError for
    weights that do not fit.
    """
    store.check_replaceable(out, KIND)
    exposure.resolved(outliers is not None, reconstructions is not None)
    if keep_weights:
        _check_keeping(weights, model, exposure, outliers or reconstructions)
    outside = _open_outside(exposure, outliers, reconstructions, policy, seed)
    images = open_source(source, limit=limit, seed=seed, policy=policy)
    names = class_names_of(images)
    parts = split(images, alpha=alpha, statistics=statistics, train=True, seed=seed, groups=groups)
    log_split(images, parts)
    settings = replace(training, seed=seed)
    folder = training_folder(out)
    learning = images.subset(parts.training)
    held = images.subset(sorted([*parts.statistics, *parts.calibration]))
    if keep_weights:
        trained, origin = _start(learning, model, names, weights, seed)
        trained.trained_on, trained.provenance = origin.seen, {"source": images.name, **origin.told()}
    else:
        again, behind = _not_of(outside.reconstructions, reconstructions, held)
        outer, before = _not_of(outside.outliers, outliers, held)
        outside = replace(outside, outliers=outer, reconstructions=again)
        trained = train_on(
            learning, model, settings, out=folder, resume=resume, class_names=names, weights=weights, outside=outside
        )
        trained.trained_on |= behind | before
    if is_main_process():
        _rate(trained, held, resolve_precision(training.precision, trained.device))
        trained.save(out)
        discard_checkpoints(folder, settings)
    return trained


def _open_outside(
    exposure: Exposure, outliers: str | None, reconstructions: str | None, policy: Literal["raise", "skip"], seed: int
) -> Outside:
    outer = None if outliers is None else open_outliers(outliers, limit=exposure.limit, seed=seed, policy=policy)
    made_of = read_made_of(outliers) if exposure.paired and outliers is not None else {}
    again = None if reconstructions is None else open_outliers(reconstructions, policy=policy, kind="reconstructions")
    return Outside(exposure, outer, again, made_of)


def _not_of(
    made: ImageSource | None, given: str | None, held: ImageSource
) -> tuple[ImageSource | None, frozenset[str]]:
    """What a generator has made of images that are not held out, and the content hashes of those images, as far as
    known: who learns what came of an image has seen it.
    """
    if made is None or given is None:
        return None, frozenset()
    known = originals(given, made)
    if not any(known):
        return made, frozenset()
    apart = frozenset(held.content_hashes())
    kept = [place for place, original in enumerate(known) if original is None or original not in apart]
    if not kept:
        raise FaroutError(
            f"all {len(made)} images of {made.name} were made from held-out images; generate some from other images"
        )
    return made.subset(kept), frozenset(filter(None, (known[place] for place in kept)))


def _check_keeping(weights: str | None, model: ClassifierConfig, exposure: Exposure, outside: str | None) -> None:
    if outside is not None or exposure.loss not in (None, "cross_entropy"):
        given = outside or f"the loss {exposure.loss}"
        raise FaroutError(
            f"kept weights are not trained, so {given} has no effect; leave it out, or leave out keep_weights"
        )
    if weights is None:
        raise FaroutError("keep_weights requires weights to keep; give a file of weights")
    if model.mean is None:  # and so std, they go together
        raise FaroutError(
            "kept weights require the mean and std that they were trained with, which the images do not determine; "
            "give "
            "model.mean and model.std (--model.mean 0.49 0.48 0.45 --model.std 0.25 0.24 0.26, one number a channel)"
        )


def _rate(classifier: Classifier, held: ImageSource, precision: Precision) -> None:
    """Puts the accuracy on images that training left out into the provenance, under a name that says whether the
    weights had seen them before.
    """
    origin = Origin(classifier.trained_on, classifier.provenance["weights"])
    hashes = [content for content in held.content_hashes() if content is not None]
    kind = "possibly_seen" if origin.may_have_seen(hashes) else "held_out"
    classifier.provenance[f"{kind}_accuracy"] = round(accuracy_on(classifier, held, precision), 5)
    classifier.provenance[f"{kind}_images"] = len(held)
