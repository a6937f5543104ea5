"""Programs that leave Python: ``export``, ``package``, and the workarounds for Inductor behind them."""
