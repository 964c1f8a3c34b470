"""Frozen backbones, a cache of their features, and densities, distances and diffusion models of features."""
