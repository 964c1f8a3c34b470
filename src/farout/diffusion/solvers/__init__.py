"""Numerical methods that integrate the probability flow ODE from one noise level to another."""
