"""Numbers given to an attention: Python's or a library's, or one error that names the argument; and no wrap-around."""

import math

import numpy as np
import pytest
import torch

import s2o_compile
from s2o_compile import InputError, S2OConfig

LENGTH = 260
CONFIG = S2OConfig(tau=0.0, min_seq_len=0)
BAD = {
    "fraction": 1.5,
    "flag": True,
    "nan": math.nan,
    "inf": math.inf,
    "text": "3",
    "bytes": b"3",
    "list": [1],
    "tensor": torch.tensor(4),
    "array": np.array(4),
    "flag-of-numpy": np.True_,
    "huge": 2**63,
    "longest": 10**5000,
    "least": -(2**63),
}
GOOD = {"scale": ("fraction", "huge", "least"), "softcap": ("fraction", "huge")}


def tensors(heads=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, LENGTH, 16, generator=generator) for _ in range(3)]


@pytest.mark.filterwarnings("ignore::s2o_compile.DenseGradientWarning")
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ["causal_offset", "window", "attention_chunk", "scale", "softcap", "dense_heads"])
def test_what_is_no_number_is_one_error_that_names_the_argument(name, kind, grad):
    query, key, value = tensors()
    given = {name: [BAD[kind]] if name == "dense_heads" else BAD[kind]}

    def call():
        return s2o_compile.attention(query.requires_grad_(grad), key, value, causal=True, config=CONFIG, **given)

    if kind in GOOD.get(name, ()):
        assert call().isfinite().all()
        return
    with pytest.raises(InputError, match=f"attention: {name}: expected") as caught:
        call()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("heads", [3, "0", b"\0", {0: 1}, None, torch.tensor([0])], ids=repr)
def test_dense_heads_are_a_sequence(heads):
    with pytest.raises(InputError, match="dense_heads: expected a sequence"):
        s2o_compile.attention(*tensors(), dense_heads=heads)


@pytest.mark.parametrize("flag", [1, "no", None, np.True_, torch.tensor(True)], ids=repr)
@pytest.mark.parametrize("name", ["causal", "return_lse"])
def test_flags_are_flags(name, flag):
    with pytest.raises(InputError, match=f"{name}: expected True or False"):
        s2o_compile.attention(*tensors(), **{name: flag})


@pytest.mark.parametrize("name", ["causal_offset", "scale", "softcap"])
def test_a_plan_is_told_numbers_too(name):
    query, key, _ = tensors()
    with pytest.raises(InputError, match=f"{name}: expected"):
        s2o_compile.plan(query, key, causal=True, config=CONFIG, **{name: "3"})


def test_a_mask_beside_a_number_that_is_none():
    with pytest.raises(InputError, match="scale: expected"):
        s2o_compile.attention(*tensors(), attn_mask=torch.ones(LENGTH, LENGTH, dtype=torch.bool), scale="3")


def test_numbers_of_a_library_become_pythons():
    plain = {"causal_offset": 4, "window": 100, "scale": 0.5, "softcap": 2.0, "dense_heads": [1]}
    numpy = {
        "causal_offset": np.int64(4),
        "window": np.uint8(100),
        "scale": np.float32(0.5),
        "softcap": np.float16(2.0),
        "dense_heads": (np.int8(1),),
    }
    wanted, found = (s2o_compile.attention(*tensors(), causal=True, config=CONFIG, **given) for given in (plain, numpy))
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("softcap", [1e300, 1e-300])
def test_a_softcap_that_float32_cannot_hold(softcap):
    with pytest.raises(InputError, match="softcap: expected"):
        s2o_compile.attention(*tensors(), softcap=softcap, config=CONFIG)


def dense(query, key, value, offset, window, chunk):
    """In float64, and with Python's integers, which do not wrap around."""

    def seen(i, j):
        inside = window is None or j > i + offset - window
        return j <= i + offset and inside and (chunk is None or j // chunk == (i + offset) // chunk)

    mask = torch.tensor([[seen(i, j) for j in range(LENGTH)] for i in range(LENGTH)])
    logits = (query.double() @ key.double().mT / 4).masked_fill(~mask, -math.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ value.double()


FAR = [2**31, 2**61, 2**62, 2**63 - 1]
TERMS = [(None, None), (50, None), (2**31, None), (2**63 - 1, None), (None, 64), (None, 2**63 - 1)]


@pytest.mark.filterwarnings("ignore::s2o_compile.DenseGradientWarning")
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("least", [0, 10**6], ids=["long", "short"])
@pytest.mark.parametrize(("window", "chunk"), TERMS)
@pytest.mark.parametrize("offset", [0, -100, *FAR, *(-x for x in FAR)])
def test_positions_do_not_wrap_around(offset, window, chunk, least, grad):
    query, key, value = tensors(heads=1)

    def call():
        return s2o_compile.attention(
            query.requires_grad_(grad),
            key,
            value,
            causal=True,
            causal_offset=offset,
            window=window,
            attention_chunk=chunk,
            config=S2OConfig(tau=0.0, min_seq_len=least),
        ).detach()

    if abs(offset) > 2**61 and (window or chunk):
        with pytest.raises(InputError, match="causal_offset: expected an integer from"):
            call()
        return
    wanted = dense(query.detach(), key, value, offset, window, chunk)
    assert (call().double() - wanted).abs().max() < 1e-5


def test_compiled_calls_see_numbers_that_change():
    """Nothing is compared while a graph is captured, so one graph serves every offset."""
    graphs = []

    def count(gm, _):
        graphs.append(gm)
        return gm

    def call(query, key, value, offset):
        return s2o_compile.attention(query, key, value, causal=True, causal_offset=offset, config=CONFIG)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=count, dynamic=True)
    for offset in (3, 7, 100):
        assert torch.equal(compiled(*tensors(), offset), call(*tensors(), offset))
    assert len(graphs) == 1
