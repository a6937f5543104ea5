"""The executors, one folder for each language: ``torch``, ``triton``, ``flex`` and ``aot``.

An executor is chosen by ``dispatch``, ``planner`` or ``schedule`` and never chooses itself.
"""
