"""Where a sequence lies: in pages of a cache (``table``), or where only the device knows (``sizes``).

``prefill_cache`` holds what chunks of a prefill keep of their keys.

May import: ``support``.
"""
