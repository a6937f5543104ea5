"""What S2O costs a vLLM server on a CPU: one layer's prefill by vLLM's kernel, and by S2O over the same cache.

make vllm       # once: the environment and the model
.venv-vllm/bin/python benchmarks/vllm_cpu.py build/smollm2 --json benchmarks/results/vllm-cpu.json

Queries, keys and values are those of SmolLM2 on the demo's text. Seconds are CPU time of one thread, so that other
programs on the machine count little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from results_file import Rows
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from vllm import _custom_ops as ops

from s2o_compile import S2OConfig
from s2o_compile.cli.demo import document
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.torch_compat import has_amx
from s2o_compile.varlen import attention_paged
from s2o_compile.vllm.cpu_cache import CacheOrder

LAYERS = (3, 15, 27)
BLOCK = 128
RUNS = 3


@torch.no_grad()
def layer_inputs(model: str, tokens: int) -> dict[int, list[Tensor]]:
    """Query, key and value [tokens, heads, D] of some layers."""
    found: dict[int, list[Tensor]] = {}

    def attend(module, query, key, value, *rest, **given):  # noqa: ANN001, ANN002, ANN003, ANN202 (transformers')
        if module.layer_idx in LAYERS:
            found[module.layer_idx] = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
        return sdpa_attention_forward(module, query, key, value, *rest, **given)

    AttentionInterface.register("kept", attend)
    ids = AutoTokenizer.from_pretrained(model)(document()[:100_000], return_tensors="pt").input_ids[:, :tokens]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="kept")
    loaded.model(ids)
    return found


def seconds(call: Callable[[], object]) -> float:
    """Least CPU time of some runs."""
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def bench_layer(tensors: list[Tensor], dtype: torch.dtype) -> dict[str, object]:
    """Both kernels on one layer."""
    query, key, value = (x.to(dtype) for x in tensors)
    tokens, heads, dim = query.shape
    kv_heads = key.shape[1]
    isa = "amx" if dtype is torch.bfloat16 and has_amx() else "vec"
    cache = torch.zeros(tokens // BLOCK, kv_heads, BLOCK, 2 * dim, dtype=dtype)
    halves = cache.view(len(cache), kv_heads, 2 * BLOCK, dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, torch.arange(tokens), isa)
    starts, lens = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    table = torch.arange(len(cache), dtype=torch.int32)[None]
    outputs = [torch.empty_like(query) for _ in range(3)]

    def vllm() -> None:
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, seq_lens=lens, dtype=dtype,
            query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True,
        )  # fmt: skip
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=halves[0], value_cache=halves[1], output=outputs[0], query_start_loc=starts,
            seq_lens=lens, scale=dim**-0.5, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table,
            softcap=0, scheduler_metadata=schedule, s_aux=None,
        )  # fmt: skip

    def s2o(tau: float, output: Tensor) -> None:
        pages = CacheOrder.of(isa, cache).unpacked(cache)
        config = S2OConfig(tau=tau, min_seq_len=0)
        attention_paged(query, pages, table, [0, tokens], [tokens], config=config, out=output)

    row: dict[str, object] = {"isa": isa, "vllm_s": round(seconds(vllm), 3)}
    for name, tau, output in (("s2o", 0.5, outputs[1]), ("s2o at tau 0", 0.0, outputs[2])):
        row[f"{name}_s"] = round(seconds(lambda tau=tau, output=output: s2o(tau, output)), 3)
        error = (output - outputs[0]).float().norm() / outputs[0].float().norm()
        row[f"{name}, difference"] = round(error.item(), 5)
    with record_calls() as calls:
        s2o(0.5, outputs[1])
    return row | {"s2o, density": round(calls[0].density, 3)}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of SmolLM2, as examples/vllm/save_smollm2.py writes it")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(args.json, model="SmolLM2-135M-Instruct", tokens=args.tokens)
    for layer, tensors in layer_inputs(args.model, args.tokens).items():
        for dtype in (torch.float32, torch.bfloat16):
            what = {"layer": layer, "dtype": str(dtype).removeprefix("torch.")}
            rows.measure("One layer on a CPU", what, partial(bench_layer, tensors, dtype))


if __name__ == "__main__":
    main()
