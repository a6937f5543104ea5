"""Attention over every visible key by torch's own operators, and the steps that follow any executor.

May import: ``core``, ``support``.
"""
