"""Reads and writes captured graphs: nodes, sizes, calls, writes in place. It knows no attention.

``rejected`` holds ``Refused`` and ``Rejected``, the reasons of all passes. ``calls`` and ``mutations`` say what is
written in place, ``operand`` defers view steps, ``inlining``, ``dead_code`` and ``exported`` change a graph.

May import: ``kernels/support``.
"""
