"""Detectors. A new one is a file with a subclass of `Detector`, and its line in the table below."""

from farout.core.registry import Registry

__all__ = ["DETECTORS"]

DETECTORS = Registry(
    "detector",
    "farout.detectors",
    {
        "autoencoder": (
            "farout.detectors.autoencoder:AutoEncoder",
            "reconstruction error of features by a bottleneck network; the baseline of the semantic paper",
        ),
        "denoising": (
            "farout.detectors.denoising:Denoising",
            "change of a classifier's output when the image is noised and denoised under its class (Liu et al. 2022)",
        ),
        "diffpath": (
            "farout.detectors.diffpath:DiffPath",
            "speed and curvature of the deterministic path from image to noise (Heng et al. 2024)",
        ),
        "ensemble": (
            "farout.detectors.ensemble:Ensemble",
            "several detectors combined into one score, from one pass over shared networks and features",
        ),
        "gmm": ("farout.detectors.gmm:GMM", "Gaussian mixture density on principal components of features"),
        "knn": (
            "farout.detectors.knn:KNN",
            "distance to the k-th nearest normal image in feature space (Sun et al. 2022)",
        ),
        "mahalanobis": (
            "farout.detectors.mahalanobis:Mahalanobis",
            "Mahalanobis distance of features; class-conditional and relative with labels (Lee et al. 2018)",
        ),
        "msma": (
            "farout.detectors.msma:MSMA",
            "density of the score norms of an image at many noise levels (Mahmood et al. 2021)",
        ),
        "patches": (
            "farout.detectors.patches:Patches",
            "heat maps: features at every position, by diffusion and by nearest neighbors",
        ),
        "pca": (
            "farout.detectors.pca:PCA",
            "residual of features outside their leading principal components (Wang et al. 2022)",
        ),
        "posthoc": (
            "farout.detectors.posthoc:Posthoc",
            "scores of a classifier's logits and features: MSP, energy, ViM, KNN, ReAct, ASH and others",
        ),
        "reconstruction": (
            "farout.detectors.reconstruction:Reconstruction",
            "error between an image and its reconstructions from many noise levels (Graham et al. 2023)",
        ),
        "semantic": (
            "farout.detectors.semantic:Semantic",
            "error between features of several layers and their reconstructions (Yang et al. 2024)",
        ),
    },
)
