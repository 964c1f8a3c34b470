"""The generative core: schedules, denoisers, solvers, noise and models. It knows nothing of detection."""
