"""The CPU's executor in C++, compiled when it is first needed: ``forward`` over ranked keys, ``library`` that compiles.

May import: ``core``, ``support``.
"""
