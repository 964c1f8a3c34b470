"""Scoring images with a fitted detector."""
