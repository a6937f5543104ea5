"""Programs that leave Python: ``export``, then ``package``, with ``lower_ops`` and ``inductor_workarounds`` behind.

May import: ``kernels/support``, ``kernels/pages``, ``kernels/core``, ``kernels``, ``kernels/calls``, ``s2o_compile``,
``passes/graph``, ``capture``.
"""
