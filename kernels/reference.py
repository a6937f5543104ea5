"""The S2O operator, stated in plain torch to be read beside the paper (arXiv 2602.22575, section 3).

For every query tile of TILE_LEN slots, in a segment s with in-segment keys [a, b) and ranked prefix keys idx:

    pass 1   m, l, acc  <-  online softmax over the keys of [a, b), in position order, under the mask
    pass 2   for chunks of chunk_len keys of idx, most important first:
                 l_before, m_before  <-  l, m
                 m, l, acc           <-  online softmax over the chunk
                 gain_i      =  1 - l_before_i exp(m_before_i - m_i) / l_i
                 stop by the rule of ``core/stop_rule.py``, which gives share_i, too
    tail         acc_i, l_i  <-  acc_i + share_i l_i mean value of the prefix keys, l_i + share_i l_i
    output   acc / l (zeros where l = 0), log-sum-exp = m + log l

Logits are q . k * scale, or softcap * tanh(q . k * scale / softcap) where they are capped (Gemma 2).

Written for clarity, in the dtype of its inputs (tests pass float64). It is the oracle of every implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN, Plan, n_tiles
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.core.stop_rule import chunks_to_come, tail_share


class OnlineSoftmax:
    """Running maximum m [rows], normaliser l [rows] and weighted sum acc [rows, Dv] of one tile."""

    def __init__(self, query: Tensor, value_dim: int, scale: float, softcap: float | None) -> None:
        self.query, self.scale, self.softcap = query, scale, softcap
        self.m = query.new_full(query.shape[:1], float("-inf"))
        self.l = torch.zeros_like(self.m)
        self.acc = query.new_zeros(len(query), value_dim)

    def update(self, key: Tensor, value: Tensor, visible: Tensor | None = None) -> None:
        """Attend to key [keys, D] and value [keys, Dv]; visible is bool [rows, keys]."""
        logits = self.query @ key.T * self.scale
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        if visible is not None:
            logits = logits.masked_fill(~visible, float("-inf"))
        m = torch.maximum(self.m, logits.amax(-1)) if len(key) else self.m
        finite = torch.where(m == float("-inf"), 0.0, m)
        weight, decay = (logits - finite[:, None]).exp(), (self.m - finite).exp()
        self.l = self.l * decay + weight.sum(-1)
        self.acc = self.acc * decay[:, None] + weight @ value
        self.m = m

    def add_tail(self, share: Tensor, mean_value: Tensor) -> None:
        """Count keys left out: share [rows] of the mass visited, at mean_value [Dv]."""
        self.acc = self.acc + (share * self.l)[:, None] * mean_value
        self.l = self.l * (1 + share)

    def gain(self, m_before: Tensor, l_before: Tensor) -> Tensor:
        """Share of the mass brought since (m_before, l_before), [rows]."""
        return 1 - l_before * (m_before - self.m).exp() / self.l


def attend(call: AttentionCall, plan: Plan, tau: float | Tensor, *, visits: Tensor | None = None) -> Result:
    """Attention over a plan, one tile at a time; the mask has no window.

    Tau is one number, or float32 [Hq], one a head; 0 never stops. Integers [B, Hq, P] ``visits`` say how many ranked
    keys are visited, decided before pass 2 starts; None for the stop rule.
    """
    (query, key, value), mask = call.tensors, call.mask
    batch, heads, n_queries, _ = query.shape
    group, shared = heads // key.shape[1], heads // plan.key_index.shape[1]
    n_keys = key.shape[2]
    output = query.new_zeros(batch, heads, n_queries, value.shape[3])
    lse = query.new_full((batch, heads, n_queries), float("-inf"))
    computed = torch.zeros(batch, heads, n_tiles(n_queries), dtype=torch.int32)
    everything = torch.arange(n_keys)
    for b in range(batch):
        allowed = torch.ones(n_keys, dtype=torch.bool) if mask.key_mask is None else mask.key_mask[b]
        for h in range(heads):
            kv = h // group
            limit = float(tau[h]) if isinstance(tau, Tensor) else tau
            for t in range(n_tiles(n_queries)):
                rows = torch.arange(t * TILE_LEN, min((t + 1) * TILE_LEN, n_queries))
                segment = t * TILE_LEN // plan.segment_len
                first = segment * plan.segment_len
                last = min(first + plan.segment_len, n_queries) - 1
                a, stop = mask.in_segment_range(first, last, n_queries, n_keys)
                if mask.causal:  # no query of the tile sees further than its last one
                    stop = max(a, min(stop, int(rows[-1]) + mask.offset + 1))

                state = OnlineSoftmax(query[b, h, rows], value.shape[3], call.scale, call.softcap)
                own = everything[a:stop]
                state.update(key[b, kv, own], value[b, kv, own], mask.visible(rows, own) & allowed[own])
                count = int(plan.prefix_count[b, segment])
                if visits is not None:
                    count, limit = min(count, int(visits[b, h, segment])), 0.0
                visited, stopped = 0, False
                while visited < count and not stopped:
                    m_before, l_before = state.m, state.l
                    until = min(visited + plan.chunk_len, count)
                    chunk = plan.key_index[b, h // shared, segment, visited:until].long()
                    state.update(key[b, kv, chunk], value[b, kv, chunk])
                    visited += plan.chunk_len
                    if limit > 0 and count >= 2 * plan.chunk_len:
                        gain, to_come = state.gain(m_before, l_before), chunks_to_come(visited, count, plan.chunk_len)
                        uses_gain = visited > plan.chunk_len
                        stopped = bool((gain.max() if uses_gain else 1.0) * to_come < limit)
                        if stopped and uses_gain:
                            assert plan.tail_value is not None
                            share = tail_share(gain, to_come)
                            state.add_tail(share, plan.tail_value[b, kv, segment].to(state.acc.dtype))
                output[b, h, rows] = torch.where(state.l[:, None] == 0, 0.0, state.acc / state.l[:, None])
                lse[b, h, rows] = state.m + state.l.log()
                computed[b, h, t] = len(own) + min(visited, count)
    return Result(output, lse, computed)
