"""Distances between two sets of images in the features of a network: Fréchet and kernel distance.

On features of Inception v3 these are FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018), comparable with
published values. On features of the built-in backbone the same formulas give `FD-lite0` and `KD-lite0`, which rank sets
of images similarly, but are other numbers and are never called FID.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from farout.core import progress, store
from farout.core.chunking import BatchSize
from farout.core.devices import PrecisionChoice
from farout.core.errors import FaroutError, MisleadingResultWarning, MissingExtraError, StoreError
from farout.core.names import expand_path
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
_SUBSETS, _LARGEST_SUBSET = 100, 1000


@dataclass(frozen=True)
class SetDistance:
    """Result of `set_distance`.

    Attributes:
        frechet_name: name of the Fréchet distance: FID or FD-lite0.
        kernel_name: name of the kernel distance: KID or KD-lite0.
        frechet: Fréchet distance.
        kernel: mean of the kernel distance over the subsets.
        kernel_std: standard deviation of the kernel distance over the subsets.
        generated: number of generated images.
        reference: number of real images.
        dimension: dimension of the features.
        subsets: number of subsets.
        subset_size: number of images of either set in one subset.
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
    """Fréchet distance of two Gaussians fitted to features, in float64 (Heusel et al. 2017):

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The trace of the square root is the sum of the singular values of C1^(1/2) C2^(1/2), which are exact for singular
    covariances too.

    Args:
        first: features (N, D).
        second: features (M, D).

    Raises:
        FaroutError: fewer than two rows, or different dimensions.
    """
    _check_features(first, second)
    (mean_1, root_1, trace_1), (mean_2, root_2, trace_2) = _gaussian_moments(first), _gaussian_moments(second)
    trace_of_root = float(np.linalg.svd(root_1 @ root_2, compute_uv=False).sum())
    return max(0.0, float(np.square(mean_1 - mean_2).sum()) + trace_1 + trace_2 - 2 * trace_of_root)


def _gaussian_moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, square root of the covariance, and trace of the covariance."""
    features = np.asarray(features, dtype=np.float64)
    covariance = np.atleast_2d(np.cov(features, rowvar=False))
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return features.mean(0), root, float(np.trace(covariance))


def kernel_distance(
    first: np.ndarray, second: np.ndarray, *, subsets: int = _SUBSETS, subset_size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy under the kernel (x y / D + 1)^3 (Bińkowski et al. 2018).

    Args:
        first: features (N, D).
        second: features (M, D).
        subsets: number of random subsets.
        subset_size: images of either set in one subset; None: 1000, at most half of the smaller set.
        seed: seed of the subsets.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        FaroutError: fewer than two rows, different dimensions, or subsets that are larger than a set.
    """
    _check_features(first, second)
    size = _default_subset_size(len(first), len(second)) if subset_size is None else subset_size
    if subsets < 1 or not 2 <= size <= min(len(first), len(second)):
        raise FaroutError(
            f"{subsets} subsets of {size} cannot be drawn from {len(first)} and {len(second)} images; subset_size is "
            "at least 2 and at most the size of the smaller set"
        )
    generator = np.random.default_rng(seed)
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    values = []
    for _ in range(subsets):
        x = first[generator.permutation(len(first))[:size]]
        y = second[generator.permutation(len(second))[:size]]
        within = _mean_off_diagonal(_kernel(x, x)) + _mean_off_diagonal(_kernel(y, y))
        values.append(within - 2 * float(_kernel(x, y).mean()))
    return float(np.mean(values)), float(np.std(values))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _mean_off_diagonal(values: np.ndarray) -> float:
    """Mean over pairs of different images, which makes the estimate unbiased."""
    return float((values.sum() - np.trace(values)) / (len(values) * (len(values) - 1)))


def _default_subset_size(first: int, second: int) -> int:
    return min(_LARGEST_SUBSET, max(2, min(first, second) // 2))


def _check_features(first: np.ndarray, second: np.ndarray) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise FaroutError(f"features must have the shapes (N, D) and (M, D), got {first.shape} and {second.shape}")
    if min(len(first), len(second)) < 2:
        raise FaroutError(f"a distance requires at least two images of each set, got {len(first)} and {len(second)}")


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

    Every image is first resized to the native size of the real images. The real images should not be those that the
    generator was trained on.

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
        FaroutError: an unknown network, fewer than two images, or Inception in another precision than fp32.
        MissingExtraError: `inception` without the extra `farout[fid]`.
        StoreError: the weights of Inception cannot be downloaded.
    """
    if features not in _NAMES:
        raise FaroutError(f"features must be {' or '.join(_NAMES)}, got {features!r}")
    if features == "inception" and precision not in ("auto", "fp32"):
        raise FaroutError(
            f"Inception's features are computed in fp32, as published values are; use features=lite0 for {precision}"
        )
    runtime = Runtime(device, "fp32" if features == "inception" else precision, batch_size, workers).resolve_auto()
    generated_images, real_images = (open_source(source, limit=limit, seed=seed) for source in (generated, source))
    extract = (_lite0_features if features == "lite0" else _inception_features)(real_images, runtime)
    first, second = extract(generated_images), extract(real_images)
    _check_features(first, second)
    frechet_name, kernel_name = _NAMES[features]
    dimension = first.shape[1]
    if min(len(first), len(second)) <= dimension:
        warnings.warn(
            f"{frechet_name} of {len(first)} and {len(second)} images in {dimension} dimensions is biased upwards, "
            "because fewer images than dimensions do not determine a covariance: compare it with sets of the same size "
            "only, or use the kernel distance, which has no such bias",
            MisleadingResultWarning,
            stacklevel=2,
        )
    subset_size = _default_subset_size(len(first), len(second))
    kernel, kernel_std = kernel_distance(first, second, subset_size=subset_size, seed=seed)
    distance = SetDistance(
        frechet_name=frechet_name,
        kernel_name=kernel_name,
        frechet=frechet_distance(first, second),
        kernel=kernel,
        kernel_std=kernel_std,
        generated=len(first),
        reference=len(second),
        dimension=dimension,
        subsets=_SUBSETS,
        subset_size=subset_size,
    )
    if out is not None:
        settings = {
            "sources": [generated_images.name, real_images.name],
            "limit": limit,
            "seed": seed,
            "features": features,
            "precision": runtime.precision,
            "versions": store.versions(),
        }
        store.write_json(expand_path(out), {**asdict(distance), **settings})
    return distance


Extract = Callable[[ImageSource], np.ndarray]
"""From images to features (N, D)."""


def _lite0_features(reference: ImageSource, runtime: Runtime) -> Extract:
    """Features of the built-in backbone, from the feature cache if they are stored there."""
    extractor = FeatureExtractor.create("lite0").to(runtime.device)
    preprocessing = Preprocessing.for_source(reference, size=extractor.size, channels=3)
    cached = CachedFeatures(extractor, preprocessing, runtime.batch_size, runtime.precision)  # type: ignore[arg-type]

    def features(source: ImageSource) -> Iterator[Tensor]:
        for batch in cached.batches(source, runtime.images_per_batch((1,)), runtime.workers):
            assert batch.features is not None
            yield batch.features

    return lambda source: _collect_features(source, preprocessing, features(source))


def _inception_features(reference: ImageSource, runtime: Runtime) -> Extract:
    """The 2048 pooled features of torchmetrics' Inception v3, in float32."""
    network = _load_inception().to(runtime.device)
    preprocessing = Preprocessing.for_source(reference, channels=3, largest=10**6)

    def features(source: ImageSource) -> Iterator[Tensor]:
        size = runtime.images_per_batch((3, _INCEPTION_SIDE, _INCEPTION_SIDE))
        for batch in iterate_batches(source, preprocessing, size, workers=runtime.workers):
            pixels = quantize(batch.images).to(runtime.device)
            yield network(pixels).reshape(len(pixels), -1).float().cpu()

    return lambda source: _collect_features(source, preprocessing, features(source))


def _collect_features(source: ImageSource, preprocessing: Preprocessing, features: Iterator[Tensor]) -> np.ndarray:
    """All features (N, D), with progress; warns of images of another native size."""
    for mismatch in find_mismatches(source, preprocessing):
        # mismatches of the channels do not matter: gray images are converted to RGB without loss
        if "native size" in mismatch:
            warnings.warn(mismatch, MisleadingResultWarning, stacklevel=4)
    parts: list[Tensor] = []
    with progress.task(f"features of {source.name}", len(source)) as bar, torch.no_grad():
        for part in features:
            parts.append(part)
            bar.advance(len(part))
    return np.asarray(torch.cat(parts).numpy())


def _load_inception() -> nn.Module:
    try:
        import torch_fidelity  # noqa: F401
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise MissingExtraError(
            'FID requires torchmetrics and torch-fidelity: pip install "farout[fid]"; or use features=lite0 (FD-lite0)'
        ) from error
    try:
        network: nn.Module = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except OSError as error:  # urllib's errors are OSErrors
        raise StoreError(
            f"the weights of Inception v3 cannot be downloaded ({error}); go online once, or use features=lite0, whose "
            "weights are installed (and whose distance is FD-lite0, not FID)"
        ) from error
    return network
