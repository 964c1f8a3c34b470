"""Synthetic outliers that are edited from in-distribution images."""
