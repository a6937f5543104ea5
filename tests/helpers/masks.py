"""Masks for the prover's tests: captured from Python, proven, and stated again as tensors."""

import torch
from torch.nn import functional as F

from s2o_compile.passes.frontends import sdpa
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.masks.prover import MaskProver


def captured(mask_of, *extra, dynamic=True, lengths=(5, 9)):
    """The graph of SDPA under ``mask_of(queries, keys, *extra)``, its mask, and (the symbols of) both lengths."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    def attend(q, k, *extra):
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask_of(q.shape[2], k.shape[2], *extra))

    q, k = (torch.randn(2, 4, length, 8) for length in lengths)
    torch._dynamo.reset()
    if dynamic:
        torch._dynamo.mark_dynamic(q, 2)
        torch._dynamo.mark_dynamic(k, 2)
    torch.compile(attend, backend=backend, fullgraph=True)(q, k, *extra)
    graph = graphs[0].graph
    (node,) = [node for node in graph.nodes if sdpa.is_attention(node)]
    call = sdpa.operands(node)
    return graph, call["attn_mask"], (value_of(call["query"]).shape[2], value_of(call["key"]).shape[2])


def capture(mask_of, *extra, dynamic=True, lengths=(5, 9), assume_causal=False):
    """The proof of ``mask_of(queries, keys, *extra)`` and the symbols of both lengths."""
    graph, mask, symbols = captured(mask_of, *extra, dynamic=dynamic, lengths=lengths)
    return MaskProver(graph, assume_causal=assume_causal).prove(mask, *symbols), symbols


def visible(proof, symbols, lengths, key_mask=None):
    """The bool mask [B or 1, 1, Nq, Nk] that a proof states, at concrete lengths."""
    queries, keys = lengths
    values = {s.node.expr: n for s, n in zip(symbols, lengths, strict=True) if isinstance(s, torch.SymInt)}

    def number(size):
        return int(size.node.expr.subs(values)) if isinstance(size, torch.SymInt) else int(size)

    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if proof.causal:
        offset = keys - queries if proof.offset is None else number(proof.offset)
        seen = seen & (j <= i + offset)
        if proof.window is not None:
            seen = seen & (j > i + offset - number(proof.window))
        if proof.chunk is not None:
            seen = seen & (j // proof.chunk == (i + offset) // proof.chunk)
    return seen if key_mask is None else seen & key_mask[:, None, None]


def q_index(n):
    return torch.arange(n)[:, None]


def k_index(n):
    return torch.arange(n)[None]
