"""FlexAttention with a score_mod of your own (ALiBi), made sparse: the function stays what it is.

python examples/flex_score_mod.py --tokens 8192
"""

import argparse
from collections.abc import Sequence

import torch
from torch.nn.attention.flex_attention import flex_attention

import s2o_compile

SLOPES = torch.tensor([2.0 ** -(head + 3) for head in range(4)])


def alibi(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Causal, and the further away a key is, the less it counts."""
    return torch.where(i >= j, score - SLOPES[h] * (i - j), -float("inf"))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] -> [B, H, N, D]."""
    return flex_attention(query, key, value, score_mod=alibi)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Compile it densely and sparsely, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="length of the input")
    tokens = parser.parse_args(arguments).tokens

    print("Random input: shows that a score_mod of your own runs sparse, not a gain. ALiBi's far keys are left out.")
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, tokens, 32) for _ in range(3))
    options = {"s2o.tau": 0.5, "s2o.min_seq_len": 0, "s2o.segment_len": 256}  # short inputs would run dense
    with s2o_compile.record() as recording:
        sparse = torch.compile(attend, backend="s2o", options=options)(query, key, value)
        dense = torch.compile(attend)(query, key, value)
    print(recording.report)
    print(f"relative difference to dense: {((sparse - dense).norm() / dense.norm()).item():.4f}")


if __name__ == "__main__":
    main()
