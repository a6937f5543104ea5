"""The CPU's executor in plain torch: ``forward`` over ranked keys, ``exact`` in position order, ``blocks`` for both.

May import: ``core``, ``ranking``, ``exact``, ``support``.
"""
