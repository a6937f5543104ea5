"""The executors, one folder for each language: ``torch``, ``cpp``, ``triton``, ``flex`` and ``aot``.

``torch``, ``cpp`` and ``triton`` have ``attend(call, plan, tau, into)`` and ``attend_exact(call)``. ``flex`` takes the
blocks to visit instead of tau, ``aot`` ranks inside. An executor is chosen by ``dispatch``, ``planner`` or ``schedule``
and never chooses itself. May import: nothing; each folder says what its files may import.
"""
