"""The cost of sparse attention in quality: evaluation, calibration and pictures."""
