"""Diffusion models: schedules, denoisers, solvers, conditioning, training and sampling; independent of detection."""
