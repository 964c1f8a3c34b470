"""Evaluation of detectors: metrics, confidence intervals, baselines, and distances between image sets."""
