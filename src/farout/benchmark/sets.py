"""The sets of a benchmark: which are here, and what of them could give a score away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import median

from farout.benchmark.spec import Spec
from farout.core.errors import FaroutError
from farout.data import catalog
from farout.data.image_source import ImageSource, Policy
from farout.data.source_spec import parse_spec
from farout.data.sources import open_source

__all__ = ["SetFacts", "Sets", "absent_sets", "check_present", "why_absent"]

_ALIKE = 0.1
"""Sets of many sizes are of one size where the medians of their sides differ by less than this share."""


def why_absent(source: str, *, hub: bool = False) -> str | None:
    """Why a source cannot be had on this machine; None where it can.

    hub: sets that are on the Hugging Face hub can be had. Raises SourceError for a source that nobody knows.
    """
    if catalog.on_this_machine(source):
        open_source(source)
        return None
    spec = parse_spec(source, catalog.names())
    known = catalog.entry(spec.location) if spec.kind == "named" else None
    if spec.kind == "named" and (known is None or spec.split not in known.splits):
        open_source(source)  # says what is wrong with it
    if catalog.on_a_hub(source):
        return None if hub else f"{source} is not on this machine; --hub fetches it from the Hugging Face hub"
    assert known is not None
    place = f"$FAROUT_DATA/{known.name}/{spec.split}.parquet"
    return f"{source} is not on this machine; {known.by_hand}, then save it as {place}"


def absent_sets(spec: Spec, *, hub: bool = False) -> dict[str, str]:
    """Of all sources of a benchmark, the training images included, those that cannot be had, and why."""
    every = dict.fromkeys([spec.train, spec.id, *spec.sources])
    found = {source: why_absent(source, hub=hub) for source in every}
    return {source: why for source, why in found.items() if why is not None}


@dataclass(frozen=True)
class SetFacts:
    """What is known of a source.

    Attributes:
        images: all of it; used: the sample that is used.
        fingerprint: of the sample.
        native_sizes: height x width -> count, over up to 64 images.
        markers: `size` where the native size is another than that of the in-distribution images, `overlap` where images
            or classes are among the in-distribution ones.
    """

    images: int
    used: int
    fingerprint: str
    native_sizes: dict[str, int]
    markers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """As JSON knows it."""
        return {**asdict(self), "markers": list(self.markers)}


class Sets:
    """The sources of a benchmark, opened once, as the first seed samples them."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.seed = spec, spec.seeds[0]
        self._opened: dict[str, ImageSource] = {}
        self._views: dict[tuple[str, Policy, int | None, int], ImageSource] = {}

    def images(self, source: str | None = None, limit: int | None = None) -> ImageSource:
        """Images that something is trained on or made of; None: as the benchmark has it."""
        return self._open(source or self.spec.train, "raise", limit or self.spec.train_limit, self.seed)

    def scored(self, source: str, seed: int) -> ImageSource:
        """A source as detectors of this seed see it."""
        return self._open(source, "nan", self.spec.limit, seed)

    def _open(self, source: str, policy: Policy, limit: int | None, seed: int) -> ImageSource:
        """A view of a source, which is opened where it is new."""
        key = (source, policy, limit, seed)
        if source not in self._opened:
            self._opened[source] = open_source(source)
        if key not in self._views:
            self._views[key] = open_source(self._opened[source].with_policy(policy), limit=limit, seed=seed)
        return self._views[key]

    @property
    def id(self) -> ImageSource:
        """The in-distribution images that are scored."""
        return self.scored(self.spec.id, self.seed)

    def facts(self, source: str) -> SetFacts:
        """What is known of a source that is here; all images of the sample are read."""
        used = self.images() if source == self.spec.train else self.scored(source, self.seed)
        marked = () if source in (self.spec.train, self.spec.id) else self._markers(used)
        sizes = {f"{height}x{width}": count for (height, width), count in used.native_sizes().items()}
        return SetFacts(len(self._opened[source]), len(used), used.fingerprint(), sizes, marked)

    def _markers(self, ood: ImageSource) -> tuple[str, ...]:
        found = {"size": _other_sizes(self.id, ood), "overlap": self._overlaps(ood)}
        return tuple(name for name, holds in found.items() if holds)

    def _overlaps(self, ood: ImageSource) -> bool:
        """Images that are in-distribution, or seen in training, or classes that are in-distribution ones."""
        inside = {*self.id.content_hashes(), *self._training_hashes} - {None}
        if inside & set(ood.content_hashes()):
            return True
        return ood.variant is None and bool(_classes(self.id) & _classes(ood))

    @cached_property
    def _training_hashes(self) -> tuple[str | None, ...]:
        return self.images().content_hashes()


def _classes(source: ImageSource) -> set[str]:
    """Names of the classes that have images; those that are numbers are told apart by the set's name."""
    names, place = source.class_names, parse_spec(source.name, catalog.names()).location
    labels = set(source.labels or ())
    found = {str(names[label]) if names and 0 <= label < len(names) else str(label) for label in labels}
    return {f"{place}:{name}" if name.isdigit() else name for name in found}


def _other_sizes(inside: ImageSource, outside: ImageSource) -> bool:
    sizes, others = inside.native_sizes(), outside.native_sizes()
    if set(sizes) == set(others) or not sizes or not others:
        return False
    if len(sizes) == 1 or len(others) == 1:
        return True
    return abs(_side(others) / _side(sizes) - 1) > _ALIKE


def _side(sizes: Counter[tuple[int, int]]) -> float:
    """Median of the square root of the area, in pixels."""
    return median((height * width) ** 0.5 for (height, width), count in sizes.items() for _ in range(count))


def check_present(spec: Spec, absent: Mapping[str, str]) -> None:
    """Raises FaroutError where training or in-distribution images cannot be had, or no out-of-distribution ones."""
    lacking = [absent[source] for source in dict.fromkeys([spec.train, spec.id]) if source in absent]
    if not lacking and all(source in absent for source in spec.sources):
        lacking = [absent[source] for source in spec.sources]
    if lacking:
        raise FaroutError(f"the benchmark {spec.name} cannot be run here: {'; '.join(lacking)}")
