"""The GPU's kernels. Importing them imports triton.

``basis``, ``rank_per_query`` and ``rank_mean_query`` score keys, ``order`` sorts them, ``tail`` and ``unvisited``
estimate the mass left out. ``forward`` attends to ranked keys, ``exact`` to all in position order, ``packed`` too over
several sequences; ``tile`` has their shared pieces. ``compare_mask`` reads masks.

May import: ``support``, ``pages``, ``core``, ``ranking``, ``exact``.
"""
