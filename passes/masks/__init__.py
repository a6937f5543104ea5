"""Proves what a mask hides: index arithmetic, views and conjunctions of comparisons.

May import: ``graph``, ``kernels``.
"""
