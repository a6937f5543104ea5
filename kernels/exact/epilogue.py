"""Sinks and fully masked rows: they need the log-sum-exp and the mask alone, and so follow any executor.

Attention sinks (gpt-oss) are one more logit for each query head, which takes its share of the mass and adds no value:

    out_i  <-  out_i exp(lse_i) / (exp(lse_i) + exp(sink)),    lse_i  <-  log(exp(lse_i) + exp(sink))

The stop rule does not know them, so it stops later than it might.

Fully masked rows see no key. A boolean mask gives them zeros in SDPA. A finite additive mask (``finfo.min``) drowns the
logits, so all keys weigh the same, and the row gets the mean of all values. A sink takes all the mass of such a row and
leaves zeros; a sink of -inf is none. The mask alone tells these rows, in O(B (Nq + Nk)) and without waiting for the
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask


def finish(call: AttentionCall, output: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The call's output, and its log-sum-exp or None if the caller does not want it, from an executor's results.

    A key mask, if any, is [B, Nk]. The output [B, Hq, Nq, Dv] is overwritten where there are sinks. ``lse``, float32
    [B, Hq, Nq], is given where ``call.wants_lse``.
    """
    if call.sinks is not None and lse is not None:
        output, lse = add_sinks(output, lse, call.sinks)
    return fill_fully_masked_rows(call, output), lse if call.return_lse else None


def add_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The output [..., Hq, Nq, Dv], overwritten, and its log-sum-exp float32 [..., Hq, Nq], both with sinks.

    Sinks are floating, [Hq] or with leading dimensions that broadcast. A row that sees no key has zeros and the sink.
    """
    return output.mul_(sink_share(lse, sinks)[..., None]), torch.logaddexp(lse, sinks.float()[..., None])


def sink_share(lse: Tensor, sinks: Tensor) -> Tensor:
    """The factor of every row's output, float32 [..., Hq, Nq]; arguments as `add_sinks`."""
    kept = torch.sigmoid(lse - sinks.float()[..., None])
    return kept.masked_fill(lse == float("-inf"), 0.0)  # also where the sink is -inf itself, which is no sink at all


def all_rows_see(mask: AttentionMask, n_queries: int, n_keys: int) -> bool:
    """Whether lengths alone prove that every row sees a key: only the first or the last row can be fully masked."""
    ends = (mask.visible_range(row, row, n_keys) for row in (0, n_queries - 1))
    return mask.key_mask is None and all(start < stop for start, stop in ends)


def fully_masked_rows(mask: AttentionMask, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Bool [B or 1, Nq], True for a query that sees no key."""
    start, stop = mask.row_ranges(n_queries, n_keys, device)
    if mask.key_mask is None:
        return (start == stop)[None]
    before = torch.nn.functional.pad(mask.key_mask.cumsum(-1), (1, 0))  # keys that may be attended before each position
    return before.index_select(1, start) == before.index_select(1, stop)


def fill_fully_masked_rows(call: AttentionCall, output: Tensor) -> Tensor:
    """The output [B, Hq, Nq, Dv] with what the call wants in every fully masked row, where it has zeros."""
    if call.fully_masked != "mean" or all_rows_see(call.mask, call.n_queries, call.n_keys):
        return output
    fully_masked = fully_masked_rows(call.mask, call.n_queries, call.n_keys, output.device)
    return fill_rows(output, call.value, fully_masked[:, None, :, None], call.sinks)


def fill_rows(output: Tensor, value: Tensor, fully_masked: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The output with the mean of all values of its head in these rows, but where a sink takes their mass.

    Output [B, Hq, Nq, Dv], value [B, Hkv, Nk, Dv], sinks floating [Hq]; ``fully_masked`` is bool, broadcastable to
    [B, Hq, Nq, 1].
    """
    return fill_rows_with(output, mean_of(value), fully_masked, sinks)


def mean_of(value: Tensor) -> Tensor:
    """The mean of all values of a head, float32 [B, Hkv, 1, Dv]."""
    return value.mean(2, keepdim=True, dtype=torch.float32)


def fill_rows_with(output: Tensor, mean: Tensor, fully_masked: Tensor, sinks: Tensor | None = None) -> Tensor:
    """`fill_rows` by the `mean_of` the values."""
    if sinks is not None:
        fully_masked = fully_masked & (sinks == -torch.inf)[:, None, None]
    mean = mean.to(output.dtype).repeat_interleave(output.shape[1] // mean.shape[1], dim=1)  # [B, Hq, 1, Dv]
    return torch.where(fully_masked, mean, output)
