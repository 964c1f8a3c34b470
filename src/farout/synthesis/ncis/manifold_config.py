"""How class vectors are flattened and drawn: every setting of NCIS's manifold, the published ones as a preset."""

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

    The preset `paper` holds the published values (Doorenbos et al., arXiv 2411.13619, for 50,000 vectors of 768
    coordinates); the defaults are for some thousand vectors of up to some hundred coordinates on a CPU.

    Args:
        map: `volume_preserving`: the trained network; `linear`: a rotation per class, a baseline without training
            (Gaussians of the vectors themselves).
        layers: number of coupling layers.
        orthogonal_map: parametrization of the orthogonal layers: `matrix_exp` (the paper) or `cayley` (faster).
        center: subtract the mean of all training vectors, and add it to the drawn vectors.
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
        draws: vectors drawn per class and round.
        kept: vectors of lowest density kept per class and round; the paper keeps 10 of 3,330 (0.3 %).
        temperature: factor on the standard deviation of drawn vectors; 1 in the paper.
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
    draws: int = 3330
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
        check_options(self, "manifold's option", _rules(self))

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> ManifoldConfig:
        """The settings called `fast` or `paper`, with changes. Raises FaroutError for another name."""
        if name not in cls.presets:
            raise FaroutError(f"there is no preset {name!r} of a manifold; expected one of {', '.join(cls.presets)}")
        return cls(**{**cls.presets[name], **changes})

    def resolved(self, fewest: int, held_out: int, dim: int) -> ManifoldConfig:
        """With the regularization that `auto` stands for.

        With no more vectors than dimensions a class's covariance is singular: along the directions that its vectors
        lack, a small weight leaves nearly nothing, so that vectors of the class that were not fitted to lie further out
        than anything drawn.

        Args:
            fewest: vectors fitted to, of the class that has the fewest.
            held_out: vectors held out, of all classes together.
            dim: D.
        """
        if self.regularization != "auto":
            return self
        if fewest > dim or not held_out:
            return replace(self, regularization="relative")
        return replace(self, regularization="held_out", reg_weight=ManifoldConfig.reg_weight)

    def total_steps(self, count: int) -> int:
        """Batches of the whole training with `count` vectors; the last batch of an epoch may be smaller."""
        return self.steps if self.epochs is None else self.epochs * math.ceil(count / self.batch_size)


def _rules(c: ManifoldConfig) -> list[tuple[str, bool, str]]:
    counts = ("layers", "steps", "batch_size", "validations", "draws", "kept")
    weights = (ManifoldConfig.reg_weight, ManifoldConfig.presets["paper"]["reg_weight"])
    return [
        *((name, getattr(c, name) >= 1, "1 or more") for name in counts),
        ("epochs", c.epochs is None or c.epochs >= 1, "None, or 1 or more"),
        (
            "steps",
            c.epochs is None or c.steps == ManifoldConfig.steps,
            f"no steps with epochs {c.epochs}: leave one out",
        ),
        ("map", c.map in ("volume_preserving", "linear"), "volume_preserving or linear"),
        ("orthogonal_map", c.orthogonal_map in ("matrix_exp", "cayley"), "matrix_exp or cayley"),
        ("pca_variance", 0 < c.pca_variance < 100, "a number between 0 and 100 (percent)"),
        *((n, 0 < getattr(c, n) < math.inf, "a positive number") for n in ("learning_rate", "temperature")),
        ("final_factor", 0 < c.final_factor <= 1, "a number in (0, 1]"),
        ("train_fraction", 0 < c.train_fraction <= 1, "a number in (0, 1]"),
        ("held_out", 0 <= c.held_out < 1, "a number in [0, 1)"),
        ("checkpoint", c.checkpoint in ("best", "last"), "best or last"),
        ("regularization", c.regularization in get_args(Regularization), ", ".join(get_args(Regularization))),
        ("held_out", c.held_out > 0 or c.regularization != "held_out", "a part to choose a shrinkage by, such as 0.1"),
        ("reg_weight", 0 <= c.reg_weight < math.inf, "0 or more"),
        ("reg_weight", c.regularization != "held_out" or c.reg_weight in weights, "none with held_out: leave one out"),
        ("kept", c.kept <= c.draws, f"at most draws ({c.draws})"),
    ]
