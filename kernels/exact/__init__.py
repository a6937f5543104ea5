"""Attention over every visible key by torch's own operators, and the steps that follow any executor.

``sdpa`` is the dense path, ``formula`` serves softcap, sinks and any mask tensor. ``chunked`` folds chunks into the
batch, ``dense_heads`` runs marked heads, ``epilogue`` puts in sinks and fully masked rows.

May import: ``support``, ``core``.
"""
