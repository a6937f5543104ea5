"""Finds attentions: each frontend matches one way to write attention and answers ``AttentionSite`` or ``Rejected``.

Frontends: ``sdpa``, ``eager``, ``flex``, ``varlen``, ``third_party``. They share ``checks``, ``head_layout`` and
``repeat_kv``.
``decompose`` opens opaque nodes, so that a frontend sees the attention inside.

May import: ``kernels/support``, ``kernels/core``, ``graph``, ``masks``, ``passes``.
"""
