"""Proves masks: index arithmetic, views and conjunctions of comparisons.

May import: ``graph``, ``kernels``.
"""
