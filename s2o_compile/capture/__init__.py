"""Captures a model: ``compiled_copy``, ``generation_masks`` made inside the graph, the ``audit`` of what really ran.

May import: ``kernels/support``, ``kernels``, ``kernels/calls``, ``passes``.
"""
