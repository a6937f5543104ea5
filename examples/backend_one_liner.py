"""One line: torch.compile(model, backend="s2o"), found by its entry point without an import.

python examples/backend_one_liner.py --tokens 8192
"""

import argparse
import time
from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Compile torch's own encoder, run it densely and through S2O, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the input")
    parser.add_argument("--inner-backend", default="inductor", help='"eager" compiles nothing behind the rewrite')
    options = parser.parse_args(arguments)

    print("Random weights, short input: shows the one line, not a gain. `s2o bench --model DIR` shows your model's.")
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=128, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, num_layers=2), nn.Linear(64, 8)).eval()
    x = torch.randn(1, options.tokens, 64)

    settings = {"s2o.min_seq_len": 0, "s2o.inner_backend": options.inner_backend}  # both only for this small example
    fast = torch.compile(model, backend="s2o", options=settings)

    fast(x)  # compiles
    outputs = []
    for name, which in (("dense", model), ("S2O", fast)):
        start = time.perf_counter()
        outputs.append(which(x))
        print(f"{name}: {time.perf_counter() - start:.3f} s")
    print(f"relative difference to dense: {((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item():.4f}")


if __name__ == "__main__":
    main()
