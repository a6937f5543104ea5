"""Kinds of calls that become calls of ``dispatch.run``: under masks that are read, of packed sequences, on shards.

``masked`` by ``read_mask`` reads a mask, ``packed`` divides a batch by its documents, ``varlen`` by ``lengths`` one of
packed sequences and pages. ``context_parallel`` runs a rank's shard of a sequence.

May import: ``support``, ``pages``, ``core``, ``ranking``, ``exact``, ``sequence``, ``kernels``.
"""
