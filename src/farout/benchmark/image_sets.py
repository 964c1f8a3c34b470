"""The image sets of a benchmark: which are on this machine, and which could be distinguished by trivial differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import median

from farout.benchmark.specification import BenchmarkSpec
from farout.core.errors import FaroutError
from farout.data import catalog
from farout.data.image_source import ImageSource, Policy
from farout.data.source_spec import parse_spec
from farout.data.sources import open_source

__all__ = ["ImageSets", "SetFacts", "check_required_sets", "explain_missing", "missing_sets"]

_SIZE_TOLERANCE = 0.1
"""Sets with images of many sizes are of equal size if their median sides differ by less than this fraction."""


def explain_missing(source: str, *, hub: bool = False) -> str | None:
    """Explain why a source is not available on this machine; None if it is available.

    Args:
        source: the specification of the source.
        hub: sets on the Hugging Face hub are available.

    Raises SourceError for an unknown source.
    """
    if catalog.is_local(source):
        open_source(source)
        return None
    spec = parse_spec(source, catalog.set_names())
    entry = catalog.find_entry(spec.location) if spec.kind == "named" else None
    if spec.kind == "named" and (entry is None or spec.split not in entry.splits):
        open_source(source)  # raises an error that says what is wrong
    if catalog.needs_hub(source):
        return None if hub else f"{source} is not on this machine; --hub fetches it from the Hugging Face hub"
    assert entry is not None
    path = f"$FAROUT_DATA/{entry.name}/{spec.split}.parquet"
    return f"{source} is not on this machine; {entry.download_hint}, then save it as {path}"


def missing_sets(spec: BenchmarkSpec, *, hub: bool = False) -> dict[str, str]:
    """The sources of a benchmark that are not available, with the reason; training images included."""
    sources = dict.fromkeys([spec.train, spec.id, *spec.ood_sources])
    reasons = {source: explain_missing(source, hub=hub) for source in sources}
    return {source: reason for source, reason in reasons.items() if reason is not None}


def check_required_sets(spec: BenchmarkSpec, missing: Mapping[str, str]) -> None:
    """Raise FaroutError if training images, in-distribution images or all out-of-distribution sets are missing."""
    reasons = [missing[source] for source in dict.fromkeys([spec.train, spec.id]) if source in missing]
    if not reasons and all(source in missing for source in spec.ood_sources):
        reasons = [missing[source] for source in spec.ood_sources]
    if reasons:
        raise FaroutError(f"the benchmark {spec.name} cannot be run on this machine: {'; '.join(reasons)}")


@dataclass(frozen=True)
class SetFacts:
    """What provenance and tables say about an image set.

    Attributes:
        images: number of images in the whole set.
        used: number of images in the sample that is used.
        fingerprint: of the sample.
        native_sizes: height x width -> count, over up to 64 images.
        markers: `size` if the native size differs from that of the in-distribution images, `overlap` if images or
            classes are also in-distribution.
    """

    images: int
    used: int
    fingerprint: str
    native_sizes: dict[str, int]
    markers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """As JSON represents it."""
        return {**asdict(self), "markers": list(self.markers)}


class ImageSets:
    """The sources of a benchmark; each is opened once. Samples are those of the first seed."""

    def __init__(self, spec: BenchmarkSpec) -> None:
        self.spec = spec
        self._opened: dict[str, ImageSource] = {}
        self._samples: dict[tuple[str, Policy, int | None, int], ImageSource] = {}

    def training_images(self, source: str | None = None, limit: int | None = None) -> ImageSource:
        """Images that something is trained on or generated from; None: the values of the benchmark."""
        return self._open(source or self.spec.train, "raise", limit or self.spec.train_limit, self.spec.seeds[0])

    def scored_images(self, source: str, seed: int) -> ImageSource:
        """The sample of a source that detectors of this seed score."""
        return self._open(source, "nan", self.spec.limit, seed)

    def _open(self, source: str, policy: Policy, limit: int | None, seed: int) -> ImageSource:
        key = (source, policy, limit, seed)
        if source not in self._opened:
            self._opened[source] = open_source(source)
        if key not in self._samples:
            self._samples[key] = open_source(self._opened[source].with_policy(policy), limit=limit, seed=seed)
        return self._samples[key]

    def facts(self, source: str) -> SetFacts:
        """Facts about an available source; reads all images of the sample."""
        seed = self.spec.seeds[0]
        images = self.training_images() if source == self.spec.train else self.scored_images(source, seed)
        markers: list[str] = []
        if source not in (self.spec.train, self.spec.id):
            id_images = self.scored_images(self.spec.id, seed)
            if _sizes_differ(id_images, images):
                markers.append("size")
            shared = {*id_images.content_hashes(), *self._training_hashes} & set(images.content_hashes())
            shares_classes = images.variant is None and bool(_present_classes(id_images) & _present_classes(images))
            if shared - {None} or shares_classes:
                markers.append("overlap")
        sizes = {f"{height}x{width}": count for (height, width), count in images.native_sizes().items()}
        return SetFacts(len(self._opened[source]), len(images), images.fingerprint(), sizes, tuple(markers))

    @cached_property
    def _training_hashes(self) -> tuple[str | None, ...]:
        return self.training_images().content_hashes()


def _present_classes(source: ImageSource) -> set[str]:
    """Names of the classes that have images; numbers are prefixed with the name of the set."""
    names, location = source.class_names, parse_spec(source.name, catalog.set_names()).location
    present = {
        str(names[label]) if names and 0 <= label < len(names) else str(label) for label in set(source.labels or ())
    }
    return {f"{location}:{name}" if name.isdigit() else name for name in present}


def _sizes_differ(id_images: ImageSource, ood_images: ImageSource) -> bool:
    id_sizes, ood_sizes = id_images.native_sizes(), ood_images.native_sizes()
    if set(id_sizes) == set(ood_sizes) or not id_sizes or not ood_sizes:
        return False
    if len(id_sizes) == 1 or len(ood_sizes) == 1:
        return True
    return abs(_median_side(ood_sizes) / _median_side(id_sizes) - 1) > _SIZE_TOLERANCE


def _median_side(sizes: Counter[tuple[int, int]]) -> float:
    """Median of the square root of the area, in pixels."""
    return median((height * width) ** 0.5 for (height, width), count in sizes.items() for _ in range(count))
