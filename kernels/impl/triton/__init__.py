"""The GPU's kernels: ranking, ordering, and attention over ranked or all keys. Importing them imports triton.

May import: ``core``, ``ranking``, ``exact``, ``support``.
"""
