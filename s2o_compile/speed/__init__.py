"""``bench``: a model in plain PyTorch, under torch.compile and through S2O, timed and judged.

May import: ``kernels/support``, ``kernels/pages``, ``kernels/core``, ``kernels``, ``kernels/calls``, ``s2o_compile``,
``capture``, ``quality``.
"""
