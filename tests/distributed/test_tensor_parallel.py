"""Models and tensors that ranks share out by heads or by batch: DTensors, tensor parallelism, DDP, FSDP2.

Settings by head differ so much that another head's would be seen in the output.
"""

import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.transformers.tensor_parallel import of_rank
from tests.helpers.ranks import check_ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

ROOT = Path(__file__).parents[2]
HEADS, KV_HEADS, DIM, LENGTH, BATCH = 8, 4, 16, 600, 4
TAUS = (0.0, 0.3, 1.0, 3.0, 0.0, 0.6, 2.0, 0.1)
SHORT = {"min_seq_len": 0, "segment_len": 128, "inner_backend": "eager"}
CONFIGS = {
    "plain": S2OConfig(tau=0.5, **SHORT),
    "tau-by-head": S2OConfig(tau=TAUS, **SHORT),
    "site-tau": S2OConfig(site_tau={"layers.1": TAUS}, **SHORT),
    "dense-heads": S2OConfig(tau=3.0, dense_heads={"layers.0": (1,), "layers.1": (0,)}, **SHORT),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        width = HEADS * DIM
        self.q_proj, self.o_proj = nn.Linear(width, HEADS * DIM), nn.Linear(HEADS * DIM, width)
        self.k_proj, self.v_proj = nn.Linear(width, KV_HEADS * DIM), nn.Linear(width, KV_HEADS * DIM)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, DIM).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = scaled_dot_product_attention(3 * q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, attention=Attention):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(attention() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class ExchangesByHand(Model):
    """Plain weights and an exchange of their own: nothing says which heads a rank has."""

    def forward(self, x):
        from torch.distributed._functional_collectives import all_reduce

        for layer in self.layers:
            x = x + all_reduce(layer(x), "avg", dist.group.WORLD)
        return x


class PackedAttention(Attention):
    """Attention written out, under the mask of documents; on DTensors the mask is one, too."""

    def __init__(self):
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(HEADS * DIM, HEADS * DIM), nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, x):
        from torch.distributed.tensor import DTensor, Replicate

        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, DIM).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        index = torch.arange(length)
        ids = torch.bucketize(index, torch.tensor([210, 211, 511]))[None]
        mask = (ids[:, None, :, None] == ids[:, None, None]) & (index <= index[:, None])
        if isinstance(q, DTensor):
            mask = DTensor.from_local(mask, q.device_mesh, [Replicate()], run_check=False)
        y = (q @ k.transpose(2, 3) / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return self.o_proj(y.transpose(1, 2).flatten(2))


def inputs():
    return torch.randn(BATCH, LENGTH, HEADS * DIM, generator=torch.Generator().manual_seed(2))


def with_cpu_strategy():
    """SDPA of a CPU has no sharding strategy in torch; that of CUDA has."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    @register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    def _(*tensors, **keywords):
        rest = [None] * (len(tensors) - 3 + len(keywords))
        return [([p] * 2, [p] * 3 + rest) for p in (Replicate(), Shard(0), Shard(1))]


def tensor_parallel(model, mesh, *, local):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"*.o_proj": RowwiseParallel()}
    plan |= {f"*.{name}_proj": ColwiseParallel(use_local_output=local) for name in "qkv"}
    return parallelize_module(model, mesh, {f"layers.{name}": style for name, style in plan.items()})


def run(model, config):
    with torch.no_grad(), s2o_compile.record() as recording:
        output = s2o_compile.optimize(model, config)(inputs())
    return output, recording


def compare_operators(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    query, key, value = (torch.randn(BATCH, heads, LENGTH, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    key_mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    key_mask[1, :30] = False
    attn_mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril() & key_mask[:, None, None]
    config = CONFIGS["tau-by-head"]
    calls = {
        "terms": {"causal": True, "key_mask": key_mask, "sinks": torch.randn(HEADS), "return_lse": True},
        "dense-heads": {"causal": True, "dense_heads": (1,)},
        "attn_mask": {"attn_mask": attn_mask, "sinks": torch.randn(HEADS)},
    }
    found = {}
    for name, keywords in calls.items():
        wanted = s2o_compile.attention(query, key, value, **keywords, config=config)
        for placement in (Replicate(), Shard(0), Shard(1)):
            shards = [distribute_tensor(x, mesh, [placement]) for x in (query, key, value)]
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    output = s2o_compile.attention(*shards, **keywords, config=config)
                pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (output, wanted)), strict=True)
                error = max((a.full_tensor() - b).abs().max().item() for a, b in pairs)
                first = output[0] if isinstance(output, tuple) else output
                found["operator", name, str(placement), mode.__name__] = error, first.placements == (placement,)
    pairs = torch.rand(BATCH, LENGTH) > 0.5  # as many queries as entries of the batch: [Nq, Nk] is no [B, Nk]
    few = query[:, :, :BATCH]
    wanted, _ = torch.ops.s2o.masked_attention(few, key, value, pairs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            shards = [distribute_tensor(x, mesh, [Shard(0)]) for x in (few, key, value)]
            output, _ = torch.ops.s2o.masked_attention(*shards, distribute_tensor(pairs, mesh, [Replicate()]))
        error = (output.full_tensor() - wanted).abs().max().item()
        found["operator", "pairs", mode.__name__] = error, output.placements == (Shard(0),)
    options = {"causal": True, "min_seq_len": 0, "dense_heads": [1], "tau": 3.0, "return_lse": True}
    wanted = torch.ops.s2o.attention(query, key, value, **options)
    for placement in (Shard(0), Shard(1)):
        with torch.inference_mode():
            shards = [distribute_tensor(x, mesh, [placement]) for x in (query, key, value)]
            outputs = torch.ops.s2o.attention(*shards, **options)
        errors = [(a.full_tensor() - b).abs().max().item() for a, b in zip(outputs, wanted, strict=True)]
        found["dispatcher", str(placement)] = max(errors), True
    try:
        s2o_compile.attention(*(distribute_tensor(x, mesh, [Shard(2)]) for x in (query, key, value)), causal=True)
    except s2o_compile.InputError as error:
        found["sequence"] = str(error)
    return found


def compare_packed(mesh):
    """The operators over packed sequences and pages, which have placements by heads alone but for documents."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from s2o_compile.kernels import dtensors

    torch.manual_seed(0)
    query, key, value = (torch.randn(BATCH, heads, LENGTH, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    starts, sinks, found = [0, 211, 522, LENGTH], torch.randn(HEADS), {}
    ids = torch.arange(3).repeat_interleave(torch.tensor(starts).diff()) * torch.arange(BATCH)[:, None]
    options = {"causal": True, "dense_heads": [1, 2], "head_tau": TAUS, "min_seq_len": 0, "segment_len": 128}
    wanted, _ = torch.ops.s2o.packed_attention(query, key, value, ids, None, None, sinks, **options)
    for placement in (Replicate(), Shard(0), Shard(1)):
        for attend in (dtensors.packed_attention, torch.ops.s2o.packed_attention):
            shards = [distribute_tensor(x, mesh, [placement]) for x in (query, key, value)]
            output, _ = attend(*shards, ids, None, None, sinks, **options)
            error = (output.full_tensor() - wanted).abs().max().item()
            found["packed", "documents", str(placement), attend is torch.ops.s2o.packed_attention] = (
                error,
                output.placements == (placement,),
            )
    config = S2OConfig(tau=TAUS, dense_heads={"site": (1, 2)}, min_seq_len=0, segment_len=128)
    given = {"sinks": sinks, "return_lse": True, "config": config, "site": "site"}
    tokens, caches = [x[0].transpose(0, 1) for x in (query, key, value)], torch.randn(2, 80, 16, KV_HEADS, DIM)
    lengths = torch.randperm(80)[:75].view(3, 25), starts, [300, 311, 85]
    of_tokens = s2o_compile.attention_varlen(*tokens, starts, starts, **given)
    in_pages = s2o_compile.attention_paged(tokens[0], (caches[0], caches[1]), *lengths, **given)
    for of_tensors, of_caches, of_lse in (([Replicate()],) * 3, ([Shard(1)], [Shard(2)], [Shard(0)])):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                shards = [distribute_tensor(x, mesh, of_tensors) for x in tokens]
                pages = tuple(distribute_tensor(x, mesh, of_caches) for x in caches)
                first = s2o_compile.attention_varlen(*shards, starts, starts, **given)
                second = s2o_compile.attention_paged(shards[0], pages, *lengths, **given)
            for name, outputs, exact in (("varlen", first, of_tokens), ("paged", second, in_pages)):
                error = max((a.full_tensor() - b).abs().max().item() for a, b in zip(outputs, exact, strict=True))
                placed = [list(x.placements) for x in outputs] == [of_tensors, of_lse]
                found["packed", name, str(of_tensors), mode.__name__] = error, placed
    try:
        s2o_compile.attention_varlen(*(distribute_tensor(x, mesh, [Shard(0)]) for x in tokens), starts, starts)
    except s2o_compile.InputError as error:
        found["tokens"] = str(error)
    return found


def compare_models(mesh):
    found, marked, every = {}, CONFIGS["dense-heads"], mesh.size() == 2
    if every:
        wanted, _ = run(Model(PackedAttention).eval(), marked)
        output, recording = run(tensor_parallel(Model(PackedAttention).eval(), mesh, local=False), marked)
        packed = [site.mask for site in recording.report.sites] == ["packed causal"] * 2
        found["model", "packed"] = (output - wanted).abs().max().item(), packed
    for name, config in (CONFIGS if every else {"dense-heads": marked}).items():
        wanted, _ = run(Model().eval(), config)
        for local in (True, False):
            output, recording = run(tensor_parallel(Model().eval(), mesh, local=local), config)
            found["model", name, local] = (output - wanted).abs().max().item(), recording.report.rewritten == 2
    for name in ("plain", "dense-heads") if every else ():
        _, recording = run(ExchangesByHand().eval(), CONFIGS[name])
        found["by hand", name] = [site.reason for site in recording.report.sites]
    return found


def compare_wrappers(mesh):
    from torch.distributed.fsdp import fully_shard

    config, found = CONFIGS["tau-by-head"], {}
    wanted, _ = run(Model().eval(), config)
    ddp = nn.parallel.DistributedDataParallel(Model().eval())
    fsdp = Model().eval()
    for layer in fsdp.layers:
        fully_shard(layer, mesh=mesh)
    fsdp = fully_shard(fsdp, mesh=mesh)
    for name, model in (("ddp", ddp), ("fsdp", fsdp)):
        output, recording = run(model, config)
        found[name] = (output - wanted).abs().max().item(), [call.path for call in recording.calls] == ["s2o"] * 2
    for name in ("dense-heads", "site-tau") if mesh.size() == 2 else ():
        wanted, _ = run(Model().eval(), CONFIGS[name])
        output, recording = run(fsdp, CONFIGS[name])
        names = [site.name for site in recording.report.sites]
        found["by site", name] = (output - wanted).abs().max().item(), names == ["layers.0", "layers.1"]
    return found


def compare_transformers(mesh):
    import transformers
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    import s2o_compile.transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    shape = transformers.LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
    model, ids = transformers.LlamaForCausalLM(shape).eval(), torch.arange(LENGTH)[None] % 50
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(40)
    model.set_attn_implementation("s2o")
    sites = {"model.layers.0.self_attn": (1,)}
    config = S2OConfig(dense_heads=sites, site_tau={"model.layers.1.self_attn": TAUS}, tau=3.0, min_seq_len=0)
    s2o_compile.transformers.configure(model, config)
    with torch.no_grad():
        wanted = model(ids).logits
        styles = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        for layer in model.model.layers:
            parallelize_module(layer, mesh, {**styles, "self_attn.o_proj": RowwiseParallel()})
        return {"interface": ((model(ids).logits - wanted).abs().max().item(), True)}


def compare(rank, *parts):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    with_cpu_strategy()
    return {key: value for part in parts for key, value in part(mesh).items()}


@cache
def results(ranks=2):
    answers = check_ranks(compare, ranks, compare_operators, compare_packed, compare_models, compare_wrappers)
    assert all(answer.keys() == answers[0].keys() for answer in answers)
    return answers


def named(kind, ranks=2):
    return [answer[key] for answer in results(ranks) for key in answer if key == kind or key[0] == kind]


KINDS = ("operator", "dispatcher", "packed", "model", "ddp", "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "kind"), [*((2, kind) for kind in (*KINDS, "by site")), *((4, kind) for kind in KINDS)]
)
def test_as_one_device(ranks, kind):
    found = named(kind, ranks)
    assert found
    for error, sparse_or_placed in found:
        assert error < 1e-5
        assert sparse_or_placed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_interface_of_transformers(ranks):
    pytest.importorskip("transformers")
    for answer in check_ranks(compare, ranks, compare_transformers):
        error, _ = answer["interface"]
        assert error < 1e-5


@pytest.mark.slow
def test_a_sequence_in_shards_is_refused():
    for kind, expected in (("sequence", "by batch or heads"), ("tokens", "by heads")):
        for text in named(kind):
            assert f"expected Replicate, or Shard {expected}, got" in text
            assert "context_parallel" in text


@pytest.mark.slow
def test_heads_that_nobody_knows_stay_dense():
    for answer in results():
        assert answer["by hand", "plain"] == ["", ""]
        assert all("which of them this rank has is not known" in x for x in answer["by hand", "dense-heads"])


def test_settings_by_head():
    from s2o_compile.kernels.core.head_shards import WHOLE, HeadShard

    second = HeadShard(1, 2)
    assert second.dense_heads([0, 2, 3], kv_heads=2) == [0, 1]
    assert second.head_tau([0.1, 0.2, 0.3, 0.4], heads=2) == [0.3, 0.4]
    assert second.head_tau([0.1, 0.2], heads=2) == [0.1, 0.2]  # sliced by the user
    assert WHOLE.dense_heads([0, 2], kv_heads=3) == [0, 2]
    with pytest.raises(s2o_compile.InputError, match="below 4, of all ranks together"):
        second.dense_heads([4], kv_heads=2)
    with pytest.raises(s2o_compile.InputError, match="one number, or 4, one for each query head of all 2 ranks"):
        second.head_tau([0.1] * 3, heads=2)


def test_one_device_has_the_heads_that_it_has():
    """A decoder may have other heads than its configuration's first number, which is the encoder's."""
    module = nn.Linear(2, 2)
    module.config = SimpleNamespace(num_attention_heads=8)
    options = of_rank({"dense_heads": [1], "head_tau": [0.1, 0.2, 0.3, 0.4]}, module, 4, 2)
    assert options == {"dense_heads": [1], "head_tau": [0.1, 0.2, 0.3, 0.4]}


LATE = """
import sys, torch, s2o_compile
assert "torch.distributed.tensor" not in sys.modules
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
mesh = init_device_mesh("cpu", (1,))
x = torch.randn(3, 1, 2, 300, 16).unbind(0)
shards = [distribute_tensor(t, mesh, [Shard(1)]) for t in x]
exact = {"causal": True, "tau": 0.0, "min_seq_len": 0}
first = s2o_compile.attention(*shards, causal=True, config=s2o_compile.S2OConfig(tau=0.0, min_seq_len=0))
with torch.inference_mode():
    second = torch.ops.s2o.attention(*[distribute_tensor(t, mesh, [Shard(0)]) for t in x], **exact)[0]
wanted = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True)
print([torch.allclose(y.full_tensor(), wanted, atol=1e-5) for y in (first, second)])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_dtensors_that_come_behind_the_import(tmp_path):
    """The import does not load their package; torch hears of the operators with the first attention on DTensors."""
    command = [sys.executable, "-W", "ignore", "-c", LATE, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split("\n")[0] == "[True, True]", done.stderr
