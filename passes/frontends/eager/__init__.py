"""Finds hand-written attention from its softmax: ``scores`` before it, ``probabilities`` and ``product`` behind it.

May import: ``kernels/support``, ``kernels/core``, ``graph``, ``masks``, ``passes``, ``frontends``.
"""
