"""Make a model's long attention sparse, look at the report, and compare with dense.

python examples/wrap_a_model.py
"""

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig


class Attention(nn.Module):
    """Causal self-attention with eight heads."""

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, dim] -> [B, N, dim]."""
        q, k, v = (y.unflatten(-1, (8, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Show the report of two layers, run them densely and through S2O, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the input")
    parser.add_argument("--inner-backend", default="inductor", help='"eager" compiles nothing behind the rewrite')
    options = parser.parse_args(arguments)

    print("Random weights: shows how to wrap a model and read its report. `s2o bench --model DIR` shows what it gains.")
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(), Attention()).eval(), torch.randn(1, options.tokens, 256)
    # 2048 tokens would run dense for being short.
    config = S2OConfig(tau=0.1, min_seq_len=0, inner_backend=options.inner_backend)

    print(s2o_compile.explain(model, x, config=config))
    fast = s2o_compile.optimize(model, config)
    dense, sparse = model(x), fast(x)
    print(f"relative difference to dense: {((sparse - dense).norm() / dense.norm()).item():.4f}")


if __name__ == "__main__":
    main()
