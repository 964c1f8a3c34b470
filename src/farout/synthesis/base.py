"""The interface of synthesizers: labelled images and a generator in, a folder of synthetic outliers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.core import store
from farout.core.chunking import blocks_containing
from farout.core.config import Configured, flatten_config
from farout.core.devices import join_processes
from farout.core.errors import FaroutError, SourceError
from farout.core.names import expand_path
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.classes import encode_classes, present_class_names
from farout.data.image_source import ImageSource
from farout.data.indices import require_readable_indices
from farout.data.sources import open_source
from farout.diffusion.model import DiffusionModel
from farout.synthesis import SYNTHESIZERS
from farout.synthesis.declarations import SynthesisRequirements
from farout.synthesis.generated_folder import GeneratedFolder, OutlierFolder, ReconstructedFolder, read_outliers
from farout.synthesis.leakage import warn_about_extra_classes
from farout.synthesis.writer import ImageWriter

__all__ = [
    "GeneratedFolder",
    "OutlierFolder",
    "ReconstructedImages",
    "SynthesisContext",
    "Synthesizer",
    "SyntheticImages",
    "describe_inputs",
    "read_outliers",
]

RECONSTRUCTIONS = "reconstructions"
"""Sub-folder of a folder of outliers for the reconstructions of their source images."""

T = TypeVar("T")


@dataclass(frozen=True)
class SynthesisContext:
    """The inputs of one call of `Synthesizer.synthesize`, passed to every hook.

    Attributes:
        source: the in-distribution images.
        labels: the class of each image as an index into `class_names`, int64 (N,).
        class_names: names of all classes that the generator knows.
        folder: the output folder; each stage stores its files in a sub-folder of its own.
        count: number of outliers; outlier `index` depends on (seed, index), not on `count`.
        seed: seed of all random numbers.
        runtime: device, precision and batch size, resolved.
        diffusion: the generator, if the method needs one.
        classifier: the classifier, if one is given.
        cache: objects built by `cached`, by name.
    """

    source: ImageSource
    labels: Tensor
    class_names: tuple[str, ...]
    folder: Path
    count: int
    seed: int
    runtime: Runtime
    diffusion: DiffusionModel | None = None
    classifier: Classifier | None = None
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def create(
        cls,
        source: ImageSource,
        folder: Path,
        count: int,
        seed: int,
        runtime: Runtime,
        diffusion: DiffusionModel | None = None,
        classifier: Classifier | None = None,
    ) -> SynthesisContext:
        """Creates a context with the classes of the generator, or of the images without a class-conditional generator.

        Raises SourceError for images without labels or of a class that the generator does not know.
        """
        conditioning = None if diffusion is None else diffusion.conditioning
        names = present_class_names(source) if conditioning is None else conditioning.class_names
        labels = encode_classes(source, names)
        return cls(source, labels, names, folder, count, seed, runtime, diffusion, classifier)

    def cached(self, name: str, build: Callable[[], T]) -> T:
        """Return the object called `name`, which is built by `build` at the first call."""
        if name not in self.cache:
            self.cache[name] = build()
        found: T = self.cache[name]
        return found

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """The classes that have images, in increasing order."""
        return tuple(sorted(set(self.labels.tolist())))

    @property
    def present_names(self) -> list[str]:
        """Names of the classes that have images, in the order of `classes`."""
        return [self.class_names[label] for label in self.classes]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the generator's images; without a generator, of the first readable source image."""
        if self.diffusion is None:
            return tuple(self.source[require_readable_indices(self.source)[0]].shape)
        preprocessing = self.diffusion.preprocessing
        return (preprocessing.channels, *preprocessing.size)

    @property
    def generator(self) -> DiffusionModel:
        """The diffusion model; raises FaroutError if there is none."""
        if self.diffusion is None:
            raise FaroutError("this synthesizer requires a diffusion model; give diffusion=FOLDER or a model")
        return self.diffusion


@dataclass(frozen=True)
class ReconstructedImages:
    """Reconstructions of the source images of some outliers of a batch.

    Attributes:
        rows: the rows of the batch whose source images are reconstructed.
        images: (R, C, H, W) in [0, 1].
        columns: additional manifest columns, one value per reconstruction.
    """

    rows: Sequence[int]
    images: Tensor
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class SyntheticImages:
    """A batch of synthetic outliers.

    Attributes:
        images: (B, C, H, W) in [0, 1].
        sources: key of the source image of each outlier; empty for an outlier that was not edited from an image.
        columns: additional manifest columns, one value per outlier.
        extra_images: additional images (C, H, W) in [0, 1] of some outliers, by the name of their sub-folder.
        reconstructions: reconstructions of the source images, if requested.
    """

    images: Tensor
    sources: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    extra_images: Mapping[str, Sequence[Tensor | None]] = field(default_factory=dict)
    reconstructions: ReconstructedImages | None = None


class Synthesizer(Configured, ABC):
    """A method that generates synthetic outliers. The arguments of the constructor are its configuration.

    A method implements `generate` and sets `requirements`. A method that works in several stages lists them in
    `stages` and implements `run_stage` for all stages but the last one, which generates the images.
    """

    requirements: SynthesisRequirements = SynthesisRequirements()
    """The networks that are required; the settings of an instance may require more."""
    stages: ClassVar[tuple[str, ...]] = ("images",)
    """Names of the stages in their order; the last one generates the images."""
    test_arguments: ClassVar[Mapping[str, Any]] = {}
    """Arguments with which the method runs in seconds on tiny untrained networks, for the contract tests."""

    # -- what a method implements --------------------------------------------------------------------------------

    @abstractmethod
    def generate(self, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]) -> SyntheticImages:
        """Generate the outliers `indices` of the classes `labels`.

        Each outlier depends only on its index, its class and the seed, not on the other outliers of the batch.
        """

    def load_diffusion(self, given: DiffusionModel | str | Path, source: ImageSource) -> DiffusionModel:
        """Load the diffusion model; a method may configure it with the class names of `source`."""
        return DiffusionModel.load(given) if isinstance(given, str | Path) else given

    def check(self, context: SynthesisContext) -> None:
        """Raise FaroutError for inputs that cannot work; called before anything is written."""

    def warn_about_generator(self, context: SynthesisContext) -> None:
        """Warn about a poor generator; called once, after the folder is opened and before the first stage."""

    def run_stage(self, context: SynthesisContext, stage: str) -> None:
        """Run a stage before the last one: continue from its files in `context.folder`, if there are any."""
        raise FaroutError(
            f"{type(self).__name__} lists the stage {stage!r} but does not implement `run_stage`; implement it, or "
            "remove the stage from `stages`"
        )

    def image_shape(self, context: SynthesisContext) -> tuple[int, ...]:
        """(C, H, W) of the generated images."""
        return context.image_shape

    def label_of(self, context: SynthesisContext, index: int) -> int:
        """The class of outlier `index`; by default the classes that have images alternate."""
        return context.classes[index % len(context.classes)]

    def num_reconstructions(self, context: SynthesisContext) -> int:
        """The number of outliers, from the first one, whose source images `generate` also reconstructs."""
        return 0

    def image_settings(self, context: SynthesisContext) -> dict[str, Any]:
        """Everything that determines the images: a resumed run must have the same values."""
        try:
            name = SYNTHESIZERS.name_of(type(self))
        except FaroutError:  # a class that is not registered
            name = type(self).__name__
        # a classifier that only checks the generator does not change the images
        uses_classifier = context.classifier is not None and self.requirements.classifier
        return {
            "method": name,
            "config": flatten_config(self.config),
            "seed": context.seed,
            **describe_inputs(context.source, context.labels, context.diffusion, context.runtime),
            "classifier": context.classifier.content_hash if context.classifier and uses_classifier else None,
        }

    # -- what every synthesizer does -----------------------------------------------------------------------------

    def synthesize(
        self,
        images: Any,
        out: str | Path,
        *,
        count: int = 1000,
        diffusion: DiffusionModel | str | Path | None = None,
        classifier: Classifier | str | Path | None = None,
        seed: int = 0,
        resume: bool = False,
        stage: str | None = None,
        limit: int | None = None,
        policy: Literal["raise", "skip"] = "raise",
        runtime: Runtime | None = None,
    ) -> OutlierFolder:
        """Generate the outliers 0 to count - 1 into `out`, the same for any batch size and number of processes.

        Under `accelerate launch` or `torchrun`, several processes with one device each share the images of the last
        stage; the first process runs the earlier stages alone.

        Args:
            images: labelled in-distribution images, any source.
            out: the output folder; see `OutlierFolder`.
            count: number of outliers over all classes.
            diffusion: a `DiffusionModel` or its folder, for methods that need one. Methods that need classes also
                accept original Stable Diffusion folders.
            classifier: a `Classifier` or its folder, trained independently of the diffusion model. Some methods require
                it; otherwise it checks whether the generator's own samples show their classes.
            seed: seed of all random numbers.
            resume: continue an earlier run in `out`; a larger count adds images.
            stage: the last of the method's `stages` to run; None: all.
            limit: use a seeded sample of this many images of the source.
            policy: treatment of unreadable images: raise an error, or skip them.
            runtime: device, precision and batch size; None: `Runtime()`.

        Raises:
            FaroutError: for images, networks and settings that do not fit together.
            SourceError: for images without labels or of a class that the generator does not know.
            StoreError: if `out` contains other files, contains outliers and `resume` is not set, or contains outliers
                that were generated with other settings, which the message lists.
        """
        if count < 1:
            raise FaroutError(f"count must be at least 1, got {count}")
        if stage is not None and stage not in self.stages:
            raise FaroutError(f"{type(self).__name__} has no stage {stage!r}; it has {', '.join(self.stages)}")
        stages = self.stages if stage is None else self.stages[: self.stages.index(stage) + 1]
        source = open_source(images, policy=policy, limit=limit, seed=seed, require_range=diffusion is None)
        runtime = (runtime or Runtime()).resolve_auto()
        processes = join_processes(runtime.device)
        if source.labels is None:
            raise SourceError(
                f"{source.name} has no labels, and outliers are generated class by class; give a class-per-folder tree "
                "or a table with labels"
            )
        model = None if diffusion is None else self.load_diffusion(diffusion, source)
        if model is not None:
            source = source.with_value_range(model.preprocessing.value_range)
        networks = self._check_networks(model, classifier, runtime.device)
        context = SynthesisContext.create(source, expand_path(out), count, seed, runtime, *networks)
        self.check(context)
        warn_about_extra_classes(source, context.diffusion, context.classifier)

        writer = ImageWriter(out, context.class_names, seed, OutlierFolder.kind, processes)
        reconstruction_writer = ImageWriter(
            expand_path(out) / RECONSTRUCTIONS, context.class_names, seed, ReconstructedFolder.kind, processes
        )
        about = {
            "source": source.name,
            "images": len(source),
            "class_names": list(context.class_names),
            "provenance": self.provenance,
        }
        writer.begin(self.image_settings(context), about, resume=resume)
        if self.num_reconstructions(context):
            reconstruction_writer.begin(self.image_settings(context), about, resume=resume)

        def run_early_stages() -> None:
            if stages == self.stages:
                self.warn_about_generator(context)
            for name in stages:
                if name != self.stages[-1]:
                    self.run_stage(context, name)

        processes.run_on_main_process(run_early_stages)
        generated = 0
        if stages == self.stages:
            generated = self._generate_missing(context, writer, reconstruction_writer)
        return OutlierFolder(expand_path(out), writer.num_images, count, generated)

    def _check_networks(
        self, diffusion: DiffusionModel | None, classifier: Classifier | str | Path | None, device: str
    ) -> tuple[DiffusionModel | None, Classifier | None]:
        """Load the classifier and check that the required networks are given; both on `device`."""
        if isinstance(classifier, str | Path):
            classifier = Classifier.load(classifier)
        if self.requirements.diffusion and diffusion is None:
            raise FaroutError(f"{type(self).__name__} requires a diffusion model; give diffusion=FOLDER")
        if self.requirements.classifier and classifier is None:
            raise FaroutError(f"{type(self).__name__} requires a classifier; give classifier=FOLDER")
        if self.requirements.class_conditional and diffusion is not None and diffusion.conditioning is None:
            raise FaroutError(
                f"{type(self).__name__} requires a class-conditional diffusion model, and this one is unconditional; "
                "train one with `farout train diffusion SOURCE --preset classes`"
            )
        used = diffusion if self.requirements.diffusion else None
        return used and used.to(device), classifier and classifier.to(device)

    def _generate_missing(
        self, context: SynthesisContext, writer: ImageWriter, reconstruction_writer: ImageWriter
    ) -> int:
        """Generate and write the images that the folders lack; return the number of new outliers of all processes."""
        missing = writer.missing_indices(context.count)
        to_reconstruct = reconstruction_writer.missing_indices(min(context.count, self.num_reconstructions(context)))
        batch_size = context.runtime.images_per_batch(self.image_shape(context))
        # batches with fixed boundaries are computed whole, so that a resumed run writes the same bytes
        batches = writer.processes.split_between_processes(
            blocks_containing({*missing, *to_reconstruct}, batch_size, context.count)
        )
        with (
            writer,
            reconstruction_writer,
            task(f"outliers into {context.folder}", sum(map(len, batches))) as bar,
        ):
            for indices in batches:
                labels = [self.label_of(context, index) for index in indices]
                batch = self.generate(context, indices, labels)
                reconstructed = batch.reconstructions
                tensors = [batch.images] if reconstructed is None else [batch.images, reconstructed.images]
                if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                    raise FaroutError(
                        "some outliers are not numbers; use precision fp32, or settings closer to the classes"
                    )
                # reconstructions first: if an outlier exists after an interruption, so does its reconstruction
                if reconstructed is not None:
                    rows = reconstructed.rows
                    reconstruction_writer.write(
                        [indices[row] for row in rows],
                        [labels[row] for row in rows],
                        reconstructed.images,
                        [batch.sources[row] for row in rows],
                        reconstructed.columns,
                    )
                writer.write(indices, labels, batch.images, batch.sources, batch.columns, batch.extra_images)
                bar.advance(len(indices))
            reconstruction_writer.finish()
            writer.finish()
        return len(missing)


def describe_inputs(
    source: ImageSource, labels: Tensor, diffusion: DiffusionModel | None, runtime: Runtime
) -> dict[str, Any]:
    """Hashes of images, labels and generator, and the numerical environment: a resumed run must have the same."""
    return {
        "data": source.fingerprint(),
        "labels": store.hash_tensors({"labels": labels}),
        "diffusion": None if diffusion is None else diffusion.content_hash,
        "precision": runtime.precision,
        "device": runtime.device.partition(":")[0],
    }
