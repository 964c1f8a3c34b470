"""How far a set of images is from another in the features of a network: Fréchet and kernel distance.

On the features of Inception v3 these are FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018), comparable with
published figures. On those of the built-in backbone the same arithmetic gives `FD-lite0` and `KD-lite0`: they rank sets
of images alike, but are other numbers, and never called FID.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from farout.core import progress, store
from farout.core.chunking import BatchSize
from farout.core.devices import PrecisionChoice
from farout.core.errors import FaroutError, MissingExtraError, StoreError, TrapWarning
from farout.core.runtime import Runtime
from farout.data.batching import iterate_batches
from farout.data.decoding import quantize
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing, find_mismatches
from farout.data.sources import Images, open_source
from farout.features.extraction import CachedFeatures
from farout.features.extractor import FeatureExtractor

__all__ = ["FeatureName", "SetDistance", "frechet_distance", "kernel_distance", "set_distance"]

FeatureName = Literal["lite0", "inception"]
_NAMES = {"lite0": ("FD-lite0", "KD-lite0"), "inception": ("FID", "KID")}
_INCEPTION_SIDE = 299
_SUBSETS, _SUBSET = 100, 1000


@dataclass(frozen=True)
class SetDistance:
    """What `set_distance` found.

    frechet_name, kernel_name: what the numbers may be called; frechet: the Fréchet distance; kernel, kernel_std: mean
    and standard deviation of the kernel distance over `subsets` subsets of `subset_size` images of either set;
    generated, reference: numbers of images; dimension: of the features.
    """

    frechet_name: str
    kernel_name: str
    frechet: float
    kernel: float
    kernel_std: float
    generated: int
    reference: int
    dimension: int
    subsets: int
    subset_size: int


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features (N, D) and (M, D), in float64 (Heusel et al. 2017):
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2), which are exact where the
    covariances are singular too. Raises FaroutError for fewer than two rows or other features.
    """
    _check(first, second)
    parts = [np.asarray(each, dtype=np.float64) for each in (first, second)]
    covariances = [np.atleast_2d(np.cov(part, rowvar=False)) for part in parts]
    shift = float(np.square(parts[0].mean(0) - parts[1].mean(0)).sum())
    shared = float(np.linalg.svd(_root(covariances[0]) @ _root(covariances[1]), compute_uv=False).sum())
    return max(0.0, shift + sum(float(np.trace(each)) for each in covariances) - 2 * shared)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def kernel_distance(
    first: np.ndarray, second: np.ndarray, *, subsets: int = _SUBSETS, subset_size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the squared maximum mean discrepancy of features (N, D) and (M, D), unbiased,
    under the kernel (x y / D + 1)^3, over random subsets (Bińkowski et al. 2018).

    Args:
        first: features of one set, (N, D).
        second: features of the other set, (M, D).
        subsets: how many subsets are drawn.
        subset_size: images of either set in one; None: 1000, at most half of the smaller set.
        seed: seed of the subsets.

    Raises:
        FaroutError: for fewer than two rows, other features, or subsets that cannot be drawn.
    """
    _check(first, second)
    size = _subset_size(len(first), len(second)) if subset_size is None else subset_size
    if subsets < 1 or not 2 <= size <= min(len(first), len(second)):
        raise FaroutError(
            f"{subsets} subsets of {size} cannot be drawn of {len(first)} and {len(second)} images; subset_size is at "
            "least 2 and at most the smaller set"
        )
    generator = np.random.default_rng(seed)
    parts = [np.asarray(each, dtype=np.float64) for each in (first, second)]
    found = [_discrepancy(*(part[generator.permutation(len(part))[:size]] for part in parts)) for _ in range(subsets)]
    return float(np.mean(found)), float(np.std(found))


def _subset_size(first: int, second: int) -> int:
    return min(_SUBSET, max(2, min(first, second) // 2))


def _discrepancy(first: np.ndarray, second: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(values: np.ndarray) -> float:
        return float((values.sum() - np.trace(values)) / (len(values) * (len(values) - 1)))

    inside = mean_of_pairs(kernel(first, first)) + mean_of_pairs(kernel(second, second))
    return inside - 2 * float(kernel(first, second).mean())


def _check(first: np.ndarray, second: np.ndarray) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise FaroutError(f"features must have the shapes (N, D) and (M, D), got {first.shape} and {second.shape}")
    if min(len(first), len(second)) < 2:
        raise FaroutError(
            f"a distance of sets requires two images of each at least, got {len(first)} and {len(second)}"
        )


def set_distance(
    generated: Images,
    source: Images,
    *,
    features: FeatureName = "lite0",
    limit: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    precision: PrecisionChoice = "fp32",
    batch_size: BatchSize = "auto",
    workers: int = 2,
) -> SetDistance:
    """Compute FID and KID of generated images, or the same distances on the built-in backbone.

    Every image is brought to the native size of the real ones first, which are best images that the generator was not
    trained on.

    Args:
        generated: generated images: a folder, or any other image source.
        source: real images: a named set, folder, glob, file, or hf://owner/name:split.
        features: `lite0` (FD-lite0 and KD-lite0, no download) or `inception` (FID and KID; downloads weights).
        limit: use a seeded random sample of this many images of each source; default: all.
        seed: seed of the samples and of KID's subsets.
        out: JSON file of the results; default: print them only.
        device: device of the feature network: `auto` (CUDA if present, else CPU), `cpu`, `cuda`, `cuda:1`, `mps`.
        precision: precision of lite0; compare only results of the same precision. inception always runs in fp32.
        batch_size: maximum number of images processed together; `auto`: set by memory.
        workers: number of threads that decode images.

    Raises:
        FaroutError: for an unknown network, fewer than two images, or Inception in another precision than fp32.
        MissingExtraError: for `inception` without the extra `farout[fid]`.
        StoreError: where the weights of Inception cannot be fetched.
    """
    if features not in _NAMES:
        raise FaroutError(f"features are {' or '.join(_NAMES)}, got {features!r}")
    runtime = Runtime(device, _precision(features, precision), batch_size, workers).resolved()
    sources = [open_source(each, limit=limit, seed=seed) for each in (generated, source)]
    read = (_lite0 if features == "lite0" else _inception)(sources[1], runtime)
    first, second = (read(source) for source in sources)
    _check(first, second)
    _warn_of_few(_NAMES[features][0], len(first), len(second), first.shape[1])
    size = _subset_size(len(first), len(second))
    kernel, spread = kernel_distance(first, second, subset_size=size, seed=seed)
    counts = (len(first), len(second), first.shape[1], _SUBSETS, size)
    found = SetDistance(*_NAMES[features], frechet_distance(first, second), kernel, spread, *counts)
    if out is not None:
        about: dict[str, Any] = {"sources": [source.name for source in sources], "limit": limit, "seed": seed}
        about |= {"features": features, "precision": runtime.precision, "versions": store.versions()}
        store.write_json(out, {**asdict(found), **about})
    return found


def _precision(features: FeatureName, precision: PrecisionChoice) -> PrecisionChoice:
    """The precision that features are computed in."""
    if features == "lite0":
        return precision
    if precision not in ("auto", "fp32"):
        raise FaroutError(
            f"Inception's features are computed in fp32, as published figures are; precision {precision} goes with "
            "features=lite0"
        )
    return "fp32"


def _warn_of_few(name: str, generated: int, reference: int, dimension: int) -> None:
    if min(generated, reference) <= dimension:
        warnings.warn(
            f"{name} of {generated} and {reference} images in {dimension} dimensions is biased upwards, because fewer "
            "images than dimensions do not determine a covariance: compare it with sets of the same size only, or "
            "look at "
            "the kernel distance, which has no such bias",
            TrapWarning,
            stacklevel=3,
        )


Reader = Callable[[ImageSource], np.ndarray]
"""From images to features (N, D)."""


def _lite0(reference: ImageSource, runtime: Runtime) -> Reader:
    """Reads features of the built-in backbone, through the cache."""
    extractor = FeatureExtractor.create("lite0").to(runtime.device)
    preprocessing = Preprocessing.for_source(reference, size=extractor.size, channels=3)
    reader = CachedFeatures(extractor, preprocessing, runtime.batch_size, runtime.precision)  # type: ignore[arg-type]

    def features(source: ImageSource) -> Iterator[Tensor]:
        for batch in reader.batches(source, runtime.images_per_batch((1,)), runtime.workers):
            assert batch.features is not None
            yield batch.features

    return lambda source: _read(source, preprocessing, features(source))


def _inception(reference: ImageSource, runtime: Runtime) -> Reader:
    """Reads the 2048 pooled features of Inception v3 as torchmetrics has them; they stay in float32."""
    network = _inception_network().to(runtime.device)
    native = Preprocessing.for_source(reference, channels=3, largest=10**6)

    def features(source: ImageSource) -> Iterator[Tensor]:
        size = runtime.images_per_batch((3, _INCEPTION_SIDE, _INCEPTION_SIDE))
        for batch in iterate_batches(source, native, size, workers=runtime.workers):
            pixels = quantize(batch.images).to(runtime.device)
            yield network(pixels).reshape(len(pixels), -1).float().cpu()

    return lambda source: _read(source, native, features(source))


def _read(source: ImageSource, preprocessing: Preprocessing, features: Iterator[Tensor]) -> np.ndarray:
    """All features (N, D), with progress; warns of images of another native size."""
    for trap in find_mismatches(source, preprocessing):
        # every image is seen in colour here, grey ones included: nothing is lost
        if "native size" in trap:
            warnings.warn(trap, TrapWarning, stacklevel=5)
    parts: list[Tensor] = []
    with progress.task(f"features of {source.name}", len(source)) as bar, torch.no_grad():
        for part in features:
            parts.append(part)
            bar.advance(len(part))
    return torch.cat(parts).numpy()


def _inception_network() -> nn.Module:
    try:
        import torch_fidelity  # noqa: F401
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        hint = (
            'FID requires torchmetrics and torch-fidelity: pip install "farout[fid]"; or use features=lite0 (FD-lite0)'
        )
        raise MissingExtraError(hint) from error
    try:
        built: Any = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except OSError as error:  # urllib's errors are OSErrors
        raise StoreError(
            f"the weights of Inception v3 cannot be fetched ({error}); go online once, or use features=lite0, whose "
            "weights are installed (and whose distance is FD-lite0, not FID)"
        ) from error
    return built
