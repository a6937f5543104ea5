"""The keys that the queries of one head visited, and their attention: the data of a picture.

All data is pair by pair, so this is for a few thousand tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2o_compile.errors import OptionError
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.dispatch import choose_implementation
from s2o_compile.kernels.observe import ObservedCall
from s2o_compile.kernels.planner import build_plan


@dataclass(frozen=True, kw_only=True)
class VisitMap:
    """One head of one call, its first batch element; all on the CPU.

    Attributes:
        site: Module path of the attention.
        head: Query head.
        weights: float32 [Nq, Nk], exact attention probabilities; zero where a key is not visible.
        visible: bool [Nq, Nk], pairs that the mask leaves visible.
        visited: bool [Nq, Nk], visible pairs that S2O computed.
        segment_len: Queries that share an order of keys.
        key_order: int64 [P, Nk], the keys of each segment: its own in position order, then the others by rank. Behind
            ``key_count`` stand keys that none of its queries sees.
        key_count: int64 [P].
    """

    site: str
    head: int
    weights: Tensor
    visible: Tensor
    visited: Tensor
    segment_len: int
    key_order: Tensor
    key_count: Tensor

    @property
    def missed_mass(self) -> float:
        """Share of the attention that was not visited, mean over queries."""
        return self.weights.masked_fill(self.visited, 0.0).sum(-1).mean().item()


def visit_map(call: ObservedCall, head: int) -> VisitMap:
    """The keys that a query head visited in a call on the path "s2o"; [Nq, Nk] must fit in memory.

    Raises:
        OptionError: The head does not exist, or is marked dense and so has no order of keys.
    """
    heads, n_queries = call.query.shape[1:3]
    n_keys, device = call.key.shape[2], call.query.device
    if not 0 <= head < heads:
        raise OptionError(f"head: expected one of 0 to {heads - 1} of {call.site!r}, got {head}.")
    kv_head = head * call.key.shape[1] // heads
    if kv_head in call.dense_heads:
        raise OptionError(
            f"head: expected a head that is ranked, got {head} of {call.site!r}, whose key/value head {kv_head} is "
            "marked dense. Choose another, or take the mark away."
        )
    plan = build_plan(call, call.options, choose_implementation(call.options.implementation, call.query))  # again
    positions = torch.arange(max(n_queries, n_keys), device=device)
    visible = call.mask.visible_pairs(n_queries, n_keys, device)[0, 0]
    visited, orders, counts = torch.zeros_like(visible), [], []
    for segment in range(plan.n_segments):
        first = segment * plan.segment_len
        last = min(first + plan.segment_len, n_queries) - 1
        start, stop = call.mask.in_segment_range(first, last, n_queries, n_keys)
        count = int(plan.prefix_count[0, segment])
        ranked = plan.key_index[0, head * plan.key_index.shape[1] // heads, segment, :count].long()
        for begin in range(first, last + 1, TILE_LEN):
            rows = positions[begin : min(begin + TILE_LEN, last + 1)]
            seg_stop = stop
            if call.mask.causal:  # no query of the tile sees further than its last one
                seg_stop = max(start, min(stop, int(rows[-1]) + call.mask.offset + 1))
            listed = int(call.result.computed[0, head, begin // TILE_LEN]) - (seg_stop - start)
            for keys in (positions[start:seg_stop], ranked[:listed]):
                visited[rows[:, None], keys] = visible[rows[:, None], keys]
        known = torch.cat([positions[start:stop], ranked])
        others = torch.ones(n_keys, dtype=torch.bool, device=device)
        others[known] = False
        orders.append(torch.cat([known, positions[:n_keys][others]]))
        counts.append(len(known))
    return VisitMap(
        site=call.site,
        head=head,
        weights=_weights(call, head, kv_head, visible).cpu(),
        visible=visible.cpu(),
        visited=visited.cpu(),
        segment_len=plan.segment_len,
        key_order=torch.stack(orders).cpu(),
        key_count=torch.tensor(counts),
    )


def _weights(call: ObservedCall, head: int, kv_head: int, visible: Tensor) -> Tensor:
    logits = call.query[0, head].float() @ call.key[0, kv_head].float().T * call.scale
    if call.softcap is not None:
        logits = call.softcap * (logits / call.softcap).tanh()
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
