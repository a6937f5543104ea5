"""One sequence over several GPUs against one: the operator at 128K to 1M tokens, and a model of Llama-3.1-8B's shape.

    torchrun --nproc-per-node 2 benchmarks/several_gpus.py --only operator [--json FILE]      # then: --only model

Shapes B=1, Hq=32, Hkv=8, D=128, bf16, causal. Correctness comes first: at tau=0 against SDPA, and at tau=0.5 bit for
bit against one GPU. Lists are then cut to a density and walked to their end (``calls.held_density``).

    one GPU          the whole call on each rank's GPU, of which the slowest counts
    context parallel each rank's shard; host_ms is the time until the call returns, while the GPU is still at work
    gather           the same gathers without any attention: what they would take if nothing ran beside them
    exposed          context parallel less the same work over what earlier gathers have brought
    imbalance        computed pairs, the most of one rank over their mean

``model`` rows are prefills of random weights (`several_gpus_model`): by S2O at the held density, and on the same GPUs
through torch's own ``context_parallel``, a dense ring. ``cost`` rows are `cost_model` beside the measured time of these
ranks, and extrapolated to more of them: nobody measured those. The JSON keeps the rows of the other parts.

Without a GPU it runs small shapes over gloo: ``torchrun --nproc-per-node 2 benchmarks/several_gpus.py --lengths 4096
--model-lengths 4096 --heads 8 --kv-heads 2 --head-dim 64 --layers 1 --hidden 256 --vocab 100``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import calls
import several_gpus_model
import torch
import torch.distributed as dist
from calls import DEVICE, ON_GPU, make_inputs, synchronize
from results_file import Rows
from torch import Tensor

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.distributed import gather_report, shard_sequence
from s2o_compile.kernels import schedule
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import default_segment_len
from s2o_compile.kernels.sequence.layout import Layout
from s2o_compile.kernels.sequence.sharded import ShardedSequence, head_pieces

CORRECT_AT = 16384
PARTS = {"operator": ("correct", "operator", "cost"), "model": ("model",)}
"""Parts of the benchmark, and the sections of their rows."""


def slowest(seconds: float) -> float:
    """The largest of all ranks' times."""
    found = torch.tensor(seconds, device=DEVICE, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


class Timed(NamedTuple):
    """Seconds of a call, and those until it returned on this rank."""

    seconds: float
    returned: float


def clock(call: Callable[[], object], repeats: int = 2) -> Timed:
    """The best of some runs on their slowest rank, all ranks starting together; one run ahead does not count."""
    call()
    found = []
    for _ in range(repeats):
        synchronize()
        dist.barrier()
        start = time.perf_counter()
        call()
        returned = time.perf_counter() - start
        synchronize()
        found.append((slowest(time.perf_counter() - start), returned))
    return Timed(*min(found))


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


class Remembered(ShardedSequence):
    """A sequence whose exchanges happen once: later calls find what they brought, and do the work of a rank alone."""

    def start_gather(self, shards: Sequence[Tensor], dim: int = 2, step: int = 1) -> Any:  # noqa: ANN401 (as its base)
        """What the same gather of the first call brought."""
        if self.number == len(self.brought):
            whole, wait = super().start_gather(shards, dim, step)
            wait()
            self.brought.append(whole)
        found = self.brought[self.number]
        self.number += 1
        return found, lambda: None

    number: int
    brought: list[list[Tensor]]


def attend_remembered(sequence: Remembered, shards: Any) -> Tensor:  # noqa: ANN401 (query, key and value)
    """The operator on this rank's shard, without exchanges after its first call."""
    object.__setattr__(sequence, "number", 0)
    return attend_shards(sequence, shards)


def gather_all(sequence: ShardedSequence, shards: Any) -> None:  # noqa: ANN401 (query, key and value)
    """All that a call gathers, by its sizes: keys, values, and a byte for each of the numbers that rank keys."""
    _, key, value = shards
    _, wait = sequence.start_gather([key.new_empty(*key.shape[:3], key.shape[3] // 2 + 1, dtype=torch.uint8)])
    wait()
    for _, _, _, wait in sequence.gathered(key, value):
        wait()


def bench_operator(length: int, args: argparse.Namespace) -> dict[str, object]:
    """Times of one call of a length on one GPU and on all."""
    inputs = make_inputs("topical", length, args.heads, args.kv_heads, args.head_dim)
    sequence = shard_sequence(dist.group.WORLD, length)
    shards = [sequence.shard(x, 2) for x in inputs]
    with calls.held_density(args.density, length):
        one = clock(partial(attend, inputs), args.repeats)
        del inputs
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        many = clock(partial(attend_shards, sequence, shards), args.repeats)
        peak = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0
        alone = Remembered(ranks=sequence.ranks, layout=sequence.layout)
        object.__setattr__(alone, "brought", [])
        work = clock(partial(attend_remembered, alone, shards), args.repeats)
        object.__setattr__(alone, "brought", [])
        with s2o_compile.record() as recording:
            attend_shards(sequence, shards)
        density = recording.calls[0].density
        report = gather_report(recording, dist.group.WORLD)
    gather = clock(partial(gather_all, sequence, shards), args.repeats)
    return {
        "density": round(density, 4),
        "one_gpu_ms": round(1e3 * one.seconds, 2),
        "one_gpu_host_ms": round(1e3 * one.returned, 2),
        "context_parallel_ms": round(1e3 * many.seconds, 2),
        "host_ms": round(1e3 * many.returned, 2),
        "slices": count_slices(length, dist.get_world_size(), args),
        "speedup": round(one.seconds / many.seconds, 2),
        "gather_ms": round(1e3 * gather.seconds, 2),
        "gather_share": round(gather.seconds / many.seconds, 3),
        "exposed_share": round(max(many.seconds - work.seconds, 0.0) / many.seconds, 3),
        "imbalance": round(report.imbalance or 1.0, 3),
        "causal_imbalance": round(sequence.layout.causal_imbalance, 3),
        **({"peak_GiB": round(peak, 1)} if ON_GPU else {}),
    }


def count_slices(length: int, ranks: int, args: argparse.Namespace) -> int:
    """Slices of the busiest rank's call: the host launches about a dozen kernels for each."""
    segment_len, mask = default_segment_len(length), AttentionMask(causal=True)
    layout = layout_of(length, ranks)

    def call_of(queries: int, heads: int, first: int) -> AttentionCall:
        group = args.heads // args.kv_heads
        query, key = (
            torch.empty(1, h, n, args.head_dim, dtype=calls.DTYPE, device="meta")
            for h, n in ((heads * group, queries), (heads, length))
        )
        return AttentionCall(query=query, key=key, value=key, mask=AttentionMask(causal=True, offset=first), scale=1.0)

    whole = call_of(length, args.kv_heads, 0).but(mask=mask)
    scratch = schedule.scratch_bytes(whole)
    parts = head_pieces(whole.key, whole.value, layout)
    found = []
    for pieces in layout.pieces:
        cuts = 0
        for part in parts:
            heads = part.stop - part.start
            for piece in pieces:
                call = call_of(piece.stop - piece.start, heads, piece.start)
                cuts += len(list(schedule.slices(call, segment_len, 1, range(heads), scratch)))
        found.append(cuts)
    return max(found)


def layout_of(length: int, ranks: int) -> Layout:
    """The layout of `shard_sequence`."""
    return Layout.zigzag(length, ranks, units=(default_segment_len(length), 128, 1))


def cost_model(ranks: int, length: int, row: dict[str, Any], args: argparse.Namespace, measured: int) -> float:
    """Milliseconds of a call on some ranks: the longest of the GPU's work, its gathers, and the host's launches.

    Work is one GPU's, shared out unevenly. The gather of a rank grows with what others hold, (W - 1) / W of all keys
    and values, at the rate that was measured. The host's time is that of a slice on the measured ranks, times slices.
    """
    layout = layout_of(length, ranks)
    work = row["one_gpu_ms"] / ranks * layout.causal_imbalance * row["imbalance"] / row["causal_imbalance"]
    gather = row["gather_ms"] * ((ranks - 1) / ranks) / ((measured - 1) / measured) if measured > 1 else 0.0
    first = gather / 9  # nothing runs beside the numbers that rank keys, an eighth of the bytes of keys and values
    host = row["host_ms"] / row["slices"] * count_slices(length, ranks, args)
    return max(work + first, gather, host)


def merged(path: Path | None, only: Sequence[str]) -> tuple[list[dict[str, object]], dict[str, str]]:
    """The rows of other parts that a file holds, and the days on which its parts were measured."""
    days = dict.fromkeys(only, datetime.datetime.now(tz=datetime.UTC).date().isoformat())
    if path is None or not path.exists():
        return [], days
    old = json.loads(path.read_text())
    sections = {section for part in only for section in PARTS[part]}
    before = old["about"].get("measured") or dict.fromkeys(PARTS, old["about"]["date"])
    return [row for row in old["rows"] if row["section"] not in sections], {**before, **days}


@torch.no_grad()
def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--lengths", type=int, nargs="*", default=[2**17, 2**18, 2**19, 2**20])
    parser.add_argument("--model-lengths", type=int, nargs="*", default=[2**19, 2**20])
    parser.add_argument("--ways", nargs="*", choices=several_gpus_model.WAYS, default=several_gpus_model.WAYS[:2])
    parser.add_argument("--extrapolate-dense", type=int, default=2**20, help="from here on one dense layer is measured")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 4 head dims")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rank = int(os.environ["RANK"])
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    kept, days = merged(args.json if rank == 0 else None, args.only)
    rows = Rows(args.json if rank == 0 else None, ranks=dist.get_world_size(), density_held=args.density, measured=days)
    rows.extend(kept)
    output = contextlib.nullcontext() if rank == 0 else contextlib.redirect_stdout(open(os.devnull, "w"))  # noqa: SIM115
    with output:
        if "operator" in args.only:
            measure_operator(rows, args)
        if "model" in args.only:
            measure_models(rows, args)
    dist.destroy_process_group()


def measure_operator(rows: Rows, args: argparse.Namespace) -> None:
    """Rows of the operator and the model of its cost."""
    ranks, begin = dist.get_world_size(), time.perf_counter()
    rows.measure("correct", {}, partial(check, args))
    if "failed" in rows[-1]:
        raise SystemExit(f"no time is reported: {rows[-1]['failed']}")
    for length in args.lengths:
        rows.measure("operator", {"tokens": length}, partial(bench_operator, length, args))
        row = dict(rows[-1])
        if "failed" not in row:
            times = {f"model_{w}": round(cost_model(w, length, row, args, ranks), 2) for w in sorted({ranks, 4, 8})}
            rows.measure("cost", {"tokens": length, "extrapolated": [4, 8]}, lambda times=times: times)
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)


def measure_models(rows: Rows, args: argparse.Namespace) -> None:
    """Rows of the prefills."""
    begin, model = time.perf_counter(), several_gpus_model.llama(args, max(args.model_lengths))
    for length in args.model_lengths:
        for way in args.ways:
            measure = partial(several_gpus_model.bench, model, length, way, args)
            rows.measure("model", {"tokens": length, "layers": args.layers, "what": way}, measure)
            print(f"{time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
