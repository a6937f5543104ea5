"""The command line ``s2o``: ``main`` has its commands, ``options`` and ``loading`` are shared by them.

May import: ``kernels/support``, ``kernels/pages``, ``kernels/core``, ``kernels``, ``kernels/calls``, ``s2o_compile``,
``quality``, ``quality/tasks``, ``speed``.
"""
