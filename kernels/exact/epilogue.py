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

    Args:
        call: The call; its key mask, if any, is [B, Nk].
        output: [B, Hq, Nq, Dv]; overwritten where there are sinks.
        lse: float32 [B, Hq, Nq]; given where ``call.wants_lse``.
    """
    if call.sinks is not None and lse is not None:
        output, lse = add_sinks(output, lse, call.sinks)
    if call.fully_masked == "mean":
        output = fill_fully_masked_rows(output, call.value, call.mask, call.sinks)
    return output, lse if call.return_lse else None


def add_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The results with sinks.

    Args:
        output: [..., Hq, Nq, Dv], overwritten.
        lse: float32 [..., Hq, Nq].
        sinks: Floating, [Hq] or with leading dimensions that broadcast.

    Returns:
        The output and its log-sum-exp; a row that sees no key has zeros and the sink.
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


def fill_fully_masked_rows(output: Tensor, value: Tensor, mask: AttentionMask, sinks: Tensor | None = None) -> Tensor:
    """The output with the mean of all values in every fully masked row of a mask; arguments as `fill_rows`."""
    n_queries, n_keys = output.shape[2], value.shape[2]
    if all_rows_see(mask, n_queries, n_keys):
        return output
    fully_masked = fully_masked_rows(mask, n_queries, n_keys, output.device)
    return fill_rows(output, value, fully_masked[:, None, :, None], sinks)


def fill_rows(output: Tensor, value: Tensor, fully_masked: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The output with the mean of all values of its head in these rows, but where a sink takes their mass.

    Args:
        output: [B, Hq, Nq, Dv].
        value: [B, Hkv, Nk, Dv].
        fully_masked: bool, broadcastable to [B, Hq, Nq, 1].
        sinks: Floating [Hq].
    """
    if sinks is not None:
        fully_masked = fully_masked & (sinks == -torch.inf)[:, None, None]
    mean = value.mean(2, keepdim=True, dtype=torch.float32).to(output.dtype)
    mean = mean.repeat_interleave(output.shape[1] // value.shape[1], dim=1)  # [B, Hq, 1, Dv]
    return torch.where(fully_masked, mean, output)
