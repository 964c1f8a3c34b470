"""Many detectors on many sets: one plan, one set of networks, one set of definitions."""
