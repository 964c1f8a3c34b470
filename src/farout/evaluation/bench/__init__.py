"""Many detectors on many sets, and a page of them."""
