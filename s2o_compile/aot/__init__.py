"""Programs that leave Python: ``export``, ``package``, and what Inductor needs for them."""
