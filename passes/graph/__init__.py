"""Reads and writes captured graphs: nodes, sizes, calls, writes in place. It knows no attention.

May import: ``kernels.support``.
"""
