"""The CPU's executor in C++, which the machine's compiler makes when it is first needed.

``library`` compiles and loads; ``forward`` visits ranked keys, ``exact`` all of them, ``rank_per_query`` scores keys.

May import: ``core``, ``ranking``, ``exact``, ``support``.
"""
