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
from farout.classifiers.initial_weights import RANDOM_WEIGHTS, WeightsOrigin, load_initial_weights
from farout.classifiers.model import KIND, Classifier
from farout.classifiers.outlier_exposure import ExposedNetwork, Exposure, ExposureData, count_known_classes
from farout.classifiers.outlier_images import open_outliers, read_source_hashes, read_source_keys
from farout.classifiers.presets import PRESETS
from farout.core import store
from farout.core.devices import Precision, is_main_process, resolve_precision
from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import PreparedImages, iterate_batches
from farout.data.classes import (
    LabelledImages,
    check_no_class_is_empty,
    class_names_of,
    encode_classes,
    labelled_fingerprint,
)
from farout.data.image_source import ImageSource
from farout.data.normal_images import check_one_set
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.sources import open_source
from farout.data.splits import log_split, split_off_validation, split_source
from farout.training.checkpoints import discard_checkpoints, training_folder
from farout.training.loop import TrainingConfig, train

__all__ = ["PRESETS", "ClassifierConfig", "measure_accuracy", "train_classifier", "train_on_source"]


def train_on_source(
    source: ImageSource,
    config: ClassifierConfig,
    training: TrainingConfig,
    *,
    out: Path | None = None,
    resume: bool = False,
    class_names: Sequence[str] | None = None,
    weights: str | None = None,
    exposure_data: ExposureData = ExposureData(),  # noqa: B008
    directions: Tensor | None = None,
) -> Classifier:
    """Train a classifier on all images of `source`.

    If `training.validate_every` is set, the last twentieth of the images, by hash, is the validation set, and the
    validation loss is the cross-entropy.

    Args:
        source: labelled images.
        config: settings of the classifier.
        training: settings of the training; its seed is also that of the initial weights.
        out: folder of the checkpoints; None: no checkpoints.
        resume: continue from the newest checkpoint in `out`.
        class_names: names of all classes; None: those of `source`, in the order of their labels.
        weights: initial weights, see `load_initial_weights`; None: random. The training images of a farout classifier
            count as seen; for other weights, `provenance["weights"]` says that they are unknown.
        exposure_data: settings of outlier exposure, outliers (which do not count as seen) and reconstructions of images
            of `source` (which do).
        directions: fixed directions (K, D) of the classes, see `ClassifierConfig.build`.

    Raises:
        FaroutError: for images without labels, a single class, a class without images, outliers that are among the
            images, or a wrong number of directions.
        StoreError: for weights that do not fit.
    """
    names = class_names_of(source) if class_names is None else class_names
    labels = encode_classes(source, names)
    check_no_class_is_empty(labels, names)
    all_names = (*names, *exposure_data.added_classes)
    classifier, origin = _build_classifier(source, config, all_names, weights, training.seed, directions)
    exposure_data.exposure.warn_of_short_training(labels, training.steps * training.batch_size)

    hashes = [source.content_hash(i) for i in range(len(source))]
    dataset = LabelledImages(PreparedImages(source, classifier.preprocessing), labels)
    training_set, validation_set = split_off_validation(dataset, hashes, validate=training.validate_every > 0)
    indices = training_set.indices if isinstance(training_set, Subset) else range(len(source))
    keys = [source.keys[i] for i in indices]

    # The fingerprint identifies everything that decides what is learned: a run resumes with the same only.
    exposure_provenance = exposure_data.to_provenance()
    fingerprint = [labelled_fingerprint(source, names, labels), str(asdict(config))]
    if origin != RANDOM_WEIGHTS:
        fingerprint.append(f"{origin.weights} {origin.classifier}")
    if directions is not None:
        fingerprint.append(store.hash_tensors({"directions": directions}))
    if exposure_provenance:
        fingerprint.append(str(exposure_provenance))

    loss = config.loss()

    def step(network: nn.Module, batch: list[Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        images, targets, *outliers = batch
        images = torch.cat([images, *outliers])  # all are augmented in the same way
        if network.training:
            images = config.augment(images, generator)
        images = classifier.normalize(images)
        if isinstance(network, ExposedNetwork):
            return network.losses(images, targets, generator)
        return loss(network(images), targets)

    result = train(
        exposure_data.wrap_network(classifier.module, classifier.head_name, loss, training),
        step,
        exposure_data.combine_with(training_set, names, hashes, classifier.preprocessing, training.seed, keys),
        training,
        out=out,
        validation=validation_set,
        resume=resume,
        fingerprint=" ".join(fingerprint),
    )
    classifier.trained_on = origin.trained_on.union(hashes, exposure_data.reconstruction_hashes())
    classifier.provenance = {
        "source": source.name,
        "data_fingerprint": source.fingerprint(),
        "images": len(hashes),
        "steps": result.steps,
        "training_accuracy": result.losses.get("accuracy"),
        "seed": training.seed,
        **origin.to_provenance(),
        **exposure_provenance,
        "model": asdict(config),
        "training": asdict(training),
    }
    return classifier


def _build_classifier(
    source: ImageSource,
    config: ClassifierConfig,
    class_names: Sequence[str],
    weights: str | None,
    seed: int,
    directions: Tensor | None = None,
) -> tuple[Classifier, WeightsOrigin]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = config.build(source, class_names, directions)
    if weights is None:
        return classifier, RANDOM_WEIGHTS
    origin = load_initial_weights(
        classifier.module, weights, config.network, reduced_decoding=classifier.preprocessing.reduced_decoding
    )
    return classifier, origin


def measure_accuracy(classifier: Classifier, source: ImageSource, precision: Precision = "fp32") -> float:
    """The share of a source's readable images that are classified correctly.

    Raises:
        FaroutError: for images without labels or of other classes, and if no image can be read.
    """
    labels = encode_classes(source, classifier.class_names[: count_known_classes(classifier)])
    is_correct: list[bool] = []
    preprocessing = classifier.preprocessing
    batch_size = Runtime(str(classifier.device)).images_per_batch((preprocessing.channels, *preprocessing.size))
    with task(f"accuracy on {source.name}", len(source)) as bar:
        for batch in iterate_batches(source, preprocessing, batch_size):
            if batch.keys:
                predicted = classifier.outputs(batch.images, precision=precision).logits.argmax(1).cpu()
                is_correct += (predicted == labels[list(batch.indices)]).tolist()
            bar.advance(len(batch.keys))
    if not is_correct:
        raise FaroutError(f"{source.name} has no readable image to measure the accuracy on")
    return sum(is_correct) / len(is_correct)


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
    groups: Literal["near_copies", "folder", "none"] = "near_copies",
    policy: Literal["raise", "skip"] = "raise",
    reading: ReadSettings = DEFAULT_READING,
    seed: int = 0,
    resume: bool = False,
) -> Classifier:
    """Train a classifier on labelled images.

    A part of the images is held out, by content hash, as in `train_diffusion`: a later `farout fit` with this
    classifier and the same source and seed uses them for its statistics and p-values. The accuracy on them is measured
    and kept in the folder's provenance: as `held_out_accuracy`, or if the weights may have seen some of them, as
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
        statistics: number of images to hold out for the statistics of a later fit; at most as many as are trained on.
        groups: images that stay in the same part of the split: `near_copies` (bursts, video frames, recompressed,
            shifted or mirrored images), `folder` (these, and all images of one folder or value of the column `group`),
            or `none` (equal images only).
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        reading: how image files are read.
        seed: seed of the sample, split, weights and augmentation.
        resume: continue training from the last checkpoint.

    Raises:
        FaroutError: for images without labels, a single class, a class without training images, kept weights without
            mean and std, and a loss, settings and outliers that do not go together.
        StoreError: for weights that do not fit.
    """
    store.check_replaceable(out, KIND)
    exposure.resolve_defaults(outliers is not None, reconstructions is not None)
    if keep_weights:
        _check_kept_weights(weights, model, exposure, outliers or reconstructions)
    exposure_data = ExposureData(
        exposure,
        outliers=None if outliers is None else open_outliers(outliers, limit=exposure.limit, seed=seed, policy=policy),
        reconstructions=None
        if reconstructions is None
        else open_outliers(reconstructions, policy=policy, kind="reconstructions"),
        source_keys=read_source_keys(outliers) if exposure.paired and outliers is not None else {},
    )
    images = open_source(source, limit=limit, seed=seed, policy=policy, reading=reading)
    if outliers is not None or reconstructions is not None:
        # they are compared with the images by hashes of pixels, and prepared from native pixels
        model = replace(model, reduced_decoding=False)
    images = images.with_reduced_decoding(model.reduced_decoding)
    check_one_set(images)
    class_names = class_names_of(images)
    parts = split_source(images, alpha=alpha, statistics=statistics, train=True, seed=seed, groups=groups)
    log_split(images, parts)
    images.warn_about_reading()
    settings = replace(training, seed=seed)
    folder = training_folder(out)
    training_images = images.subset(parts.training)
    held_out = images.subset(sorted([*parts.statistics, *parts.calibration]))
    if keep_weights:
        trained, origin = _build_classifier(training_images, model, class_names, weights, seed)
        trained.trained_on, trained.provenance = origin.trained_on, {"source": images.name, **origin.to_provenance()}
    else:
        used_outliers, outlier_sources = _without_held_out(exposure_data.outliers, outliers, held_out)
        used_reconstructions, reconstruction_sources = _without_held_out(
            exposure_data.reconstructions, reconstructions, held_out
        )
        trained = train_on_source(
            training_images,
            model,
            settings,
            out=folder,
            resume=resume,
            class_names=class_names,
            weights=weights,
            exposure_data=replace(exposure_data, outliers=used_outliers, reconstructions=used_reconstructions),
        )
        trained.trained_on |= outlier_sources | reconstruction_sources
    if is_main_process():
        # The name says whether the weights may have seen the images before the training.
        origin = WeightsOrigin(trained.trained_on, trained.provenance["weights"])
        hashes = [content for content in held_out.content_hashes() if content is not None]
        prefix = "possibly_seen" if origin.may_have_seen(hashes) else "held_out"
        accuracy = measure_accuracy(trained, held_out, resolve_precision(training.precision, trained.device))
        trained.provenance[f"{prefix}_accuracy"] = round(accuracy, 5)
        trained.provenance[f"{prefix}_images"] = len(held_out)
        trained.save(out)
        discard_checkpoints(folder, settings)
    return trained


def _without_held_out(
    synthetic: ImageSource | None, given: str | None, held_out: ImageSource
) -> tuple[ImageSource | None, frozenset[str]]:
    """The synthetic images that were not generated from held-out images.

    The second result are the content hashes of the images that they were generated from, if known: a classifier that is
    trained on a synthetic image has seen its source image.
    """
    if synthetic is None or given is None:
        return None, frozenset()
    source_hashes = read_source_hashes(given, synthetic)
    if not any(source_hashes):
        return synthetic, frozenset()
    held_out_hashes = frozenset(held_out.content_hashes())
    kept = [i for i, content in enumerate(source_hashes) if content is None or content not in held_out_hashes]
    if not kept:
        raise FaroutError(
            f"all {len(synthetic)} images of {synthetic.name} were generated from held-out images; generate some "
            "from other images"
        )
    kept_hashes = [source_hashes[i] for i in kept]
    return synthetic.subset(kept), frozenset(content for content in kept_hashes if content)


def _check_kept_weights(weights: str | None, model: ClassifierConfig, exposure: Exposure, outliers: str | None) -> None:
    if outliers is not None or exposure.loss not in (None, "cross_entropy"):
        given = outliers or f"the loss {exposure.loss}"
        raise FaroutError(
            f"kept weights are not trained, so {given} has no effect; leave it out, or leave out keep_weights"
        )
    if weights is None:
        raise FaroutError("keep_weights requires weights to keep; give a file of weights")
    if model.mean is None:  # then std is None, too
        raise FaroutError(
            "kept weights require the mean and std that they were trained with, which the images do not determine; "
            "give model.mean and model.std (--model.mean 0.49 0.48 0.45 --model.std 0.25 0.24 0.26, one number a "
            "channel)"
        )
