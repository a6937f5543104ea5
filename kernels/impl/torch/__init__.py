"""The CPU's executor: gathered blocks of keys, in plain torch.

May import: ``core``, ``ranking``, ``exact``, ``support``.
"""
