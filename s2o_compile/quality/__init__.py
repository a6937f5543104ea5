"""What sparse attention costs in quality: evaluation, calibration and pictures."""
