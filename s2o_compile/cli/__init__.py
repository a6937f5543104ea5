"""The command line ``s2o``: ``main`` has its commands, ``options`` and ``loading`` are shared by them."""
