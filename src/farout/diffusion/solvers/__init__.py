"""Numerical methods that integrate from noise to image, and back."""
