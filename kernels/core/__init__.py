"""The words of one attention call, which every other room of kernels/ uses.

``call`` holds tensors, mask and everything else that changes the result. ``mask`` says which keys a query sees,
``plan`` which are visited in which order, ``options`` how to be sparse, ``stop_rule`` when a tile stops, ``result``
what an executor returns, ``budget_rule`` what an error allows. ``validation`` checks arguments. ``tuned`` knows
devices, ``layout`` strides, ``documents`` packed sequences, ``shards`` and ``head_shards`` the part of a rank.
``mask_band`` compares masks of unknown origin.

May import: ``support``, ``pages``.
"""
