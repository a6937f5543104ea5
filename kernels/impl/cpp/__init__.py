"""The CPU's executor in C++, which the machine's compiler makes when it is first needed (``support.cpp_library``).

``forward`` visits ranked keys, ``exact`` all of them, ``rank_per_query`` scores keys, ``order`` orders them.
``forward.cpp`` does the work of the first two by products of ``floats.h`` or ``halves.h``, ``rank.cpp`` that of the
third, ``order.cpp`` that of the last.

May import: ``support``, ``pages``, ``core``, ``ranking``, ``exact``.
"""
