"""One sequence over several GPUs against one: the operator at 128K to 1M tokens, and a model of Llama-3.1-8B's shape.

    torchrun --nproc-per-node 2 benchmarks/several_gpus.py [--json benchmarks/results/several-gpus-h200.json]

Shapes B=1, Hq=32, Hkv=8, D=128, bf16, causal. Correctness comes first: at tau=0 against SDPA, and at tau=0.5 bit for
bit against one GPU. Lists are then cut to a density and walked to their end (``calls.held_density``).

    one GPU          the whole call on each rank's GPU, of which the slowest counts
    context parallel each rank's shard, keys and values gathered a few heads at a time
    gather           the same gathers without any attention: what they would take if nothing ran beside them
    exposed          context parallel less the slowest rank's own work, measured over keys that it has already
    imbalance        computed pairs, the most of one rank over their mean

``model`` rows are prefills of random weights (8 layers by default), the last position's logits only and no cache. They
run through ``s2o_compile.distributed.context_parallel`` at the held density. On the same GPUs they run densely: by our
exact kernel over gathered keys, and through torch's own ``context_parallel``, a ring. ``cost`` rows are `cost_model`
beside the measured time of these ranks, and extrapolated to more of them: nobody measured those.

Without a GPU it runs small shapes over gloo: ``torchrun --nproc-per-node 2 benchmarks/several_gpus.py --lengths 4096
--layers 1 --hidden 256 --head-dim 16 --vocab 100``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import calls
import torch
import torch.distributed as dist
from calls import DEVICE, DTYPE, ON_GPU, make_inputs, synchronize
from results_file import Rows
from torch import Tensor

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.distributed import context_parallel, gather_report, shard_sequence
from s2o_compile.kernels.calls import context_parallel as sharded_calls
from s2o_compile.kernels.sequence.layout import Layout
from s2o_compile.kernels.sequence.sharded import ShardedSequence
from s2o_compile.kernels.statistics import record_calls

CORRECT_AT = 16384
DENSE = ("dense, keys gathered", "dense, torch's ring")


def slowest(seconds: float) -> float:
    """The largest of all ranks' times."""
    found = torch.tensor(seconds, device=DEVICE, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def clock(call: Callable[[], object], repeats: int = 2) -> float:
    """Best seconds of a call on its slowest rank, all ranks starting together; one run ahead does not count."""
    call()
    found = []
    for _ in range(repeats):
        synchronize()
        dist.barrier()
        start = time.perf_counter()
        call()
        synchronize()
        found.append(slowest(time.perf_counter() - start))
    return min(found)


def attend(tensors: Any, **fields: object) -> Tensor:  # noqa: ANN401 (query, key and value)
    """The operator, sparse at every length."""
    return s2o_compile.attention(*tensors, causal=True, config=S2OConfig(min_seq_len=0, **fields))  # pyright: ignore


def attend_shards(sequence: ShardedSequence, shards: Any, **fields: object) -> Tensor:  # noqa: ANN401
    """The operator on this rank's shard."""
    with sequence.attending():
        return attend(shards, **fields)


def check(args: argparse.Namespace) -> dict[str, object]:
    """Errors at tau=0 and equality of bits at tau=0.5; raises where they are not as they must be."""
    length = min(CORRECT_AT, *args.lengths)
    inputs = make_inputs("topical", length, args.heads, args.kv_heads, args.head_dim)
    sequence = shard_sequence(dist.group.WORLD, length)
    shards = [sequence.shard(x, 2) for x in inputs]
    exact = calls.check_exact(inputs)
    worst = (attend_shards(sequence, shards, tau=0.0) - sequence.shard(attend(inputs, tau=0.0), 2)).abs().max().item()
    same = torch.equal(attend_shards(sequence, shards), sequence.shard(attend(inputs), 2))
    if worst > 1e-2 or not same:
        raise RuntimeError(f"shards differ from one GPU: {worst} at tau=0, same bits at tau=0.5: {same}")
    return {"tokens": length, "error_over_sdpa": round(exact, 3), "tau_0": worst, "same_bits_tau_0.5": same}


class Whole(ShardedSequence):
    """A sequence whose keys need no exchange: the work of a rank alone."""

    def gathered(self, key: Tensor, value: Tensor, heads_at_a_time: int | None = None) -> Any:  # noqa: ANN401
        """Keys and values that are here already."""
        for heads in self.head_pieces(key, value, heads_at_a_time):
            yield heads, self.keys[:, heads], self.values[:, heads]

    keys: Tensor
    values: Tensor


def bench_operator(length: int, args: argparse.Namespace) -> dict[str, object]:
    """Times of one call of a length on one GPU and on all."""
    inputs = make_inputs("topical", length, args.heads, args.kv_heads, args.head_dim)
    sequence = shard_sequence(dist.group.WORLD, length)
    shards = [sequence.shard(x, 2) for x in inputs]
    with calls.held_density(args.density, length):
        one = clock(partial(attend, inputs), args.repeats)
        many = clock(partial(attend_shards, sequence, shards), args.repeats)
        alone = Whole(ranks=sequence.ranks, layout=sequence.layout)
        object.__setattr__(alone, "keys", inputs[1])
        object.__setattr__(alone, "values", inputs[2])
        work = clock(partial(attend_shards, alone, shards), args.repeats)
        with s2o_compile.record() as recording:
            attend_shards(sequence, shards)
        density = recording.calls[0].density
        report = gather_report(recording, dist.group.WORLD)
    gather = clock(lambda: [None for _ in sequence.gathered(*shards[1:])], args.repeats)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        with calls.held_density(args.density, length):
            attend_shards(sequence, shards)
    return {
        "density": round(density, 4),
        "one_gpu_ms": round(1e3 * one, 2),
        "context_parallel_ms": round(1e3 * many, 2),
        "speedup": round(one / many, 2),
        "gather_ms": round(1e3 * gather, 2),
        "gather_share": round(gather / many, 3),
        "exposed_share": round(max(many - work, 0.0) / many, 3),
        "imbalance": round(report.imbalance or 1.0, 3),
        "causal_imbalance": round(sequence.layout.causal_imbalance, 3),
        **({"peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1)} if ON_GPU else {}),
    }


def cost_model(ranks: int, length: int, row: dict[str, Any], args: argparse.Namespace, measured: int) -> float:
    """Milliseconds of a call on some ranks: one GPU's work shared out unevenly, or the gathers, if these are longer.

    The gather of a rank grows with what others hold, (W - 1) / W of all keys and values, at the rate that was measured.
    """
    layout = Layout.zigzag(length, ranks, units=(1024, 128, 1))
    work = row["one_gpu_ms"] / ranks * layout.causal_imbalance * row["imbalance"] / row["causal_imbalance"]
    gather = row["gather_ms"] * ((ranks - 1) / ranks) / ((measured - 1) / measured) if measured > 1 else 0.0
    first = gather / max(args.kv_heads, 1)  # nothing runs beside the first piece
    return max(work + first, gather)


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


def bench_model(length: int, way: str, args: argparse.Namespace) -> dict[str, object]:
    """Seconds of a prefill over all ranks, sparse or by torch's dense ring."""
    import s2o_compile.transformers

    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, ids = llama(args, length), torch.arange(length, device=DEVICE)[None] % args.vocab
    if way == "S2O":
        s2o_compile.transformers.configure(model, S2OConfig(min_seq_len=0))
        parallel = context_parallel(model, dist.group.WORLD, S2OConfig(min_seq_len=0))
        prefill = partial(parallel, ids, use_cache=False, logits_to_keep=1)
        inside = calls.held_density(args.density, length)
    elif way == "dense, keys gathered":
        parallel = context_parallel(model, dist.group.WORLD, S2OConfig(min_seq_len=0))
        prefill = partial(parallel, ids, use_cache=False, logits_to_keep=1)
        inside = patch.object(sharded_calls, "_path", lambda *_: "dense")
    else:
        model.set_attn_implementation("sdpa")
        prefill, inside = partial(ring, model, ids), contextlib.nullcontext()
    with inside, record_calls() as recorded:
        seconds = clock(prefill, 1)
    found: dict[str, object] = {"seconds": round(seconds, 3)}
    if recorded:
        found["density"] = round(sum(call.density for call in recorded) / len(recorded), 4)
    if ON_GPU:
        found["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return found


def ring(model: Any, ids: Tensor) -> Tensor:  # noqa: ANN401 (a transformers model)
    """Torch's own context parallelism: dense attention in a ring, shards in head-tail order."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as of_torch

    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    ids, positions = ids.clone(), torch.arange(ids.shape[1], device=ids.device)[None].clone()
    causal = lambda *_, **__: None  # noqa: E731 (no mask: SDPA's is_causal, which torch's ring takes)
    with of_torch(mesh, buffers=[ids, positions], buffer_seq_dims=[1, 1]), patch_masks(causal):
        return model(ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits


def patch_masks(make: Callable[..., None]) -> Any:  # noqa: ANN401 (a context manager)
    """Inside, transformers' Llama gets its causal mask from a function."""
    from transformers.models.llama import modeling_llama

    return patch.object(modeling_llama, "create_causal_mask", make)


@torch.no_grad()
def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2**17, 2**18, 2**19, 2**20])
    parser.add_argument("--model-lengths", type=int, nargs="*", default=[2**19])
    parser.add_argument("--dense-lengths", type=int, nargs="*", default=[2**19], help="models that also run densely")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 4 head dims")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rank = int(os.environ["RANK"])
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    ranks = dist.get_world_size()
    rows = Rows(args.json if rank == 0 else None, ranks=ranks, density_held=args.density)
    output = contextlib.nullcontext() if rank == 0 else contextlib.redirect_stdout(open(os.devnull, "w"))  # noqa: SIM115
    with output:
        rows.measure("correct", {}, partial(check, args))
        if "failed" in rows[-1]:
            raise SystemExit(f"no time is reported: {rows[-1]['failed']}")
        for length in args.lengths:
            rows.measure("operator", {"tokens": length}, partial(bench_operator, length, args))
            row = dict(rows[-1])
            if "failed" not in row:
                times = {f"model_{w}": round(cost_model(w, length, row, args, ranks), 2) for w in {ranks, 4, 8}}
                rows.measure("cost", {"tokens": length, "extrapolated": [4, 8]}, lambda times=times: times)
        for length in args.model_lengths:
            for way in ("S2O", *(DENSE if length in args.dense_lengths else ())):
                rows.measure("model", {"tokens": length, "what": way}, partial(bench_model, length, way, args))
        print("\nsummary")
        for row in rows:
            kept = ("tokens", "what", "one_gpu_ms", "context_parallel_ms", "speedup", "gather_share", "exposed_share")
            kept += ("imbalance", "seconds", "density", "peak_GiB", "failed")
            print(row["section"], *(f"{name}={row[name]}" for name in kept if name in row))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
