"""Finds attentions: each module matches one way to write attention and answers ``AttentionSite`` or ``Rejected``.

May import: ``graph``, ``masks``, ``passes.site``, ``kernels``.
"""
