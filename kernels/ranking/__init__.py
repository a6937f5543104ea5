"""Which keys matter, in plain torch, with the constants that every implementation shares.

``per_query`` and ``mean_query`` score keys. ``tail`` is the mean value of keys left out, ``unvisited`` estimates their
mass before anything is attended.

May import: ``support``, ``pages``, ``core``.
"""
