"""The cost of sparse attention in quality: ``evaluate`` measures it, ``calibrate`` limits it, ``pictures`` show it."""
