"""The manifold of class vectors of NCIS: flat per class, with a density, and drawn from where the density is low.

Doorenbos, Sznitman and Marquez-Neila, "Non-linear outlier synthesis for out-of-distribution detection",
arXiv 2411.13619. A volume-preserving map f(x, c), trained so that every class is flat, and a Gaussian per class of
z = f(x, c): log p(x | c) = log N(z; m_c, C_c), for |det J| = 1. Vectors of low density come back by the inverse.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from farout.core import store
from farout.core.errors import FaroutError, FaroutWarning, StoreError
from farout.synthesis.ncis import linear_map as _flattening
from farout.synthesis.ncis.class_gaussians import ClassGaussians
from farout.synthesis.ncis.labelled_vectors import check_counts, check_spread, checked, class_names, split, warn_counts
from farout.synthesis.ncis.linear_map import Map, invariant_counts
from farout.synthesis.ncis.manifold_config import ManifoldConfig
from farout.synthesis.ncis.volume_preserving import ClassRotations

__all__ = ["KIND", "Drawn", "Manifold", "ManifoldConfig", "fit_manifold"]

KIND = "manifold"


@dataclass(frozen=True)
class Drawn:
    """Vectors drawn from the tails of classes, class by class.

    Attributes:
        vectors: float32 (M, D).
        labels: int64 (M,), the class that each was drawn from.
        log_density: float64 (M,), log p(x | c), natural, in the units of the vectors.
        distance: float64 (M,), squared Mahalanobis distance from the class, divided by D.
    """

    vectors: Tensor
    labels: Tensor
    log_density: Tensor
    distance: Tensor


@dataclass
class Manifold:
    """A fitted manifold; see `fit_manifold`.

    Attributes:
        net: from shifted and scaled vectors to the flat space, and back.
        gaussians: of the flat space.
        shift: subtracted from vectors, float32 (D,).
        scale: then divides them.
        invariants: k; the last k coordinates of the flat space hardly vary in any class.
        config: how it was fitted, and how draws are made; its regularization is the one that was taken.
        class_names: by label.
        known: distances of the vectors fitted to (`training`) and of those not fitted to (`held_out`), float64 (n,).
        history: of training, in the units of scaled vectors; empty for a linear map.
        provenance: seed, counts and the like.
    """

    net: Map
    gaussians: ClassGaussians
    shift: Tensor
    scale: float
    invariants: int
    config: ManifoldConfig
    class_names: tuple[str, ...]
    known: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """D."""
        return len(self.shift)

    def to(self, device: torch.device | str) -> Self:
        """Moves the map; Gaussians stay on the CPU, which has float64 everywhere."""
        self.net.to(device)
        return self

    # -- there and back ------------------------------------------------------------------------------------------

    def flatten(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """vectors (N, D), labels (N,) -> z (N, D) float32. Raises FaroutError for other shapes, values or labels."""
        vectors, labels = checked(vectors, labels, self.class_names, self.dim)
        return _flattening.apply(self.net, (vectors - self.shift) / self.scale, labels)

    def unflatten(self, z: Tensor, labels: Tensor) -> Tensor:
        """Undoes `flatten`, shift and scale included: float32 (N, D)."""
        z, labels = checked(z, labels, self.class_names, self.dim)
        return _flattening.apply(self.net, z, labels, inverse=True) * self.scale + self.shift

    # -- densities -----------------------------------------------------------------------------------------------

    def distances(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """(z - m_c)^T C_c^-1 (z - m_c) / D of vectors (N, D) from the classes `labels` (N,): (N,) float64.

        About 1 for what the Gaussians describe; `known` holds those of in-distribution vectors to compare with.
        """
        return self.gaussians.distances(self.flatten(vectors, labels), labels.cpu())

    def log_density(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """log p(x | c) = log N(z; m_c, C_c) - D log scale, (N,) float64."""
        return self._density(self.distances(vectors, labels), labels.cpu())

    def _density(self, distances: Tensor, labels: Tensor) -> Tensor:
        return self.gaussians.log_density(distances, labels) - self.dim * math.log(self.scale)

    def flatness(self, vectors: Tensor, labels: Tensor) -> dict[str, float]:
        """How flat vectors of their classes are: `invariants`, the mean over vectors of the sum of the squares of the k
        invariant coordinates, and `reconstruction`, the mean square of what a vector loses when they are set to zero;
        both in squared units of the vectors.
        """
        vectors, labels = checked(vectors, labels, self.class_names, self.dim)
        scaled = (vectors - self.shift) / self.scale
        found = _flattening.flatness(self.net, scaled, labels, self.invariants)
        return dict(zip(("invariants", "reconstruction"), (self.scale**2 * value for value in found), strict=True))

    # -- drawing -------------------------------------------------------------------------------------------------

    def draw(
        self,
        per_class: int,
        seed: int = 0,
        *,
        draws: int | None = None,
        kept: int | None = None,
        temperature: float | None = None,
    ) -> Drawn:
        """Vectors of low density of every class.

        In rounds, `draws` vectors are drawn from the class's Gaussian, their deviations multiplied by `temperature`,
        and the `kept` of the lowest density go back through the inverse map. In D dimensions nearly all draws are about
        equally far out, so the tail is a weak knob: 10 of 3,330 reach 7 % further than the rest with D = 768.

        Args:
            per_class: vectors of each class; 100 in the paper, ten rounds of 10. More rounds are made for more vectors,
                and the first ones stay the same.
            seed: of the draws; the same ones for any number of classes.
            draws, kept, temperature: instead of those of `config`.

        Raises FaroutError for values out of range.
        """
        changes = {"draws": draws, "kept": kept, "temperature": temperature}
        config = ManifoldConfig(**asdict(self.config) | {n: value for n, value in changes.items() if value is not None})
        if per_class < 1:
            raise FaroutError(f"per_class is {per_class}; expected 1 or more vectors of each class")
        rounds = [self._round(number, seed, config) for number in range(math.ceil(per_class / config.kept))]
        # from (rounds, classes x kept, …) to class by class
        size = (len(self.class_names), config.kept)

        def sorted_out(name: str) -> Tensor:
            whole = torch.stack([getattr(one, name) for one in rounds])
            return whole.unflatten(1, size).transpose(0, 1).flatten(1, 2)[:, :per_class].flatten(0, 1)

        return Drawn(*(sorted_out(field.name) for field in fields(Drawn)))

    def _round(self, number: int, seed: int, config: ManifoldConfig) -> Drawn:
        """`kept` vectors of each class; computed alike however many rounds there are, so that no bit depends on it."""
        tail: dict[str, Any] = {"draws": config.draws, "kept": config.kept, "temperature": config.temperature}
        classes = range(len(self.class_names))
        z = torch.cat([self.gaussians.tail(label, number, seed, **tail) for label in classes])
        labels = torch.arange(len(classes)).repeat_interleave(config.kept)
        distance = self.gaussians.distances(z, labels)
        return Drawn(self.unflatten(z, labels), labels, self._density(distance, labels), distance)

    def compare(self, drawn: Drawn) -> dict[str, dict[str, float]]:
        """Distances of `drawn` beside those of the vectors `training` and `held_out`: 5 %, median and 95 %.

        Where held-out vectors of a class lie further out than what was drawn, the Gaussians are too narrow for the
        draws to be outliers; give regularization='held_out', or a larger reg_weight where it counts. Where held-out
        vectors have chosen the shrinkage, theirs are no independent check. Where training vectors lie far
        below 1, most of the covariance is what was added to it.
        """
        sets = {"drawn": drawn.distance, **{name: values for name, values in self.known.items() if len(values)}}
        points = {"low": 0.05, "median": 0.5, "high": 0.95}
        return {
            name: {point: float(values.quantile(share)) for point, share in points.items()}
            for name, values in sets.items()
        }

    # -- folders -------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        return {
            **{f"net.{name}": value for name, value in self.net.state_dict().items()},
            "means": self.gaussians.means,
            "roots": self.gaussians.roots,
            "shift": self.shift,
            **{f"known.{name}": value for name, value in self.known.items()},
        }

    @property
    def content_hash(self) -> str:
        """SHA-256 of everything learnt."""
        return store.hash_tensors({**self._tensors(), "scale": torch.tensor(self.scale, dtype=torch.float64)})

    def save(self, folder: str | Path) -> None:
        """Writes a folder: `config.json`, `manifold.safetensors`, a model card. Raises StoreError where another kind of
        folder stands.
        """
        content = {
            "config": asdict(self.config),
            "class_names": list(self.class_names),
            "scale": self.scale,
            "invariants": self.invariants,
            "strength": self.gaussians.strength,
            "content_hash": self.content_hash,
            "provenance": self.provenance,
            "history": self.history,
        }
        with store.atomic_folder(folder, KIND) as temporary:
            store.save_tensors(temporary / "manifold.safetensors", self._tensors())
            store.write_config(temporary, KIND, content)
            (temporary / "README.md").write_text(self._card(), encoding="utf-8")

    def _card(self) -> str:
        lines = [
            "# A farout manifold of class vectors",
            "",
            f"- {len(self.class_names)} classes, {self.dim} dimensions, of which {self.invariants} are invariants",
            f"- map: {self.config.map}; regularization: {self.config.regularization}, {self.gaussians.strength:.3g}",
        ]
        lines += [f"- {name}: {value}" for name, value in self.provenance.items()]
        return "\n".join(
            [*lines, "", "Distances of new vectors: `Manifold.load(folder).distances(vectors, labels)`.", ""]
        )

    @classmethod
    def load(cls, folder: str | Path) -> Manifold:
        """Reads a folder that `save` wrote; the map is on the CPU.

        Raises StoreError for a folder that is missing, incomplete, altered or of another kind.
        """
        path = Path(folder)
        content, read = store.read_config(path, KIND), store.load_tensors(path / "manifold.safetensors")
        # where a file's numbers lie in memory changes the last bits of what is solved with them
        tensors = {name: tensor.clone() for name, tensor in read.items()}
        try:
            manifold = cls._restored(content, tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise StoreError(f"{path} is not a complete manifold ({error}); fit it again") from error
        if manifold.content_hash != content["content_hash"]:
            raise StoreError(f"{path}: the numbers are not those that were saved (their hash differs)")
        return manifold

    @classmethod
    def _restored(cls, content: dict[str, Any], tensors: dict[str, Tensor]) -> Manifold:
        config, names = ManifoldConfig(**content["config"]), tuple(content["class_names"])
        weights = {n.removeprefix("net."): value for n, value in tensors.items() if n.startswith("net.")}
        if config.map == "linear":
            net: Map = ClassRotations(weights["means"], weights["axes"])
        else:
            net = _flattening.fresh(len(tensors["shift"]), len(names), config, 0)
            net.load_state_dict(weights)
        return cls(
            net.eval(),
            ClassGaussians(tensors["means"], tensors["roots"], content["strength"]),
            shift=tensors["shift"],
            scale=content["scale"],
            invariants=content["invariants"],
            config=config,
            class_names=names,
            known={n.removeprefix("known."): value for n, value in tensors.items() if n.startswith("known.")},
            history=content["history"],
            provenance=content["provenance"],
        )


def fit_manifold(
    vectors: Tensor,
    labels: Tensor,
    config: ManifoldConfig | None = None,
    classes: int | Sequence[str] | None = None,
    seed: int = 0,
    checkpoints: Path | None = None,
) -> Manifold:
    """Flattens the classes of `vectors` and fits a Gaussian to each.

    Args:
        vectors: (N, D), D at least 2.
        labels: int64 (N,), 0 to classes - 1; two or more vectors of each class.
        config: how; None: the defaults.
        classes: their number or names; None: as many as the largest label says.
        seed: of what is held out, the network's start and the order of training.
        checkpoints: a folder where training leaves checkpoints, and goes on from the newest one, to the same bits.

    Raises FaroutError for other shapes, values that are not finite, labels without a class, classes with fewer than two
    vectors or with equal ones, and where training diverges; StoreError for checkpoints of another training. Warns where
    classes have fewer vectors than dimensions.
    """
    config = config or ManifoldConfig()
    names = class_names(classes, labels)
    vectors, labels = checked(vectors, labels, names)
    check_counts(labels, names)
    fit, held = split(labels, len(names), config, seed)
    check_spread(vectors[fit], labels[fit], names)
    fewest = int(labels[fit].bincount(minlength=len(names)).min())
    config = config.resolved(fewest, len(held), vectors.shape[1])
    warn_counts(labels[fit], names, vectors.shape[1], config)
    shift, scale = _standard(vectors[fit], config)
    x = (vectors - shift) / scale
    counts = invariant_counts(x[fit], labels[fit], len(names), config.pca_variance)
    invariants = _whole(sum(counts) // len(counts), vectors.shape[1])
    held_out = (x[held], labels[held])
    net, history = _map(x[fit], labels[fit], held_out, invariants, names, config, seed, checkpoints)
    z = _flattening.apply(net, x, labels)
    gaussians = _gaussians(z, labels, fit, held, names, config, scale)
    return Manifold(
        net,
        gaussians,
        shift,
        scale,
        invariants,
        config,
        names,
        known={n: gaussians.distances(z[i], labels[i]) for n, i in {"training": fit, "held_out": held}.items()},
        history=history,
        provenance={"seed": seed, "vectors": len(x), "fitted_to": len(fit), "held_out": len(held)},
    )


def _standard(x: Tensor, config: ManifoldConfig) -> tuple[Tensor, float]:
    """What is subtracted, and the one number that divides."""
    mean = x.double().mean(0)
    scale = float((x.double() - mean).square().mean().sqrt()) if config.scale else 1.0
    return (mean.float() if config.center else torch.zeros_like(x[0])), scale


def _whole(invariants: int, dim: int) -> int:
    if invariants == dim:
        warnings.warn(
            f"one direction explains nearly all of every class, so that all {dim} coordinates would be invariants; one "
            "is kept: look at the vectors, or give a smaller pca_variance",
            FaroutWarning,
            stacklevel=3,
        )
    return min(invariants, dim - 1)


def _map(
    x: Tensor,
    labels: Tensor,
    held_out: tuple[Tensor, Tensor],
    invariants: int,
    names: Sequence[str],
    config: ManifoldConfig,
    seed: int,
    checkpoints: Path | None,
) -> tuple[Map, list[dict[str, float]]]:
    if config.map == "linear":
        return ClassRotations.fit(x, labels, len(names)).eval(), []
    return _flattening.train(
        x,
        labels,
        held_out,
        classes=len(names),
        invariants=invariants,
        config=config,
        seed=seed,
        out=checkpoints,
    )


def _gaussians(
    z: Tensor,
    labels: Tensor,
    fit: Tensor,
    held: Tensor,
    names: Sequence[str],
    config: ManifoldConfig,
    scale: float,
) -> ClassGaussians:
    if config.regularization == "held_out":
        return ClassGaussians.shrunk(z[fit], labels[fit], names, (z[held], labels[held]))
    relative = config.regularization == "relative"
    weight = config.reg_weight if relative else config.reg_weight / scale**2
    return ClassGaussians.ridged(z[fit], labels[fit], names, weight, relative=relative)
