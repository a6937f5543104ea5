"""Tasks that long context is judged by: ``samples`` makes them, ``evaluate`` asks them, ``scores`` holds results.

May import: ``kernels/support``, ``kernels/pages``, ``kernels/core``, ``kernels``, ``kernels/calls``, ``s2o_compile``,
``capture``, ``quality``.
"""
