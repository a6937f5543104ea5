"""The method in torch: scores of keys, the mean value of keys left out, the estimate of unvisited mass.

Plain torch, and the constants that every implementation shares. May import: ``core``, ``support``.
"""
