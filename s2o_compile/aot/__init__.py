"""Programs that leave Python: ``export``, then ``package``, with ``lower_ops`` and ``inductor_workarounds`` behind."""
