"""Frozen backbones and the distances built on them."""
