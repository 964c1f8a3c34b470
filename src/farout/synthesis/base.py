"""The contract of synthesizers: labelled images and a generator in, a folder of outliers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.core import store
from farout.core.chunking import blocks_with
from farout.core.config import Configured, flat
from farout.core.devices import ProcessGroup, join_processes
from farout.core.errors import FaroutError, SourceError
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.classes import class_numbers, names_of
from farout.data.image_source import ImageSource
from farout.data.indices import some_readable
from farout.data.sources import open_source
from farout.diffusion.model import DiffusionModel
from farout.synthesis import SYNTHESIZERS
from farout.synthesis.leakage import warn_of_other_classes
from farout.synthesis.outlier_folder import MadeFolder, OutlierFolder, ReconstructedFolder, read_outliers
from farout.synthesis.writer import ImageWriter

__all__ = [
    "Made",
    "MadeFolder",
    "OutlierFolder",
    "Remade",
    "Synthesizer",
    "Work",
    "identity",
    "read_outliers",
]

RECONSTRUCTIONS = "reconstructions"
"""The folder of images made again, within one of outliers that were made of them."""


@dataclass(frozen=True)
class Work:
    """What a synthesizer works with.

    Attributes:
        source: the in-distribution images.
        labels: the class of each as its position in `class_names`, int64 (N,).
        class_names: of all classes that the generator knows.
        folder: the folder of outliers; a stage keeps its files in a folder of its own within.
        count: outliers asked for; number i depends on (seed, i), not on how many are asked for.
        seed: of everything that is drawn.
        runtime: how networks are run, resolved.
        diffusion: the generator, where the method needs it.
        classifier: as given.
        built: what `once` has built, by name.
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
    built: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        source: ImageSource,
        folder: Path,
        count: int,
        seed: int,
        runtime: Runtime,
        diffusion: DiffusionModel | None = None,
        classifier: Classifier | None = None,
    ) -> Work:
        """With the classes that the generator is told, else those of the images.

        Raises SourceError for images without labels, or of a class that the generator does not know.
        """
        told = None if diffusion is None else diffusion.conditioning
        names = names_of(source) if told is None else told.class_names
        labels = class_numbers(source, names)
        return cls(source, labels, names, folder, count, seed, runtime, diffusion, classifier)

    def once(self, name: str, build: Callable[[], Any]) -> Any:
        """What a method builds once and uses again in this run."""
        if name not in self.built:
            self.built[name] = build()
        return self.built[name]

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """The classes that have images, rising."""
        return tuple(sorted(set(self.labels.tolist())))

    @property
    def present(self) -> list[str]:
        """Names of the classes that have images, in the order of `classes`."""
        return [self.class_names[label] for label in self.classes]

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of the generator's images, or of the source's first readable one where there is none."""
        if self.diffusion is None:
            return tuple(self.source[some_readable(self.source)[0]].shape)
        prepared = self.diffusion.preprocessing
        return (prepared.channels, *prepared.size)

    @property
    def generator(self) -> DiffusionModel:
        """The diffusion model; raises FaroutError where none was given."""
        if self.diffusion is None:
            raise FaroutError("this synthesizer needs a diffusion model; give diffusion=FOLDER (or a DiffusionModel)")
        return self.diffusion


@dataclass(frozen=True)
class Remade:
    """Images that outliers were made of, made again: rows of their batch, images (R, C, H, W) in [0, 1], and what
    varies by image, by name.
    """

    rows: Sequence[int]
    images: Tensor
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """Outliers: images (B, C, H, W) in [0, 1]; the key of the image that each was made of, empty where it was made of
    none; what else varies by image, by name; pictures (C, H, W) in [0, 1] that tell of some, by name of a folder; and
    what some were made of, made again.
    """

    images: Tensor
    sources: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    pictures: Mapping[str, Sequence[Tensor | None]] = field(default_factory=dict)
    remade: Remade | None = None


class Synthesizer(Configured, ABC):
    """A method that makes outliers. The constructor's arguments are the configuration.

    A method implements `make` and `tiny`, and says what it `needs`; one that works in stages names them in `stages` and
    implements `prepare` for all but the last.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})
    """What it wants: `labels` (always), `diffusion`, `classes` (the diffusion model is told them), `classifier`."""
    stages: ClassVar[tuple[str, ...]] = ("images",)
    """What is done one after the other; the last stage makes the images."""

    @property
    def wanted(self) -> frozenset[str]:
        """What this configuration wants: `needs`, and what its settings want beside that."""
        return self.needs

    # -- what a method implements --------------------------------------------------------------------------------

    @abstractmethod
    def make(self, work: Work, indices: Sequence[int], labels: Sequence[int]) -> Made:
        """Outliers number `indices` of the classes `labels`; each depends on its number, its class and the seed alone,
        not on the others.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, resources: Any) -> Synthesizer:
        """One that runs in seconds, for the shared tests; `resources.diffusion` is a tiny class-conditional model."""

    def load_diffusion(self, given: DiffusionModel | str | Path, source: ImageSource) -> DiffusionModel:
        """The diffusion model; a method may tell it something of the images, which have labels."""
        return DiffusionModel.load(given) if isinstance(given, str | Path) else given

    def check(self, work: Work) -> None:
        """Called before anything is written: refuses what cannot work."""

    def judge(self, work: Work) -> None:
        """Called once, when the folder is open and before any stage: warns of what takes some work to find out."""

    def prepare(self, work: Work, stage: str) -> None:
        """Does a stage before the last: leaves its files within `work.folder`, and goes on from those there."""
        raise FaroutError(
            f"{type(self).__name__} names the stage {stage!r} and has no `prepare` that does it; write one, or leave "
            "the stage out of `stages`"
        )

    def shape(self, work: Work) -> tuple[int, ...]:
        """(C, H, W) of the images that are made."""
        return work.shape

    def label(self, work: Work, index: int) -> int:
        """The class of outlier number `index`: the classes that have images take turns."""
        return work.classes[index % len(work.classes)]

    def remakes(self, work: Work) -> int:
        """With how many of the first outliers `make` gives the images that they were made of, made again."""
        return 0

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
        """Makes outliers number 0 to count - 1 into `out`, the same for any batch size and number of processes.

        Started under `accelerate launch` or `torchrun`, several processes, one device each, share the images of the
        last stage; the first one does the stages before by itself.

        Args:
            images: labelled in-distribution images, any source.
            out: the folder; see `OutlierFolder`.
            count: number of outliers, all classes together.
            diffusion: a `DiffusionModel` or its folder, for methods that need one; those that tell it classes take
                original Stable Diffusion folders too.
            classifier: a `Classifier` or its folder, trained apart from the diffusion model: for methods that need one,
                and to say whether the generator's own samples are of their classes.
            seed: of everything that is drawn.
            resume: go on where an earlier run in `out` stopped; a larger count adds images.
            stage: the last of the method's `stages` to do; None: all.
            limit: a seeded sample of this many images of the source.
            policy: what becomes of an unreadable image: raise, or skip.
            runtime: how networks are run; None: `Runtime()`.

        Raises:
            FaroutError: for images, networks and settings that do not go together.
            SourceError: for images without labels, or of a class that the generator does not know.
            StoreError: where `out` holds something else, outliers and `resume` is not set, or outliers that were made
                with other settings, which are listed.
        """
        if count < 1:
            raise FaroutError(f"count must be at least 1, got {count}")
        doing = self._stages(stage)
        source = open_source(images, policy=policy, limit=limit, seed=seed)
        resolved = (runtime or Runtime()).resolved()
        processes = join_processes(resolved.device)
        _check_labelled(source)
        model = None if diffusion is None else self.load_diffusion(diffusion, source)
        networks = self._networks(model, classifier, resolved.device)
        work = Work.of(source, Path(out), count, seed, resolved, *networks)
        self.check(work)
        warn_of_other_classes(source, work.diffusion, work.classifier)
        writer, again = self._writers(work, processes)
        about = {"source": source.name, "images": len(source), "class_names": list(work.class_names)}
        for each in (writer, again) if self.remakes(work) else (writer,):
            each.begin(self._settings(work), {**about, "provenance": self.provenance}, resume=resume)
        processes.run_on_main_process(lambda: self._before(work, doing))
        made = self._write(work, writer, again) if doing == self.stages else 0
        return OutlierFolder(Path(out), writer.images, count, made)

    def _before(self, work: Work, doing: Sequence[str]) -> None:
        """What comes before the last stage."""
        if self.stages[-1] in doing:
            self.judge(work)
        for name in doing:
            if name != self.stages[-1]:
                self.prepare(work, name)

    def _stages(self, last: str | None) -> tuple[str, ...]:
        if last is None:
            return self.stages
        if last not in self.stages:
            raise FaroutError(f"{type(self).__name__} has no stage {last!r}; it has {', '.join(self.stages)}")
        return self.stages[: self.stages.index(last) + 1]

    def _networks(
        self, model: DiffusionModel | None, classifier: Classifier | str | Path | None, device: str
    ) -> tuple[DiffusionModel | None, Classifier | None]:
        """The networks, loaded; a diffusion model that the method does not need is left aside."""
        judge = Classifier.load(classifier) if isinstance(classifier, str | Path) else classifier
        for name, given in (("diffusion", model), ("classifier", judge)):
            if name in self.wanted and given is None:
                raise FaroutError(f"{type(self).__name__} needs a {name} model; give {name}=FOLDER")
        if "classes" in self.needs and model is not None and model.conditioning is None:
            raise FaroutError(
                f"{type(self).__name__} needs a class-conditional diffusion model, and this one is unconditional; "
                "train one with `farout train diffusion SOURCE --preset classes`"
            )
        used = model if "diffusion" in self.needs else None
        return used and used.to(device), judge and judge.to(device)

    def _settings(self, work: Work) -> dict[str, Any]:
        """All that decides the images."""
        try:
            name = SYNTHESIZERS.name_of(type(self))
        except FaroutError:  # a class of the caller's own, which no name leads to
            name = type(self).__name__
        return {
            "method": name,
            "config": flat(self.config),
            "seed": work.seed,
            **identity(work.source, work.labels, work.diffusion, work.runtime),
            # one that only judges the generator decides nothing
            "classifier": work.classifier.content_hash if work.classifier and "classifier" in self.wanted else None,
        }

    def _writers(self, work: Work, processes: ProcessGroup) -> tuple[ImageWriter, ImageWriter]:
        """Of outliers, and of the images that they were made of."""
        out, names = work.folder, work.class_names
        again = ImageWriter(out / RECONSTRUCTIONS, names, work.seed, ReconstructedFolder.kind, processes)
        return ImageWriter(out, names, work.seed, OutlierFolder.kind, processes), again

    def _write(self, work: Work, writer: ImageWriter, again: ImageWriter) -> int:
        wanted, lost = writer.missing(work.count), again.missing(min(work.count, self.remakes(work)))
        blocks = blocks_with({*wanted, *lost}, work.runtime.images_per_batch(self.shape(work)), work.count)
        mine = writer.processes.split_between_processes(blocks)
        with writer, again, task(f"outliers into {work.folder}", sum(map(len, mine))) as bar:
            for indices in mine:
                labels = [self.label(work, index) for index in indices]
                made = self.make(work, indices, labels)
                _write_batch(made, indices, labels, writer, again)
                bar.advance(len(indices))
            again.finish()
            writer.finish()
        return len(wanted)


def _write_batch(
    made: Made, indices: Sequence[int], labels: Sequence[int], writer: ImageWriter, again: ImageWriter
) -> None:
    """What outliers were made of goes first: where an outlier stands, it does."""
    parts = [made.images] if made.remade is None else [made.images, made.remade.images]
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise FaroutError("some outliers are not numbers; use precision fp32, or settings less far out")
    if made.remade is not None:
        rows = made.remade.rows
        numbers, classes = ([each[row] for row in rows] for each in (indices, labels))
        again.write(numbers, classes, made.remade.images, [made.sources[row] for row in rows], made.remade.columns)
    writer.write(indices, labels, made.images, made.sources, made.columns, made.pictures)


def identity(source: ImageSource, labels: Tensor, diffusion: DiffusionModel | None, runtime: Runtime) -> dict[str, Any]:
    """What images, labels, generator and kernels are: work that goes on must have the same."""
    return {
        "data": source.fingerprint(),
        "labels": store.hash_tensors({"labels": labels}),
        "diffusion": None if diffusion is None else diffusion.content_hash,
        "precision": runtime.precision,
        "device": runtime.device.partition(":")[0],
    }


def _check_labelled(source: ImageSource) -> None:
    if source.labels is None:
        raise SourceError(
            f"{source.name} has no labels, and outliers are generated class by class; give a class-per-folder tree or "
            "a "
            "table with labels"
        )
