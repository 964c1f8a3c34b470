"""Conditions of a denoiser: classes and text prompts."""
