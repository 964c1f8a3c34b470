"""Benchmarks: many detectors on the same image sets and networks, from one YAML file."""
