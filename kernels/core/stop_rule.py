"""The stop rule of query tiles, and the mass that a tile adds for the keys that it leaves out.

After each chunk of ranked keys a tile computes, with natural logarithms and lengths in keys:

    gain_i      share of row i's softmax mass that the chunk brought; 1 for the first chunk
    to_come     visited / chunk_len * log(prefix_count / visited)
    unvisited   max over rows of gain_i * to_come
    stop        if unvisited < tau, in prefixes of two chunks or more
    share_i     TAIL_SHARE * min(gain_i * to_come, 1): the mass added for the keys left out, over the mass visited

``to_come`` assumes that the masses of ranked chunks fall off like 1 / rank (Zipf), as in trained models: chunk c brings
gain * visited / c, summed over the chunks to come. Where the mass is flat, the unvisited share is below tau, too. The
first chunk's gain is not used: a sink inflates it, a bad ranking deflates it. So a tile can stop after the first chunk
only if tau > log(prefix_count / chunk_len), and adds no share there.

The rule is written out in each executor's language: ``reference``, ``impl.torch.forward``, ``impl.cpp`` (forward.cpp),
``impl.triton.forward`` and ``impl.aot.cpu_forward``. Source: S2O, arXiv 2602.22575, section 3. The paper tests mean
gain < tau. The row maximum keeps minority queries, and the estimate lets one tau serve every length. The share is not
in the paper.
"""

from __future__ import annotations

import math

from torch import Tensor


def chunks_to_come(visited: int, prefix: int, chunk_len: int) -> float:
    """Mass of the unvisited chunks in units of the last visited one, if it falls off like 1 / rank."""
    return visited / chunk_len * max(math.log(prefix / visited), 0.0)


TAIL_SHARE = 0.2
"""Part of the estimate that is added, because the estimate is cautious: 0 and 0.35 want more density (SmolLM2)."""


def tail_share(gain: Tensor, to_come: float) -> Tensor:
    """Mass left out over mass visited, of rows whose last chunk brought ``gain``; in its shape."""
    return (gain * to_come).clamp(0.0, 1.0) * TAIL_SHARE
