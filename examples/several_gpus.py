"""One long sequence over several ranks: every rank holds some tokens, attention looks at the keys of all of them.

torchrun --nproc-per-node 2 examples/several_gpus.py [--tokens 131072]

On a CPU the ranks talk by gloo: add ``--tokens 4096 --inner-backend eager``. Without torchrun one rank runs alone.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.distributed import context_parallel, gather_report


class Block(nn.Module):
    """Causal attention, as a user would write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Embeddings, positions that are an argument, and two blocks."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(1000, width), nn.ModuleList(Block(width, heads) for _ in range(2))
        self.frequency = nn.Parameter(torch.rand(width) * 0.1)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Int64 [B, N] each -> [B, N, D]."""
        x = self.tokens(input_ids) + torch.sin(position_ids[..., None] * self.frequency)
        for block in self.blocks:
            x = block(x)
        return x


def start(device: str) -> None:
    """Join the ranks that torchrun started; a group of one without it."""
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Compare the model over all ranks with the same model on each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--inner-backend", default="inductor")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("cp",))

    if dist.get_rank() == 0:
        print("tau=0 on random weights: shows that all ranks together give what one alone gives, not a gain.")
    torch.manual_seed(0)
    model = Model().to(device).eval()  # the same weights on every rank
    ids = torch.randint(0, 1000, (1, args.tokens), device=device)  # and the same tokens
    positions = torch.arange(args.tokens, device=device)[None]
    config = S2OConfig(tau=0.0, min_seq_len=256, inner_backend=args.inner_backend)

    parallel = context_parallel(model, mesh["cp"], config)
    with s2o_compile.record() as recording:
        output = parallel(ids)  # positions are made for each rank's tokens
    report = gather_report(recording, mesh["cp"])
    expected = model(ids, positions)
    if dist.get_rank() == 0:
        difference = (output - expected).norm() / expected.norm()
        print(report)
        print(f"{mesh.size()} ranks, relative difference to dense: {difference:.2e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
