"""Proves masks for every length, or says why not.

``prover`` is the entrance and ``proof`` its answer. ``terms`` takes a mask apart, ``classify`` names the parts,
``additive`` reads masks of numbers. ``index_arithmetic``, ``index_tensor`` and ``views`` follow positions.
``readable`` says which unproven masks the operator may read, ``assumptions`` checks promises.

May import: ``kernels/support``, ``kernels/core``, ``graph``.
"""
