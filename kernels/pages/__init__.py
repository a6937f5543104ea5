"""Keys and values in pages of a cache: where they lie (``table``), and what chunks of a prefill keep of them.

May import: ``support``.
"""
