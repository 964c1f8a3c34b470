"""What a denoiser is conditioned on: classes and text prompts."""
