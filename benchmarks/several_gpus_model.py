"""Prefills of a model of Llama-3.1-8B's shape over several GPUs, for ``several_gpus.py``: S2O, and torch's dense ring.

Random weights, made on the device; the last position's logits only, and no cache.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import calls
import torch
import torch.distributed as dist
from calls import DEVICE, DTYPE, ON_GPU, synchronize
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import s2o_compile.transformers
from s2o_compile import S2OConfig
from s2o_compile.distributed import context_parallel
from s2o_compile.kernels.calls import context_parallel as sharded_calls
from s2o_compile.kernels.statistics import record_calls

WAYS = ("S2O", "dense, torch's ring", "dense, keys gathered")
WARM_UP = 2**17
"""Tokens of the prefill ahead of a dense one."""


def llama(args: argparse.Namespace, length: int) -> Any:  # noqa: ANN401 (a transformers model)
    """LlamaForCausalLM with random weights, the same on every rank."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 7 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // args.head_dim,
        num_key_value_heads=args.hidden // args.head_dim // 4,
        head_dim=args.head_dim,
        vocab_size=args.vocab,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="s2o").eval()


def bench(model: Any, length: int, way: str, args: argparse.Namespace) -> dict[str, object]:  # noqa: ANN401
    """Seconds of one prefill over all ranks, after one layer; from some length on, those of one dense layer."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    layers, few = model.model.layers, way != "S2O" and length >= args.extrapolate_dense
    try:
        with record_calls() as recorded, prefill(model, way, args, length) as run:
            model.model.layers = layers[:1]  # of S2O at full length: some kernels are compiled for it
            run(length if way == "S2O" else min(WARM_UP, length))
            recorded.clear()
            model.model.layers = layers[:1] if few else layers
            seconds = timed(partial(run, length))
    finally:
        model.model.layers = layers
    found: dict[str, object] = {"seconds": round(seconds * (len(layers) if few else 1), 3)}
    if few:
        found |= {"extrapolated_from_layers": 1, "seconds_of_one_layer": round(seconds, 3)}
    if recorded:
        found["density"] = round(sum(call.density for call in recorded) / len(recorded), 4)
    if ON_GPU:
        found["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return found


def timed(run: Callable[[], object]) -> float:
    """Seconds of a run on its slowest rank, all ranks starting together."""
    synchronize()
    dist.barrier()
    start = time.perf_counter()
    run()
    synchronize()
    found = torch.tensor(time.perf_counter() - start, device=DEVICE, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


@contextlib.contextmanager
def prefill(model: Any, way: str, args: argparse.Namespace, length: int) -> Iterator[Callable[[int], object]]:  # noqa: ANN401
    """A block with a function that runs a prefill of so many tokens; at ``length`` tokens S2O holds the density."""

    def ids_of(tokens: int) -> Tensor:
        return torch.arange(tokens, device=DEVICE)[None] % args.vocab

    if way == "dense, torch's ring":
        model.set_attn_implementation("sdpa")
        yield lambda tokens: ring(model, ids_of(tokens))
        return
    config = S2OConfig(min_seq_len=0)
    model.set_attn_implementation("s2o")
    s2o_compile.transformers.configure(model, config)
    parallel = context_parallel(model, dist.group.WORLD, config)
    inside = calls.held_density(args.density, length)
    if way != "S2O":
        inside = patch.object(sharded_calls, "_path", lambda *_: "dense")
    with inside:
        yield lambda tokens: parallel(ids_of(tokens), use_cache=False, logits_to_keep=1)


def ring(model: Any, ids: Tensor) -> Tensor:  # noqa: ANN401 (a transformers model)
    """Torch's own context parallelism: dense flash attention in a ring, shards in head-tail order."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as of_torch
    from transformers.models.llama import modeling_llama

    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    ids, positions = ids.clone(), torch.arange(ids.shape[1], device=ids.device)[None].clone()
    with (
        of_torch(mesh, buffers=[ids, positions], buffer_seq_dims=[1, 1]),
        patch.object(modeling_llama, "create_causal_mask", lambda *_, **__: None),  # SDPA's is_causal, which it takes
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    ):
        return model(ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits
