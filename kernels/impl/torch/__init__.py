"""The executor in plain torch, which serves where there is no C++ compiler and no Triton.

``forward`` visits ranked keys, ``exact`` all of them in position order, both by ``blocks``.

May import: ``support``, ``pages``, ``core``, ``ranking``, ``exact``.
"""
