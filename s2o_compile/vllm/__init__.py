"""S2O as an attention backend of vLLM: `plugin.register` is the entry point, docs/serving.md says how to use it.

May import: ``kernels/support``, ``kernels/pages``, ``kernels/core``, ``kernels``, ``kernels/calls``, ``s2o_compile``,
``serving``.
"""
