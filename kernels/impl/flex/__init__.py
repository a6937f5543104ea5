"""The executor that torch compiles: FlexAttention over gathered keys, for devices and functions beyond our own kernels.

May import: ``core``, ``ranking``, ``exact``, ``support`` and ``impl.triton``.
"""
