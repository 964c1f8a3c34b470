"""Outlier synthesizers. A new one is a subclass of `Synthesizer` in a file of its own, and one line in this table."""

from farout.core.registry import Registry

__all__ = ["SYNTHESIZERS"]

SYNTHESIZERS = Registry(
    "synthesizer",
    "farout.synthesizers",
    {
        "class_noise": (
            "farout.synthesis.class_noise:ClassNoise",
            "class embeddings with Gaussian noise, decoded; the baseline of every synthesizer",
        ),
        "dream_ood": (
            "farout.synthesis.dream_ood:DreamOOD",
            "images decoded from beyond the boundary of each class in embedding space (Du et al. 2023)",
        ),
        "ncis": (
            "farout.synthesis.ncis:NCIS",
            "images decoded from regions of low density of each class's manifold (Doorenbos et al. 2024)",
        ),
        "sdedit": (
            "farout.synthesis.editing.sdedit:SDEdit",
            "images noised part of the way and denoised under another class; the baseline of sona (Meng et al. 2022)",
        ),
        "sona": (
            "farout.synthesis.editing.sona:SONA",
            "images whose semantic region is edited to another class, with the rest kept (Yoon et al. 2025)",
        ),
    },
)
