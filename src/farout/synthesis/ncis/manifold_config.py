"""Settings of NCIS's manifold, with the published ones as a preset."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from farout.core.errors import FaroutError, check_options
from farout.synthesis.ncis.volume_preserving import OrthogonalMap

__all__ = ["ManifoldConfig"]

Regularization = Literal["auto", "relative", "absolute", "held_out"]


@dataclass(frozen=True)
class ManifoldConfig:
    """Manifold of class vectors. Raises FaroutError for a value out of range.

    The preset `paper` contains the published values (Doorenbos et al., arXiv 2411.13619, for 50,000 vectors of 768
    coordinates); the defaults are for some thousand vectors of up to some hundred coordinates on a CPU.

    Args:
        map: `volume_preserving`: the trained network; `linear`: a rotation per class, a baseline without training
            (Gaussians of the vectors themselves).
        layers: number of coupling layers.
        orthogonal_map: parametrization of the orthogonal layers: `matrix_exp` (the paper) or `cayley` (faster).
        center: subtract the mean of all training vectors, and add it to the sampled vectors.
        scale: divide all coordinates by the root of their mean variance.
        pca_variance: percentage of each class's variance assigned to invariant coordinates.
        steps: number of training batches, with two updates each: invariants, then reconstruction.
        epochs: passes over the training vectors, instead of `steps`; default: use `steps`.
        batch_size: vectors per batch.
        learning_rate: learning rate of Adam at the first batch.
        final_factor: learning rate of the last batch, relative to the first; linear in between.
        train_fraction: share of each class's training vectors used for fitting, a random sample.
        held_out: share of each class's vectors held out for validation and for the choice of the shrinkage; 0: none.
        validations: number of evenly spaced validations, the last at the end of training.
        checkpoint: weights to keep: `best` (lowest validation loss) or `last`.
        regularization: regularization of each class's covariance S: `relative` (S + w v I, v the mean variance of a
            coordinate), `absolute` (S + w I), `held_out` (shrinkage chosen by the likelihood of held-out vectors) or
            `auto` (`held_out` if a class has no more vectors than dimensions and some are held out, else `relative`).
        reg_weight: w in `regularization`; not used by `held_out`.
        candidates: vectors sampled per class and round; published: 3,330.
        kept: vectors of lowest density kept per class and round; published: 10 (0.3 % of the candidates).
        temperature: factor on the standard deviation of sampled vectors; 1 in the paper.
        device: device of the manifold's network: `auto` (CUDA if present, else CPU), `cpu`, `cuda`, `cuda:1`, `mps`.
    """

    map: Literal["volume_preserving", "linear"] = "volume_preserving"
    layers: int = 4
    orthogonal_map: OrthogonalMap = "cayley"
    center: bool = True
    scale: bool = True
    pca_variance: float = 5.0
    steps: int = 1000
    epochs: int | None = None
    batch_size: int = 256
    learning_rate: float = 3e-3
    final_factor: float = 0.1
    train_fraction: float = 1.0
    held_out: float = 0.1
    validations: int = 20
    checkpoint: Literal["best", "last"] = "best"
    regularization: Regularization = "auto"
    reg_weight: float = 0.05
    candidates: int = 3330
    kept: int = 10
    temperature: float = 1.0
    device: str = "auto"

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {},
        "paper": {
            "orthogonal_map": "matrix_exp",
            "center": False,
            "scale": False,
            "epochs": 200,
            "batch_size": 64,
            "learning_rate": 1e-4,
            "held_out": 0.0,
            "validations": 200,
            "regularization": "absolute",
            "reg_weight": 1e-5,
        },
    }

    def __post_init__(self) -> None:
        counts = ("layers", "steps", "batch_size", "validations", "candidates", "kept")
        positive = ("learning_rate", "temperature")
        # presets set a weight, which `held_out` then ignores
        preset_weights = (ManifoldConfig.reg_weight, ManifoldConfig.presets["paper"]["reg_weight"])
        uses_held_out = self.regularization == "held_out"
        has_default_steps = self.steps == ManifoldConfig.steps
        rules = [
            *((name, getattr(self, name) >= 1, "1 or more") for name in counts),
            ("epochs", self.epochs is None or self.epochs >= 1, "None, or 1 or more"),
            (
                "steps",
                self.epochs is None or has_default_steps,
                f"no steps with epochs {self.epochs}: leave one out",
            ),
            ("map", self.map in ("volume_preserving", "linear"), "volume_preserving or linear"),
            ("orthogonal_map", self.orthogonal_map in ("matrix_exp", "cayley"), "matrix_exp or cayley"),
            ("pca_variance", 0 < self.pca_variance < 100, "a number between 0 and 100 (percent)"),
            *((name, 0 < getattr(self, name) < math.inf, "a positive number") for name in positive),
            ("final_factor", 0 < self.final_factor <= 1, "a number in (0, 1]"),
            ("train_fraction", 0 < self.train_fraction <= 1, "a number in (0, 1]"),
            ("held_out", 0 <= self.held_out < 1, "a number in [0, 1)"),
            ("checkpoint", self.checkpoint in ("best", "last"), "best or last"),
            ("regularization", self.regularization in get_args(Regularization), ", ".join(get_args(Regularization))),
            ("held_out", self.held_out > 0 or not uses_held_out, "a share to choose the shrinkage by, such as 0.1"),
            ("reg_weight", 0 <= self.reg_weight < math.inf, "0 or more"),
            (
                "reg_weight",
                not uses_held_out or self.reg_weight in preset_weights,
                "none with held_out: leave one out",
            ),
            ("kept", self.kept <= self.candidates, f"at most candidates ({self.candidates})"),
        ]
        check_options(self, "manifold's option", rules)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> ManifoldConfig:
        """The settings called `fast` or `paper`, with changes. Raises FaroutError for another name."""
        if name not in cls.presets:
            raise FaroutError(f"there is no preset {name!r} of a manifold; expected one of {', '.join(cls.presets)}")
        return cls(**{**cls.presets[name], **changes})

    def resolve_regularization(self, smallest_class: int, held_out: int, dim: int) -> ManifoldConfig:
        """The same settings with the regularization that `auto` selects.

        If a class has no more vectors than dimensions, its covariance is singular: in the directions without data a
        small weight leaves almost no variance, so that held-out vectors of the class are farther from it than the
        sampled ones.

        Args:
            smallest_class: number of vectors for fitting of the class that has the fewest.
            held_out: number of held-out vectors of all classes together.
            dim: D.
        """
        if self.regularization != "auto":
            return self
        if smallest_class > dim or not held_out:
            return replace(self, regularization="relative")
        return replace(self, regularization="held_out", reg_weight=ManifoldConfig.reg_weight)

    def total_steps(self, count: int) -> int:
        """Batches of the whole training with `count` vectors; the last batch of an epoch may be smaller."""
        return self.steps if self.epochs is None else self.epochs * math.ceil(count / self.batch_size)
