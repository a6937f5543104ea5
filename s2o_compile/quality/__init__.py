"""The cost of sparse attention in quality: ``evaluate`` measures it, ``calibrate`` limits it, ``pictures`` show it.

May import: ``kernels/support``, ``kernels/pages``, ``kernels/core``, ``kernels``, ``kernels/calls``, ``s2o_compile``,
``kernels/exact``, ``capture``.
"""
