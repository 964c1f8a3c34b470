"""Detectors: `base.py` is the contract; every other public file is one method."""
