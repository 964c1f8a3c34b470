"""Frozen backbones and what is built on their features: a cache, distances, diffusion models of features."""
