"""What a plan will cost: network evaluations, multiply-accumulates, a rough time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from farout.benchmark.plan import Job, Plan
from farout.benchmark.rehearsal import Rehearsal
from farout.benchmark.spec import DetectorSpec, OutlierSpec
from farout.data.splits import calibration_size
from farout.detectors.feature_detector import FeatureDetector
from farout.diffusion import image_to_image as round_trip
from farout.diffusion import sampling
from farout.evaluation.baselines import TRIVIAL

__all__ = ["RULE", "Estimate", "estimates"]

RULE = (
    "a rough estimate: network evaluations (three per image in training) times the multiply-accumulates of one, "
    "divided "
    "by the measured speed of each network; excludes decoding, intervals and networks that a fit trains itself"
)
_BACKWARD = 3
"""A training step costs as much as so many evaluations of its images."""


@dataclass(frozen=True)
class Estimate:
    """Network evaluations (rows), billions of multiply-accumulates of all networks of a job, and its seconds here."""

    rows: float = 0.0
    gmacs: float = 0.0
    seconds: float = 0.0


def estimates(plan: Plan, rehearsal: Rehearsal) -> dict[str, Estimate]:
    """Of every job, by its id."""
    counter = _Counter(plan, rehearsal)
    return {job.id: counter.of(job) for job in plan.jobs}


class _Counter:
    """Counts job by job, in order: features that an earlier job has computed are in the cache."""

    def __init__(self, plan: Plan, rehearsal: Rehearsal) -> None:
        self.plan, self.spec, self.rehearsal = plan, plan.spec, rehearsal
        self.cached: set[tuple[object, ...]] = set()
        self.of_control = {job.id: job.control_of for job in plan.jobs if job.control_of is not None}

    def of(self, job: Job) -> Estimate:
        """The estimate of one job."""
        if job.room == "networks":
            return self._training(job.name)
        if job.room == "outliers":
            return self._outliers(self.spec.outliers[job.name])
        if job.room == "reconstructions":
            entry = self.spec.reconstructions[job.name]
            images = len(self.rehearsal.images(entry.source, entry.limit))
            return self._evaluations(entry.diffusion, images * (entry.steps or round_trip.STEPS))
        if job.name == TRIVIAL:
            return Estimate()
        fitted = job.id if job.room == "detectors" else job.needs[0]
        control_of = self.of_control.get(fitted)
        name = control_of or job.name
        if job.room == "detectors":
            return self._images(name, job, control_of is not None, self._measured(name, control_of is not None))
        return self._images(name, job, control_of is not None, sum(map(self._scored, job.sources)))

    def _training(self, name: str) -> Estimate:
        entry = self.spec.networks[name]
        if entry.folder is not None:
            return Estimate()
        rows = entry.training.steps * entry.training.batch_size * (2 if entry.outliers else 1)
        return self._evaluations(name, _BACKWARD * rows)

    def _outliers(self, entry: OutlierSpec) -> Estimate:
        """Decoding under guidance, or the part of the way that images go with three branches; embedding."""
        if entry.diffusion is None:
            return Estimate()
        config = entry.made().config
        steps = config.get("steps") or sampling.STEPS
        most = config.get("k_max", 0) or steps - 1
        rows = entry.count * (1.5 * (config["k_min"] + most) if "k_min" in config else 2 * steps)
        inversion = config.get("inversion")
        if inversion is not None:
            images = len(self.rehearsal.images(entry.source, entry.limit))
            rows += _BACKWARD * images * inversion.steps * inversion.draws
        return self._evaluations(entry.diffusion, rows)

    def _evaluations(self, network: str, rows: float) -> Estimate:
        gmacs = rows * self.rehearsal.gmacs(network)
        return Estimate(rows, gmacs, gmacs / self.rehearsal.speed(network))

    def _scored(self, source: str) -> int:
        return len(self.rehearsal.sets.scored(source, self.spec.seeds[0]))

    def _images(self, name: str, job: Job, random: bool, images: int) -> Estimate:
        """Of so many images that a detector measures; backbones see each image once."""
        cost, made = self.rehearsal.cost(name), self.spec.detectors[name].made()
        gmacs = cost.gmacs
        if isinstance(made, FeatureDetector):
            weights = "random" if random and "diffusion" not in made.needs else made.config["weights"]
            key = (job.room, job.seed, made.config["backbone"], weights, made.config["layers"], made.config["size"])
            gmacs = 0.0 if key in self.cached else gmacs
            self.cached.add(key)
        seconds = images * gmacs / self.rehearsal.detector_speed(name) if gmacs else 0.0
        return Estimate(images * cost.nfe, images * gmacs, seconds)

    def _measured(self, name: str, random: bool) -> int:
        """Statistics and calibration images of a fit; all images where the detector sees features."""
        entry = self.spec.detectors[name]
        made, count = entry.made(), len(self.rehearsal.images(None, entry.limit))
        if random:
            count = min(count, self.spec.control_limit or count)
        if isinstance(made, FeatureDetector):
            return count
        kept = count if random else math.ceil(count * self._held_out(entry))
        wanted = (entry.statistics or made.statistics_minimum) + calibration_size(count, self.spec.alpha)
        return min(kept, wanted) if made.statistics_suffice else kept

    def _held_out(self, entry: DetectorSpec) -> float:
        """The share of training images that the networks have not seen."""
        trained = [self.spec.networks[name] for name in (entry.diffusion, entry.classifier) if name is not None]
        if not any(network.folder is None for network in trained):
            return 1.0
        whole = len(self.rehearsal.images(None, None))
        return min(1.0, (calibration_size(whole, self.spec.alpha) + self.spec.statistics) / whole)
