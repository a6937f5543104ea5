"""Sequences that several ranks hold in shards: which positions are whose, what is exchanged, and how ranks agree.

It knows no attention but the shapes of its tensors. ``kernels/calls/context_parallel.py`` attends over such a sequence.

May import: ``support``, ``core``.
"""
