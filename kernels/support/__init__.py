"""What knows no attention: every other room may use it.

``arguments`` and ``json_text`` read values from outside, ``errors`` and ``old_names`` answer users, ``scopes`` keeps
the state of a context, ``parallel`` spreads work over threads, ``define_op`` defines operators. Private names of torch
stand in ``torch_compat``, ``torch_compile`` and ``torch_inductor``, and nowhere else.

May import: nothing of this project.
"""
