"""The operator's decomposition for AOT packages: traceable, with symbolic lengths.

May import: ``core``, ``ranking``, ``exact``, ``support`` and ``impl.triton``.
"""
