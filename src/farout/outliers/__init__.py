"""Synthetic outliers: images that lie outside the classes, made by a generator of these."""
