"""Two ranks or four, one start of them, every way over several devices beside one: NCCL on GPUs, gloo on a CPU.

``pytest -m gpu -s`` prints each case as it begins, so that a time-out names it. All cases share shapes and dtype, so
that few kernels are compiled.
"""

import os
import tempfile
import time
import traceback
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn

import s2o_compile
from s2o_compile import S2OConfig
from tests.distributed.test_tensor_parallel import DIM, HEADS, KV_HEADS, Model, tensor_parallel, with_cpu_strategy
from tests.helpers.ranks import run_ranks

LENGTH, SEGMENT, BATCH, PADDED = 1101, 128, 2, 77
SECONDS = 40
SHORT = {"min_seq_len": 0, "segment_len": SEGMENT, "inner_backend": "eager"}
EXACT, EARLY = S2OConfig(tau=0.0, **SHORT), S2OConfig(tau=0.5, **SHORT)
MARKS = {
    "gloo": lambda ranks: [pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")],
    "nccl": lambda ranks: [
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < ranks, reason=f"needs {ranks} CUDA devices"),
    ],
}


class Place:
    """Where a rank runs, and the mesh of both."""

    def __init__(self):
        from torch.distributed.device_mesh import init_device_mesh

        on_gpu = dist.get_backend() == "nccl"
        self.device, self.dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
        self.mesh = init_device_mesh(self.device, (dist.get_world_size(),), mesh_dim_names=("ranks",))
        if not on_gpu:
            with_cpu_strategy()

    def random(self, *shape, seed=1):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)

    def put(self, model):
        return model.to(self.device, self.dtype).eval()

    def error(self, model, parallel, x):
        """Of a model over ranks and of the same on one device, beside the exact one in float32."""
        with torch.no_grad():
            exact = model.float()(x.float())
            model.to(self.dtype)
            wanted = s2o_compile.optimize(model, EXACT)(x)
            output = parallel(x)
        return {"error": [(y.float() - exact).abs().max().item() for y in (output, wanted)]}


def sequence_of(place, **options):
    from s2o_compile.distributed import shard_sequence

    return shard_sequence(place.mesh, LENGTH, segment_len=SEGMENT, **options)


def attend_shards(place, config, method, padded=False, **keywords):
    query, key, value = (place.random(BATCH, h, LENGTH, DIM, seed=h) for h in (HEADS, KV_HEADS, KV_HEADS + 10))
    value = value[:, :KV_HEADS]
    key[:, :, 3] *= 4  # a key that many queries look for
    key_mask = None
    if padded:
        key_mask = torch.ones(BATCH, LENGTH, dtype=torch.bool, device=place.device)
        key_mask[1, :PADDED] = False
    keywords |= {"causal": True, "config": config}
    wanted = s2o_compile.attention(query, key, value, key_mask=key_mask, **keywords)
    sequence = sequence_of(place, method=method, key_mask=key_mask)
    with sequence.attending():
        output = s2o_compile.attention(*(sequence.shard(x, 2) for x in (query, key, value)), **keywords)
    return zip(*(x if isinstance(x, tuple) else (x,) for x in (output, wanted)), strict=True), sequence


def operator(place, method, config, **keywords):
    pairs, sequence = attend_shards(place, config, method, **keywords)
    return {"same": all(torch.equal(sequence.gather(a, 2), b) for a, b in pairs)}


def sinks(place):
    found = {"sinks": torch.linspace(-1, 2, HEADS, device=place.device), "return_lse": True}
    return operator(place, "all_gather", EARLY, padded=True, **found)


def recorded(place):
    """The sampled error and the computed pairs of all ranks."""
    from s2o_compile.distributed import gather_report

    with s2o_compile.record() as recording:
        attend_shards(place, EXACT, "all_gather")
    alone, shards = recording.calls
    report = gather_report(recording, place.mesh)
    return {"error": [shards.error, alone.error], "same": report.rank_pairs is not None}


def dtensors(place):
    from torch.distributed.tensor import Shard, distribute_tensor

    tensors = [place.random(BATCH, h, LENGTH, DIM, seed=h) for h in (HEADS, KV_HEADS, KV_HEADS)]
    wanted = s2o_compile.attention(*tensors, causal=True, config=EARLY)
    found = []
    for dim in (0, 1):
        shards = [distribute_tensor(x, place.mesh, [Shard(dim)]) for x in tensors]
        found.append(torch.equal(s2o_compile.attention(*shards, causal=True, config=EARLY).full_tensor(), wanted))
    return {"same": all(found)}


def model_and_input(place):
    return place.put(Model()), place.random(BATCH, LENGTH, HEADS * DIM)


def tensor_parallel_model(place, local):
    model, x = model_and_input(place)
    sharded = tensor_parallel(place.put(Model()), place.mesh, local=local)
    return place.error(model, s2o_compile.optimize(sharded, EXACT), x)


def fsdp(place):
    from torch.distributed.fsdp import fully_shard

    model, x = model_and_input(place)
    sharded = place.put(Model())
    for layer in sharded.layers:
        fully_shard(layer, mesh=place.mesh)
    return place.error(model, s2o_compile.optimize(fully_shard(sharded, mesh=place.mesh), EXACT), x)


def ddp(place):
    model, x = model_and_input(place)
    wrapped = nn.parallel.DistributedDataParallel(place.put(Model()))
    return place.error(model, s2o_compile.optimize(wrapped, EXACT), x)


def context_parallel_model(place, method):
    from s2o_compile.distributed import context_parallel

    model, x = model_and_input(place)
    return place.error(
        model,
        context_parallel(place.put(Model()), place.mesh, EXACT, method=method, tokens="x", positions=None),
        x,
    )


def in_two_dimensions(place):
    """Heads shared out by tensor parallelism, and by Ulysses what a rank has of them."""
    from torch.distributed.device_mesh import init_device_mesh

    from s2o_compile.distributed import context_parallel

    model, x = model_and_input(place)
    mesh = init_device_mesh(place.device, (2, 2), mesh_dim_names=("cp", "tp"))
    sharded = tensor_parallel(place.put(Model()), mesh["tp"], local=True)
    ways = {"method": "ulysses", "tokens": "x", "positions": None}
    return place.error(model, context_parallel(sharded, mesh["cp"], EXACT, **ways), x)


def llama(place, **options):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": DIM}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 4096}
    config = transformers.LlamaConfig(**sizes, **heads, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).to(place.device, place.dtype).eval()
    model.set_attn_implementation("s2o")
    return configured(model)


def configured(model):
    import s2o_compile.transformers

    s2o_compile.transformers.configure(model, EXACT)
    return model


def tokens(place):
    ids = torch.randint(1, 96, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3)).to(place.device)
    mask = torch.ones_like(ids)
    mask[1, :PADDED] = 0
    return ids, mask


def largest(a, b):
    return (a.float() - b.float()).abs().max().item()


def generated(place):
    """A model of transformers whose prefill is shared out, with padding, and what it generates from there."""
    from s2o_compile.distributed import context_parallel

    model, (ids, mask) = llama(place), tokens(place)
    parallel = context_parallel(model, place.mesh, EXACT)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, use_cache=False).logits
        found = largest(
            parallel(ids, attention_mask=mask, use_cache=False).logits * mask[..., None], wanted * mask[..., None]
        )
        options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
        same = torch.equal(parallel.generate(ids, **options), model.generate(ids, **options))
    return {"close": found, "same": same}


def context_parallel_fsdp(place):
    """One sequence over ranks that hold shards of the weights, too: without compiling."""
    from torch.distributed.fsdp import fully_shard

    from s2o_compile.distributed import context_parallel

    sharded, (ids, mask) = llama(place), tokens(place)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=place.mesh)
    fully_shard(sharded, mesh=place.mesh)
    with torch.no_grad():
        wanted = llama(place)(ids, attention_mask=mask, use_cache=False).logits * mask[..., None]
        parallel = context_parallel(sharded, place.mesh, EXACT)
        found = parallel(ids, attention_mask=mask, use_cache=False).logits * mask[..., None]
    with pytest.raises(s2o_compile.InputError, match="expected a model that is captured as one graph"):
        context_parallel(fully_shard(place.put(Model()), mesh=place.mesh), place.mesh, positions=None)
    return {"close": largest(found, wanted)}


def tp_plan(place):
    """A plan of transformers, under which every rank has key/value heads of its own."""
    import transformers
    from transformers.distributed import DistributedConfig

    model, (ids, _) = llama(place), tokens(place)
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    if dist.get_rank() == 0:
        model.save_pretrained(folders[0])
    dist.barrier()
    sharded = transformers.LlamaForCausalLM.from_pretrained(
        folders[0],
        distributed_config=DistributedConfig(tp_plan="auto"),
        dtype=place.dtype,
        attn_implementation="s2o",
    )
    with torch.no_grad():
        wanted, found = model(ids, use_cache=False).logits, configured(sharded.eval())(ids, use_cache=False).logits
    weight = sharded.model.layers[0].self_attn.q_proj.weight
    mine = weight.to_local() if hasattr(weight, "to_local") else weight
    return {"close": largest(found, wanted), "same": mine.shape[0] == HEADS * DIM // place.mesh.size()}


def refused(place):
    """Errors, each of which must come on both ranks."""
    from s2o_compile.distributed import shard_sequence

    def other_lengths():
        shard_sequence(place.mesh, LENGTH + dist.get_rank())

    def odd_heads():
        sequence = sequence_of(place, method="ulysses")
        with sequence.attending():
            s2o_compile.attention(*[sequence.shard(place.random(1, 3, LENGTH, DIM), 2)] * 3, causal=True)

    def wrong_device():
        sequence = sequence_of(place)
        x = sequence.shard(torch.randn(1, 2, LENGTH, DIM), 2)
        with sequence.attending():
            s2o_compile.attention(x, x, x, causal=True)

    found = {}
    for name, call in {"lengths": other_lengths, "heads": odd_heads, "device": wrong_device}.items():
        try:
            call()
            found[name] = "no error"
        except (s2o_compile.InputError, s2o_compile.RankError) as error:
            found[name] = str(error)
    return {"errors": found}


CASES = {
    "gathered, tau 0": lambda place: operator(place, "all_gather", EXACT),
    "gathered, tau .5": lambda place: operator(place, "all_gather", EARLY),
    "gathered, tau .5, padding": lambda place: operator(place, "all_gather", EARLY, padded=True),
    "gathered, padding, sinks, lse": sinks,
    "ulysses, tau 0, padding": lambda place: operator(place, "ulysses", EXACT, padded=True),
    "ulysses, tau .5": lambda place: operator(place, "ulysses", EARLY),
    "recorded": recorded,
    "DTensors": dtensors,
    "tensor parallel": lambda place: tensor_parallel_model(place, True),
    "tensor parallel, DTensors": lambda place: tensor_parallel_model(place, False),
    "FSDP2": fsdp,
    "DDP": ddp,
    "context parallel": lambda place: context_parallel_model(place, "all_gather"),
    "context parallel, ulysses": lambda place: context_parallel_model(place, "ulysses"),
    "context parallel, FSDP2": context_parallel_fsdp,
    "generate": generated,
    "tp_plan": tp_plan,
    "refused": refused,
}
ON_FOUR = {
    "context parallel, ulysses, tensor parallel": in_two_dimensions,
    **{name: CASES[name] for name in ("context parallel, ulysses", "context parallel, FSDP2", "generate", "tp_plan")},
}
"""With four ranks; the other ways are those of `test_tensor_parallel`."""
ROWS = [
    pytest.param(backend, ranks, case, id=f"{backend}-{ranks}-{case}", marks=[pytest.mark.slow, *MARKS[backend](ranks)])
    for backend in MARKS
    for ranks, cases in ((2, CASES), (4, ON_FOUR))
    for case in cases
]


def every_case(rank, names):
    place, found, begin = Place(), {}, time.perf_counter()
    for name in names:
        print(f"[rank {rank}] {time.perf_counter() - begin:6.1f} s  {name}", flush=True)
        try:
            found[name] = {**CASES, **ON_FOUR}[name](place)
        except Exception:  # whatever it is, the case's test shows it
            found[name] = {"failed": traceback.format_exc()}
        torch._dynamo.reset()
    print(f"[rank {rank}] {time.perf_counter() - begin:6.1f} s  done", flush=True)
    return found


@cache
def answers(backend, ranks):
    """One start of the ranks for all cases; ``S2O_RANK_CASES`` names some of them, separated by semicolons."""
    cases = CASES if ranks == 2 else ON_FOUR
    names = [name for name in cases if name in os.environ.get("S2O_RANK_CASES", name).split(";")]
    return run_ranks(every_case, ranks, names, backend=backend, seconds=SECONDS)


@pytest.mark.parametrize(("backend", "ranks", "case"), ROWS)
def test_as_one_device(backend, ranks, case):
    found = answers(backend, ranks)
    for rank, answer in enumerate(found):
        assert isinstance(answer, dict), f"rank {rank}: {answer or 'ended without an answer'}"
        if case not in answer:
            pytest.skip("S2O_RANK_CASES leaves this case out")
        result = answer[case]
        assert "failed" not in result, result["failed"]
        assert result.get("same", True)
        if "error" in result:
            error, of_one_device = result["error"]
            assert error < 4 * of_one_device + 1e-5
        assert result.get("close", 0.0) < (1e-5 if backend == "gloo" else 0.05)
    if case == "refused":
        for rank, answer in enumerate(found):
            errors = answer[case]["errors"]
            assert "expected the same on every rank" in errors["lengths"]
            assert "expected key/value heads that 2 ranks can share out evenly, got 3" in errors["heads"]
            assert ("expected CUDA tensors, which NCCL exchanges, got cpu" in errors["device"]) == (backend == "nccl")
            assert all(f"[rank {rank} of 2]" in error for error in errors.values() if error != "no error")
