"""Tensors of one call lie on one device, and every operator and public function says so.

A tensor without data (``meta``) beside one on the CPU has torch choose the function for shapes alone. Its output is
memory that nobody wrote, so it must be an error there, too.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import s2o_compile
from s2o_compile.kernels import dtensors, varlen_ops  # noqa: F401 (defines operators)
from s2o_compile.kernels.impl.flex import user_mods  # noqa: F401 (defines operators)
from s2o_compile.kernels.support.errors import InputError
from s2o_compile.serving import vllm_omni
from tests.conftest import CUDA

X = torch.randn(1, 2, 8, 16)
TOKENS, CACHE = X[0].transpose(0, 1), torch.randn(2, 4, 2, 16)
IDS, SEEN, SINKS = torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.bool), torch.zeros(2)
STARTS, TABLE = torch.tensor([0, 8]), torch.tensor([[0, 1]])
MASK, BLOCKS = torch.ones(8, 8, dtype=torch.bool), torch.ones(1, 2, 1, 1, dtype=torch.bool)

OPERATORS = {
    "attention": {"query": X, "key": X, "value": X, "key_mask": SEEN, "sinks": SINKS},
    "masked_attention": {"query": X, "key": X, "value": X, "attn_mask": MASK, "sinks": SINKS},
    "packed_attention": {
        **{"query": X, "key": X, "value": X, "documents": IDS, "key_documents": IDS, "key_mask": SEEN, "sinks": SINKS},
    },
    "attention_varlen": {
        **{"query": TOKENS, "key": TOKENS, "value": TOKENS, "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS},
        "sinks": SINKS,
    },
    "attention_paged": {
        **{"query": TOKENS, "key_cache": CACHE, "value_cache": CACHE, "block_table": TABLE, "cu_seqlens_q": STARTS},
        **{"seq_lens": torch.tensor([8]), "sinks": SINKS},
    },
    "in_memory": {"x": X},
    "place_blocks": {
        "ranked_keys": torch.arange(8, dtype=torch.int32).expand(1, 2, 1, 8).contiguous(),
        **{"n_ranked": torch.full((1, 2, 1), 8), "visits": torch.ones(1, 2, 1, dtype=torch.int32)},
        **{"partial": BLOCKS, "full": ~BLOCKS, "n_queries": 8, "n_keys": 8, "segment_len": 128, "pool": 1},
    },
    "rank_samples": {
        **{"logits": torch.randn(1, 2, 32, 8), "candidate": torch.ones(1, 2, 1, 8, dtype=torch.bool)},
        "non_finite": torch.zeros(1, 2, 8, dtype=torch.bool),
    },
}
HOST_TOO = ("block_table", "cu_seqlens_q", "cu_seqlens_k", "seq_lens")
"""Tensors that may lie on the CPU beside others elsewhere."""

TENSORS = [
    (name, x) for name, given in OPERATORS.items() for x in given if len(given) > 1 and torch.is_tensor(given[x])
]
"""Every tensor of an operator that has several."""


def call(name, given):
    return getattr(torch.ops.s2o, name).default(*given.values())


def moved(given, name, to=lambda x: x.to("meta")):
    return {other: to(x) if name in (other, None) and torch.is_tensor(x) else x for other, x in given.items()}


def test_the_table_has_every_operator_and_every_tensor():
    names = {name.removeprefix("s2o::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("s2o::")}
    assert names == set(OPERATORS)
    for name, given in OPERATORS.items():
        schema = getattr(torch.ops.s2o, name).default._schema
        tensors = [x.name for x in schema.arguments if "Tensor" in str(x.type)]
        assert tensors == [x for x in given if torch.is_tensor(given[x])]


@pytest.mark.parametrize("name", OPERATORS)
def test_one_device_is_accepted(name):
    """The rows of the table are calls that run, and with all of their tensors on another device they have shapes."""
    real, shapes = call(name, OPERATORS[name]), call(name, moved(OPERATORS[name], None))
    pairs = zip([real], [shapes], strict=True) if torch.is_tensor(real) else zip(real, shapes, strict=True)
    for x, y in pairs:
        assert (x.shape, x.dtype, y.is_meta) == (y.shape, y.dtype, True)


def message_of(name, tensor):
    """Of a call whose other tensors are on the CPU: the query is where all tensors ought to be."""
    first, second, *_ = OPERATORS[name]
    named, expected, got = (second, "meta", "cpu") if tensor == first else (tensor, "cpu", "meta")
    named = named.replace("_cache", "[_ ]cache")
    return rf"device of {named}: expected {expected}, as the {first}.*, got {got}\. Move all inputs to one device"


CONTEXTS = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize(("name", "tensor"), TENSORS, ids=str)
def test_a_tensor_on_another_device_is_an_error(name, tensor, context):
    with context():
        given = moved(OPERATORS[name], None, torch.clone)  # made here: a tensor of inference mode skips autograd
        with pytest.raises(InputError, match=message_of(name, tensor)):
            call(name, moved(given, tensor))


@pytest.mark.parametrize(("name", "tensor"), [row for row in TENSORS if "query" in OPERATORS[row[0]]], ids=str)
def test_also_where_a_gradient_is_wanted_and_in_forward_mode(name, tensor):
    given = moved(OPERATORS[name], None, torch.clone)
    first = given["query"].requires_grad_()
    with pytest.raises(InputError, match="device of"):
        call(name, moved(given, tensor))
    with torch.autograd.forward_ad.dual_level():
        given["query"] = torch.autograd.forward_ad.make_dual(first.detach(), torch.ones_like(first))
        with pytest.raises(InputError, match="device of"):
            call(name, moved(given, tensor))


@pytest.mark.parametrize(("name", "tensor"), TENSORS, ids=str)
def test_fake_tensors(name, tensor):
    """Of one device they are shapes; of two they are the same error, as torch's own operators raise one."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = moved(OPERATORS[name], None, mode.from_tensor)
        assert "FakeTensor" in str(call(name, given))
        with pytest.raises(InputError, match=message_of(name, tensor)):
            call(name, moved(given, tensor))


@pytest.mark.parametrize(("name", "tensor"), TENSORS, ids=str)
def test_lengths_may_be_the_hosts(name, tensor):
    given = {**moved(OPERATORS[name], None), tensor: OPERATORS[name][tensor]}
    if tensor in HOST_TOO:
        assert call(name, given)[0].is_meta
    else:
        with pytest.raises(InputError, match="device of"):
            call(name, given)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(("name", "tensor"), TENSORS, ids=str)
def test_beside_a_gpu(name, tensor, device):
    """Both have data: the function itself checks them."""
    given = moved(OPERATORS[name], None, lambda x: x.to(device))
    call(name, given)
    with pytest.raises(InputError, match="device of"):
        call(name, moved(OPERATORS[name], tensor, lambda x: x.to(device)))
    with contextlib.nullcontext() if tensor in HOST_TOO else pytest.raises(InputError, match="device of"):
        call(name, {**given, tensor: OPERATORS[name][tensor]})


@pytest.mark.parametrize("tensor", ["key", "key_mask"])
def test_a_compiled_call(tensor):
    """Dynamo finds it while it captures; a call on one device compiles."""
    torch._dynamo.reset()
    function = torch.compile(lambda *x: torch.ops.s2o.attention.default(*x)[0], backend="eager", fullgraph=True)
    assert function(*OPERATORS["attention"].values()).shape == X.shape
    with pytest.raises(Exception, match=rf"device of {tensor}: expected cpu"):
        function(*moved(OPERATORS["attention"], tensor).values())


def paged(**given):
    cache = given.pop("key_cache"), given.pop("value_cache")
    return s2o_compile.attention_paged(given.pop("query"), cache, **given)


def over_a_plan(**given):
    return s2o_compile.attention(**given, plan=s2o_compile.plan(X, X))


def omni(query, key, value, attn_mask):
    return vllm_omni.attn_fn(query, key, value, {"attn_mask": attn_mask}, False, 1.0)


PUBLIC = {
    "attention": (s2o_compile.attention, OPERATORS["attention"]),
    "attention-mask": (s2o_compile.attention, OPERATORS["masked_attention"]),
    "attention-plan": (over_a_plan, {"query": X, "key": X, "value": X}),
    "plan": (s2o_compile.plan, {"query": X, "key": X, "value": X, "key_mask": SEEN}),
    "attention_varlen": (s2o_compile.attention_varlen, OPERATORS["attention_varlen"]),
    "attention_paged": (paged, OPERATORS["attention_paged"]),
    "attention_paged-out": (paged, {**OPERATORS["attention_paged"], "out": torch.empty_like(TOKENS)}),
    "attention_paged-chunks": (paged, {**OPERATORS["attention_paged"], "chunks": s2o_compile.PrefillCache()}),
    "omni": (omni, {**dict.fromkeys(("query", "key", "value"), X.transpose(1, 2)), "attn_mask": SEEN}),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("name", "tensor"), [(name, x) for name, (_, given) in PUBLIC.items() for x in given if torch.is_tensor(given[x])]
)
def test_public_functions(name, tensor, gradients):
    function, given = PUBLIC[name]
    given = moved(given, None, lambda x: x.clone().requires_grad_(gradients and x.is_floating_point()))
    with pytest.raises(InputError, match=r"expected.*(cpu.*got.*meta|meta.*got.*cpu)"):
        function(**moved(given, tensor))


@pytest.mark.parametrize("in_dims", [(0, 0, 0, None, None), (0, 0, 0, 0, 0), (0, None, None, None, None)], ids=str)
@pytest.mark.parametrize("tensor", OPERATORS["attention"])
def test_under_vmap(tensor, in_dims):
    given = moved(OPERATORS["attention"], tensor)
    pairs = zip(given.values(), in_dims, strict=True)
    stacked = [x if dim is None else x[None].repeat(2, *[1] * x.dim()) for x, dim in pairs]
    with pytest.raises(InputError, match="device of"):
        torch.vmap(lambda *x: torch.ops.s2o.attention.default(*x)[0], in_dims)(*stacked)


def test_beside_dtensors():
    """A whole mask would be moved to their mesh, and torch makes memory out of a tensor without data."""
    with pytest.raises(InputError, match="device of mask or sinks: expected cpu, as the query, got meta"):
        dtensors._placed(SINKS.to("meta"), None, [], X, masked=False)
