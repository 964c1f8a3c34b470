"""The manifold of class vectors of NCIS: a map that flattens each class, a density, and samples of low density.

Doorenbos, Sznitman and Marquez-Neila, "Non-linear outlier synthesis for out-of-distribution detection",
arXiv 2411.13619. A volume-preserving map z = f(x, c) is trained so that every class c is flat, and a Gaussian is fitted
to the z of each class. Because |det J| = 1, log p(x | c) = log N(z; m_c, C_c). Samples of low density are mapped back
by the inverse of f.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from farout.core import store
from farout.core.errors import FaroutError, FaroutWarning, StoreError, TooFewImagesWarning
from farout.core.names import find_path
from farout.core.schema import Schema, check_content, create_dataclass
from farout.synthesis.ncis.class_gaussians import ClassGaussians
from farout.synthesis.ncis.manifold_config import ManifoldConfig
from farout.synthesis.ncis.network_training import (
    FlatteningMap,
    apply_map,
    count_invariants,
    create_network,
    measure_flatness,
    train_network,
)
from farout.synthesis.ncis.volume_preserving import ClassRotations
from farout.training.data_order import seed_of

__all__ = [
    "KIND",
    "Manifold",
    "ManifoldConfig",
    "SampledVectors",
    "check_class_sizes",
    "fit_manifold",
    "split_vectors",
]

KIND = "manifold"


class _Content(Schema):
    """`config.json` of a manifold; `config` is checked by what it is passed to."""

    config: dict[str, Any]
    class_names: list[str]
    scale: float
    invariants: int
    strength: float | list[float]
    content_hash: str
    provenance: dict[str, Any]
    history: list[dict[str, float]]


@dataclass(frozen=True)
class SampledVectors:
    """Vectors sampled from the tails of classes, class by class.

    Attributes:
        vectors: float32 (M, D).
        labels: the class that each was sampled from, int64 (M,).
        log_density: log p(x | c), natural, in the units of the vectors, float64 (M,).
        distance: squared Mahalanobis distance from the class, divided by D, float64 (M,).
    """

    vectors: Tensor
    labels: Tensor
    log_density: Tensor
    distance: Tensor


@dataclass
class Manifold:
    """A fitted manifold; see `fit_manifold`.

    Attributes:
        network: the map from shifted and scaled vectors to the flat space, and back.
        gaussians: the Gaussians of the flat space.
        shift: subtracted from vectors, float32 (D,).
        scale: divides them afterwards.
        invariants: k; the last k coordinates of the flat space hardly vary in any class.
        config: settings; the regularization is the one that was used.
        class_names: names of the classes.
        reference_distances: distances of the vectors that were fitted (`training`) and of the others (`held_out`),
            float64 (n,).
        history: history of the training, in the units of scaled vectors; empty for a linear map.
        provenance: seed and counts.
    """

    network: FlatteningMap
    gaussians: ClassGaussians
    shift: Tensor
    scale: float
    invariants: int
    config: ManifoldConfig
    class_names: tuple[str, ...]
    reference_distances: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """D."""
        return len(self.shift)

    def to(self, device: torch.device | str) -> Self:
        """Move the map; the Gaussians stay on the CPU, because not every device has float64."""
        self.network.to(device)
        return self

    def to_flat_space(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """vectors (N, D), labels (N,) -> z (N, D) float32. Raises FaroutError for other shapes, values or labels."""
        vectors, labels = _check_vectors(vectors, labels, self.class_names, self.dim)
        return apply_map(self.network, (vectors - self.shift) / self.scale, labels)

    def from_flat_space(self, z: Tensor, labels: Tensor) -> Tensor:
        """The inverse of `to_flat_space`, shift and scale included: float32 (N, D)."""
        z, labels = _check_vectors(z, labels, self.class_names, self.dim)
        return apply_map(self.network, z, labels, inverse=True) * self.scale + self.shift

    def distances(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """(z - m_c)^T C_c^-1 (z - m_c) / D of vectors (N, D) from the classes `labels` (N,): (N,) float64.

        About 1 for vectors that the Gaussians describe; compare with `reference_distances`.
        """
        return self.gaussians.distances(self.to_flat_space(vectors, labels), labels.cpu())

    def log_density(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """log p(x | c) = log N(z; m_c, C_c) - D log scale, (N,) float64."""
        return self._log_density(self.distances(vectors, labels), labels.cpu())

    def _log_density(self, distances: Tensor, labels: Tensor) -> Tensor:
        return self.gaussians.log_density(distances, labels) - self.dim * math.log(self.scale)

    def flatness(self, vectors: Tensor, labels: Tensor) -> dict[str, float]:
        """Flatness of the classes, in squared units of the vectors.

        `invariants`: mean squared norm of the k invariant coordinates; `reconstruction`: mean squared error of a vector
        that is reconstructed with these coordinates set to 0.
        """
        vectors, labels = _check_vectors(vectors, labels, self.class_names, self.dim)
        scaled = (vectors - self.shift) / self.scale
        invariants, reconstruction = measure_flatness(self.network, scaled, labels, self.invariants)
        return {"invariants": self.scale**2 * invariants, "reconstruction": self.scale**2 * reconstruction}

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(
        self,
        per_class: int,
        seed: int = 0,
        *,
        candidates: int | None = None,
        kept: int | None = None,
        temperature: float | None = None,
    ) -> SampledVectors:
        """Sample vectors of low density from every class.

        In rounds, `candidates` vectors are sampled from the Gaussian of a class, with deviations multiplied by
        `temperature`, and the `kept` ones with the lowest density are mapped back by the inverse map. In high
        dimensions almost all samples have about the same distance, so this selection is weak: with D = 768, the 10
        least likely of 3,330 are about 7 % farther than the others.

        Args:
            per_class: vectors per class; 100 in the paper, ten rounds of 10. A larger number adds rounds and leaves the
                first vectors unchanged.
            seed: seed of the samples, which do not depend on the number of classes.
            candidates: replaces that of `config`.
            kept: replaces that of `config`.
            temperature: replaces that of `config`.

        Raises FaroutError for values out of range.
        """
        options: dict[str, Any] = {"candidates": candidates, "kept": kept, "temperature": temperature}
        config = replace(self.config, **{name: value for name, value in options.items() if value is not None})
        if per_class < 1:
            raise FaroutError(f"per_class is {per_class}; expected 1 or more vectors of each class")
        classes = len(self.class_names)
        rounds = []
        # one round at a time, so that the bits of a round do not depend on the number of rounds
        for number in range(math.ceil(per_class / config.kept)):
            tails = [
                self.gaussians.sample_tail(
                    label,
                    number,
                    seed,
                    candidates=config.candidates,
                    kept=config.kept,
                    temperature=config.temperature,
                )
                for label in range(classes)
            ]
            z, labels = torch.cat(tails), torch.arange(classes).repeat_interleave(config.kept)
            distance = self.gaussians.distances(z, labels)
            rounds.append(
                SampledVectors(self.from_flat_space(z, labels), labels, self._log_density(distance, labels), distance)
            )

        def order_by_class(name: str) -> Tensor:
            """(rounds, classes x kept, …) -> (classes x per_class, …)."""
            values = torch.stack([getattr(one_round, name) for one_round in rounds])
            by_class = values.reshape(-1, classes, config.kept, *values.shape[2:]).transpose(0, 1).flatten(1, 2)
            return by_class[:, :per_class].flatten(0, 1)

        return SampledVectors(*(order_by_class(each.name) for each in fields(SampledVectors)))

    def compare_distances(self, samples: SampledVectors) -> dict[str, dict[str, float]]:
        """The 5 %, 50 % and 95 % quantiles of the distances of `sampled`, `training` and `held_out` vectors.

        If held-out vectors of a class are farther from it than the samples, the Gaussians are too narrow for the
        samples to be outliers: use regularization='held_out' or a larger reg_weight. If the held-out vectors were used
        to choose the shrinkage, their distances are not an independent check. If training vectors are far below 1,
        most of the covariance is regularization.
        """
        references = {name: values for name, values in self.reference_distances.items() if len(values)}
        quantiles = {"low": 0.05, "median": 0.5, "high": 0.95}
        return {
            name: {point: float(values.quantile(share)) for point, share in quantiles.items()}
            for name, values in {"sampled": samples.distance, **references}.items()
        }

    # -- folders -------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        return {
            **{f"network.{name}": value for name, value in self.network.state_dict().items()},
            "means": self.gaussians.means,
            "cholesky": self.gaussians.cholesky,
            "shift": self.shift,
            **{f"reference_distances.{name}": value for name, value in self.reference_distances.items()},
        }

    @property
    def content_hash(self) -> str:
        """SHA-256 of all fitted values."""
        return store.hash_tensors({**self._tensors(), "scale": torch.tensor(self.scale, dtype=torch.float64)})

    def save(self, folder: str | Path) -> None:
        """Write a folder: `config.json`, `manifold.safetensors`, a model card.

        Raises StoreError if a folder of another kind is there.
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
        card = [
            "# A farout manifold of class vectors",
            "",
            f"- {len(self.class_names)} classes, {self.dim} dimensions, of which {self.invariants} are invariants",
            f"- map: {self.config.map}; regularization: {self.config.regularization}, {self.gaussians.strength:.3g}",
            *(f"- {name}: {value}" for name, value in self.provenance.items()),
            "",
            "Distances of new vectors: `Manifold.load(folder).distances(vectors, labels)`.",
            "",
        ]
        with store.atomic_folder(folder, KIND) as temporary:
            store.save_tensors(temporary / "manifold.safetensors", self._tensors())
            store.write_config(temporary, KIND, content)
            (temporary / "README.md").write_text("\n".join(card), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Manifold:
        """Read a folder that `save` wrote; the map is on the CPU.

        Raises StoreError for a folder that is missing, incomplete, altered or of another kind.
        """
        path = find_path(folder)
        content = store.read_config(path, KIND)
        check_content(content, _Content, str(path / "config.json"))
        config = create_dataclass(ManifoldConfig, content["config"], f"{path / 'config.json'}: config")
        store.check_hashes(path)
        # the memory alignment of a mapped file changes the last bits of what is computed with its tensors
        tensors = {name: tensor.clone() for name, tensor in store.load_tensors(path / "manifold.safetensors").items()}

        def select(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        with store.explain_load_errors(path):
            names = tuple(content["class_names"])
            weights = select("network.")
            network: FlatteningMap
            if config.map == "linear":
                network = ClassRotations(weights["means"], weights["axes"])
            else:
                network = create_network(len(tensors["shift"]), len(names), config, 0)
                network.load_state_dict(weights)
            manifold = cls(
                network.eval(),
                ClassGaussians(tensors["means"], tensors["cholesky"], content["strength"]),
                shift=tensors["shift"],
                scale=content["scale"],
                invariants=content["invariants"],
                config=config,
                class_names=names,
                reference_distances=select("reference_distances."),
                history=content["history"],
                provenance=content["provenance"],
            )
        if manifold.content_hash != content["content_hash"]:
            raise StoreError(f"{path}: the numbers are not those that were saved (their hash differs)")
        return manifold


def fit_manifold(
    vectors: Tensor,
    labels: Tensor,
    config: ManifoldConfig | None = None,
    classes: int | Sequence[str] | None = None,
    seed: int = 0,
    checkpoints: Path | None = None,
) -> Manifold:
    """Train a map that flattens the classes of `vectors`, and fit a Gaussian to each class in the flat space.

    Args:
        vectors: (N, D), D at least 2.
        labels: int64 (N,), 0 to classes - 1; two or more vectors of each class.
        config: settings; None: the defaults.
        classes: number or names of the classes; None: as many as the largest label requires.
        seed: seed of the held-out vectors, of the network and of the order of its training.
        checkpoints: folder of the training's checkpoints; training continues from the newest one to the same bits.

    Raises:
        FaroutError: for other shapes, values that are not finite, labels without a class, classes with fewer than two
            vectors or with equal ones, and if training diverges.
        StoreError: for checkpoints of another training.

    Warns if classes have no more vectors than dimensions.
    """
    config = config or ManifoldConfig()
    if classes is None:
        classes = int(labels.max()) + 1 if labels.numel() else 0
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
    if not names:
        raise FaroutError("a manifold requires at least one class, got none")
    vectors, labels = _check_vectors(vectors, labels, names)
    check_class_sizes(labels, names)
    dim = vectors.shape[1]
    fit, held_out = split_vectors(labels, len(names), config, seed)
    for label, name in enumerate(names):
        rows = vectors[fit][labels[fit] == label]
        if bool((rows == rows[0]).all()):
            raise FaroutError(
                f"all {len(rows)} vectors of the class {name!r} are equal; they require one of each image, after at "
                "least one step of embedding"
            )
    counts = labels[fit].bincount(minlength=len(names))
    config = config.resolve_regularization(int(counts.min()), len(held_out), dim)
    _warn_about_small_classes(counts, names, dim, config)

    # standardize: x = (vectors - shift) / scale
    mean = vectors[fit].double().mean(0)
    scale = float((vectors[fit].double() - mean).square().mean().sqrt()) if config.scale else 1.0
    shift = mean.float() if config.center else torch.zeros_like(vectors[0])
    x = (vectors - shift) / scale

    # k: the integer part of the mean over classes, but at least one coordinate varies
    class_counts = count_invariants(x[fit], labels[fit], len(names), config.pca_variance)
    invariants = sum(class_counts) // len(class_counts)
    if invariants == dim:
        warnings.warn(
            f"one direction explains nearly all of every class, so that all {dim} coordinates would be invariants; one "
            "is kept: look at the vectors, or give a smaller pca_variance",
            FaroutWarning,
            stacklevel=2,
        )
        invariants = dim - 1

    # z = f(x, c)
    network: FlatteningMap
    history: list[dict[str, float]] = []
    if config.map == "linear":
        network = ClassRotations.fit(x[fit], labels[fit], len(names)).eval()
    else:
        network, history = train_network(
            x[fit],
            labels[fit],
            (x[held_out], labels[held_out]),
            classes=len(names),
            invariants=invariants,
            config=config,
            seed=seed,
            out=checkpoints,
        )
    z = apply_map(network, x, labels)

    # N(m_c, C_c)
    if config.regularization == "held_out":
        gaussians = ClassGaussians.fit_shrinkage(z[fit], labels[fit], names, (z[held_out], labels[held_out]))
    else:
        is_relative = config.regularization == "relative"
        # an absolute weight is in the units of the vectors, the covariance in those of x
        weight = config.reg_weight if is_relative else config.reg_weight / scale**2
        gaussians = ClassGaussians.fit_ridge(z[fit], labels[fit], names, weight, relative=is_relative)
    return Manifold(
        network,
        gaussians,
        shift,
        scale,
        invariants,
        config,
        names,
        reference_distances={
            name: gaussians.distances(z[rows], labels[rows])
            for name, rows in {"training": fit, "held_out": held_out}.items()
        },
        history=history,
        provenance={"seed": seed, "vectors": len(x), "training": len(fit), "held_out": len(held_out)},
    )


def _check_vectors(
    vectors: Tensor, labels: Tensor, names: Sequence[str], dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """Both on the CPU, as float32 (N, D) and int64 (N,); raises FaroutError for other shapes, values or labels."""
    vectors, labels = vectors.detach().cpu().float(), labels.detach().cpu()
    if vectors.ndim != 2 or vectors.shape[1] < 2 or (dim is not None and vectors.shape[1] != dim):
        expected = "at least 2" if dim is None else str(dim)
        raise FaroutError(f"vectors must have the shape (N, D) with D {expected}, got {tuple(vectors.shape)}")
    if labels.shape != (len(vectors),) or labels.is_floating_point() or labels.is_complex():
        raise FaroutError(
            f"labels require one whole number for each of {len(vectors)} vectors, got {tuple(labels.shape)} of "
            f"{labels.dtype}"
        )
    if not torch.isfinite(vectors).all():
        bad = int((~torch.isfinite(vectors)).any(1).sum())
        raise FaroutError(f"{bad} of {len(vectors)} vectors hold values that are not finite numbers; leave them out")
    labels = labels.long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise FaroutError(
            f"labels run from 0 to {len(names) - 1} for {len(names)} classes, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    return vectors, labels


def check_class_sizes(labels: Tensor, names: Sequence[str]) -> None:
    """Raise FaroutError for a class with fewer than two vectors."""
    for name, count in zip(names, labels.bincount(minlength=len(names)).tolist(), strict=True):
        if count < 2:
            raise FaroutError(
                f"the class {name!r} has {count} vector{'s' * (count != 1)}; a Gaussian requires 2 or more: embed more "
                "of its images"
            )


def split_vectors(labels: Tensor, classes: int, config: ManifoldConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Split each class at random; return the sorted indices of the vectors to fit, two or more per class, and of the
    held-out ones.

    Raises FaroutError if no vector can be held out, but the regularization needs some; otherwise warns.
    """
    fit, held_out = [], []
    for label in range(classes):
        rows = (labels == label).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed_of(seed, "split", label))
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = min(int(config.held_out * len(rows)), len(rows) - 2)
        remaining = rows[count:]
        held_out.append(rows[:count])
        fit.append(remaining[: max(2, round(config.train_fraction * len(remaining)))])
    fit_rows, held_out_rows = torch.cat(fit).sort().values, torch.cat(held_out).sort().values
    if config.held_out and not len(held_out_rows):
        if config.regularization == "held_out":
            raise FaroutError("classes are too small to hold vectors out; give more, or regularization='relative'")
        warnings.warn("classes are too small to hold vectors out; none are held out", TooFewImagesWarning, stacklevel=3)
    return fit_rows, held_out_rows


def _warn_about_small_classes(counts: Tensor, names: Sequence[str], dim: int, config: ManifoldConfig) -> None:
    """Warn about classes whose vectors do not span the space; `config` with the resolved regularization."""
    too_small = int((counts <= dim).sum())
    if too_small:
        smallest = int(counts.argmin())
        advice = "compare held-out distances with those of samples"
        advice += ", or give regularization='held_out'" * (config.regularization != "held_out")
        warnings.warn(
            f"{too_small} of {len(names)} classes have no more vectors to fit to than the {dim} dimensions (the "
            f"fewest: {int(counts[smallest])}, of {names[smallest]!r}): in some directions their variance is that of "
            f"the regularization ({config.regularization}); {advice}",
            TooFewImagesWarning,
            stacklevel=3,
        )
