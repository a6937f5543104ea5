"""The executor that torch compiles: FlexAttention over gathered keys, for devices and functions beyond our own kernels.

``layout`` places gathered keys behind those in position order. ``forward`` attends a call whose mask is known.
``user_mods`` and ``sample`` serve calls with a score_mod or mask_mod of their own. The ``triton_`` files do the same
steps on a GPU.

May import: ``support``, ``pages``, ``core``, ``ranking``, ``exact``, ``impl/triton``.
"""
