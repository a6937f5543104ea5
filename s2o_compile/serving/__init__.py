"""S2O in servers: shared by the plugins of vLLM, vllm-omni and SGLang. Nothing here imports a server by itself.

May import: ``kernels/support``, ``kernels/pages``, ``kernels/core``, ``kernels``, ``kernels/calls``, ``s2o_compile``.
"""
