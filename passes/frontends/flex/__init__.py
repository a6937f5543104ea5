"""Finds flex_attention. ``match`` proves it through the eager frontend; ``sparse`` keeps functions that nobody proved.

``scalar_functions`` writes functions of one score out for all scores, ``block_tables`` proves the tables of a
BlockMask.

May import: ``kernels/support``, ``kernels/core``, ``graph``, ``masks``, ``passes``, ``kernels/pages``,
``kernels/ranking``, ``kernels/exact``, ``kernels``, ``kernels/calls``, ``frontends``, ``frontends/eager``.
"""
