"""Rating detectors: metrics, intervals, controls, scored folders and pages."""
