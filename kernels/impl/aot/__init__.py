"""The operator's decomposition for AOT packages: traceable, with symbolic lengths.

``attention`` chooses the path by ``cond``. ``cpu_forward`` and ``cpu_ranking`` write loops as operators,
``cuda_forward`` records the launches of ``impl.triton``.

May import: ``support``, ``pages``, ``core``, ``ranking``, ``exact``, ``impl/triton``.
"""
