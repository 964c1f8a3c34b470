"""Synthesisers of outliers: `base.py` is the contract; every other public file that names one class is one method."""
