"""Tasks that long context is judged by: ``samples`` makes them, ``evaluate`` asks them, ``scores`` holds results."""
