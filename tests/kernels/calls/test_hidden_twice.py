"""Keys hidden by different numbers of one mask: causal by -inf, padding by ``finfo.min``, a bias on top.

The mask is added to the capped scores in float32, as models write it out. A key under -inf weighs nothing beside a key
under a finite number, and a row hidden by -inf everywhere gets zeros.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels.impl.aot import attention as decomposition
from s2o_compile.kernels.statistics import record_calls

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = {"N1-K40": (1, 40), "N50-K50": (50, 50), "N130-K200": (130, 200), "N200-K130": (200, 130)}
SINKS = torch.linspace(-1, 2, HEADS)
NO_SINK = torch.tensor([-torch.inf, 0.0, 1.0, torch.finfo(torch.float32).min])
KINDS = {
    "softcap": (5.0, None),
    "sinks": (None, SINKS),
    "softcap and sinks": (5.0, SINKS),
    "sinks that are none": (None, NO_SINK),
}
ANYWHERE = [S2OConfig(tau=0.0, min_seq_len=length) for length in (0, 10**6)]
"""Sparse where the mask is one of the operator's, and dense."""


def masks(n_queries: int, n_keys: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Masks by name, [B, 1, Nq, Nk]; in the first entry of the batch the first third of the keys is padding."""
    rows, columns = torch.arange(n_queries)[:, None], torch.arange(n_keys)
    causal = (columns <= rows + n_keys - n_queries).expand(BATCH, 1, -1, -1)
    padding = torch.ones(BATCH, 1, 1, n_keys, dtype=torch.bool)
    padding[0, ..., : n_keys // 3] = False
    some = torch.ones(BATCH, 1, n_queries, 1, dtype=torch.bool)
    some[0, :, 0] = some[1, :, -1] = False
    low = torch.finfo(dtype).min
    weak = -1e4 if dtype is torch.float16 else -1e9

    def by(visible: Tensor, number: float) -> Tensor:
        return torch.zeros(BATCH, 1, n_queries, n_keys, dtype=dtype).masked_fill(~visible, number)

    bias = torch.randn(BATCH, 1, n_queries, n_keys, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {
        "bool": causal & padding & some,
        "-inf": by(causal & padding & some, -torch.inf),
        "finfo.min": by(causal & padding & some, low),
        "-inf, padding by finfo.min": by(causal, -torch.inf) + by(padding, low),
        "-inf, right padding by finfo.min": by(causal, -torch.inf) + by(padding.flip(-1), low),
        "-inf, padding by -1e9": by(causal, -torch.inf) + by(padding, weak),
        "finfo.min, padding by -inf": by(causal, low) + by(padding, -torch.inf),
        "finfo.min twice": by(causal, low) + by(padding, low),
        "finfo.min and -1e9": torch.minimum(by(causal, low), by(padding, weak)),
        "rows by finfo.min": by(causal, -torch.inf) + by(some, low),
        "nothing at all": by(causal & False, -torch.inf),
        "everything by finfo.min": by(causal & False, low),
        "bias": by(causal, -torch.inf) + by(padding, low) + bias,
    }


def tensors(n_queries: int, n_keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, n_queries), (KV_HEADS, n_keys), (KV_HEADS, n_keys))
    return [torch.randn(BATCH, *shape, DIM, generator=generator).to(dtype) for shape in shapes]


def expected(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention float64 [B, Hq, Nq, Dv]: the mask is added in float32, all else is float64."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = query.double() @ key.double().mT * DIM**-0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    if mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = (scores.float() + mask.float()).double()
    n_keys = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)], -1)
    sees = (scores > -torch.inf).any(-1, keepdim=True)
    weights = torch.where(sees, scores, 0.0).softmax(-1)[..., :n_keys]
    return torch.where(sees, weights, 0.0) @ value.double()


def limit(dtype: torch.dtype) -> dict[str, Any]:
    """What eager attention in this dtype errs: weights and output are rounded once each."""
    return {"atol": 8 * torch.finfo(dtype).eps, "rtol": 8 * torch.finfo(dtype).eps}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output(dtype, lengths, kind):
    softcap, sinks = KINDS[kind]
    query, key, value = tensors(*LENGTHS[lengths], DTYPES[dtype])
    for (name, mask), config in itertools.product(masks(*LENGTHS[lengths], DTYPES[dtype]).items(), ANYWHERE):
        given = {"attn_mask": mask, "softcap": softcap, "sinks": sinks, "config": config}
        output = s2o_compile.attention(query, key, value, **given)
        wanted = expected(query, key, value, mask, softcap, sinks)
        where = f"{name}, min_seq_len={config.min_seq_len}"
        torch.testing.assert_close(
            output.double(), wanted, **limit(DTYPES[dtype]), msg=lambda said, where=where: f"{where}: {said}"
        )


@pytest.mark.parametrize("learned", ["tensors", "mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, learned):
    softcap, sinks = KINDS[kind]
    query, key, value = tensors(60, 90)
    weight = torch.randn(BATCH, HEADS, 60, DIM, generator=torch.Generator().manual_seed(2))
    for name, mask in masks(60, 90).items():
        if learned == "mask" and mask.dtype is torch.bool:
            continue

        def gradients(attend, mask=mask):
            leaves = [x.clone().requires_grad_() for x in ([query, key, value] if learned == "tensors" else [mask])]
            given = [*leaves, mask] if learned == "tensors" else [query, key, value, *leaves]
            (attend(*given).double() * weight).sum().backward()
            return [x.grad for x in leaves]

        ours = gradients(
            lambda *given: s2o_compile.attention(*given[:3], attn_mask=given[3], softcap=softcap, sinks=sinks)
        )
        theirs = gradients(lambda *given: expected(*given, softcap, sinks))
        for got, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4, msg=lambda said, name=name: f"{name}: {said}")


def test_without_softcap_and_sinks():
    """SDPA adds the mask as it is, too."""
    query, key, value = tensors(130, 200)
    for name, mask in masks(130, 200).items():
        for config in ANYWHERE:
            output = s2o_compile.attention(query, key, value, attn_mask=mask, config=config)
            wanted = expected(query, key, value, mask, None, None)
            torch.testing.assert_close(
                output.double(), wanted, **limit(torch.float32), msg=lambda said, name=name: f"{name}: {said}"
            )


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_numbers_of_no_mask_spoil_their_row_alone(number):
    query, key, value = tensors(130, 130)
    mask = masks(130, 130)["-inf, padding by finfo.min"].clone()
    mask[1, 0, 100, 7] = number
    output = s2o_compile.attention(query, key, value, attn_mask=mask, softcap=5.0, config=ANYWHERE[0])
    assert output[1, :, 100].isnan().all()
    assert output.isnan().sum() == HEADS * DIM


def test_a_key_hidden_by_inf_may_hold_nan():
    query, key, value = tensors(50, 50)
    mask = masks(50, 50)["finfo.min, padding by -inf"]
    wanted = expected(query, key, value, mask, 5.0, SINKS)
    key[0, :, :16] = torch.nan
    output = s2o_compile.attention(query, key, value, attn_mask=mask, softcap=5.0, sinks=SINKS)
    torch.testing.assert_close(output.double(), wanted, **limit(torch.float32))


def test_vmap():
    query, key, value = tensors(130, 130)
    chosen = torch.stack([masks(130, 130)[name] for name in ("-inf, padding by finfo.min", "finfo.min twice", "bias")])

    def call(mask):
        return s2o_compile.attention(query, key, value, attn_mask=mask, softcap=5.0, config=ANYWHERE[0])

    wanted = torch.stack([expected(query, key, value, mask, 5.0, None) for mask in chosen])
    torch.testing.assert_close(torch.vmap(call)(chosen).double(), wanted, **limit(torch.float32))


def test_a_row_of_one_number_beside_a_usual_sink_is_still_read():
    """Only a sink as low as the number keeps the mask from being one of the operator's."""
    query, key, value = tensors(130, 130)
    mask = masks(130, 130)["finfo.min"]
    for sinks, path in ((SINKS, "s2o"), (NO_SINK, "masked")):
        with record_calls() as calls:
            s2o_compile.attention(query, key, value, attn_mask=mask, sinks=sinks, config=ANYWHERE[0])
        assert [call.path for call in calls] == [path]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("min_seq_len", [0, 10**6])
@pytest.mark.parametrize("kind", ["softcap", "sinks", "sinks that are none"])
def test_written_by_hand_and_compiled(kind, min_seq_len):
    softcap, sinks = KINDS[kind]

    def by_hand(query, key, value, mask):
        scores = query @ key.repeat_interleave(HEADS // KV_HEADS, 1).mT * DIM**-0.5
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        scores = scores + mask
        if sinks is not None:
            scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
        weights = scores.softmax(-1)
        weights = weights if sinks is None else weights[..., :-1]
        return weights @ value.repeat_interleave(HEADS // KV_HEADS, 1)

    options = {"s2o.tau": 0.0, "s2o.min_seq_len": min_seq_len, "s2o.inner_backend": "eager"}
    compiled = torch.compile(by_hand, backend="s2o", options=options)
    given = tensors(140, 140)
    for name, mask in masks(140, 140).items():
        if name in ("bool", "nothing at all"):
            continue
        with torch.no_grad(), record_calls() as calls:
            output = compiled(*given, mask)
        assert len(calls) == 1
        wanted = by_hand(*given, mask)
        fully_masked = wanted.isnan()  # of -inf alone: softmax makes NaN of it, the operator zeros
        torch.testing.assert_close(
            output,
            wanted.masked_fill(fully_masked, 0.0),
            **limit(torch.float32),
            msg=lambda said, name=name: f"{name}: {said}",
        )


@pytest.mark.filterwarnings("ignore::s2o_compile.DenseGradientWarning")
class TestSinksThatAreNone:
    """A sink of -inf takes no mass: rows hidden by a finite number keep the mean of all values in its head."""

    sinks = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0])

    def wanted(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Attention float64 [B, Hq, Nq, Dv]."""
        low = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        return expected(query, key, value, low, None, self.sinks)

    def padded(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Tensors, a key mask, and which pairs are visible under it and the causal mask."""
        key_mask = torch.ones(BATCH, 140, dtype=torch.bool)
        key_mask[0, :40] = False
        visible = torch.ones(140, 140, dtype=torch.bool).tril() & key_mask[:, None, None]
        return tensors(140, 140), key_mask, visible

    @pytest.mark.parametrize("gradient", [False, True])
    @pytest.mark.parametrize("config", ANYWHERE, ids=["sparse", "dense"])
    @pytest.mark.parametrize("mask", ["key_mask", "bool", "rows"])
    def test_output(self, mask, config, gradient):
        given, key_mask, visible = self.padded()
        if mask == "rows":  # a band shows them keys
            visible = visible.clone()
            visible[0, :, 100] = False
        wanted = self.wanted(*given, visible)
        given[0].requires_grad_(gradient)
        masked = {"causal": True, "key_mask": key_mask} if mask == "key_mask" else {"attn_mask": visible}
        output = s2o_compile.attention(*given, **masked, sinks=self.sinks, fully_masked="mean", config=config)
        torch.testing.assert_close(output.double(), wanted, **limit(torch.float32))

    def test_plan(self):
        given, key_mask, visible = self.padded()
        masked = {"causal": True, "key_mask": key_mask}
        plan = s2o_compile.plan(*given[:2], **masked, config=ANYWHERE[0])
        output = s2o_compile.attention(
            *given, **masked, sinks=self.sinks, fully_masked="mean", config=ANYWHERE[0], plan=plan
        )
        torch.testing.assert_close(output.double(), self.wanted(*given, visible), **limit(torch.float32))

    @pytest.mark.parametrize("min_seq_len", [0, 10**6])
    def test_twin(self, min_seq_len):
        given, key_mask, visible = self.padded()
        output, _ = decomposition.attention(
            *given, key_mask, self.sinks, causal=True, fully_masked="mean", tau=0.0, min_seq_len=min_seq_len
        )
        torch.testing.assert_close(output.double(), self.wanted(*given, visible), **limit(torch.float32))

    def test_vmap_over_sinks(self):
        given, key_mask, visible = self.padded()

        def call(sinks):
            masked = {"causal": True, "key_mask": key_mask, "fully_masked": "mean"}
            return s2o_compile.attention(*given, **masked, sinks=sinks, config=ANYWHERE[0])

        output = torch.vmap(call)(torch.stack([self.sinks, SINKS]))[0]
        torch.testing.assert_close(output.double(), self.wanted(*given, visible), **limit(torch.float32))

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_a_proven_mask(self):
        def by_hand(query, key, value, key_mask):
            scores = query @ key.repeat_interleave(HEADS // KV_HEADS, 1).mT * DIM**-0.5
            hidden = ~(torch.ones(140, 140, dtype=torch.bool).tril() & key_mask[:, None, None])
            scores = scores + torch.where(hidden, torch.finfo(torch.float32).min, 0.0)
            scores = torch.cat([scores, self.sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
            return scores.softmax(-1)[..., :-1] @ value.repeat_interleave(HEADS // KV_HEADS, 1)

        given, key_mask, _ = self.padded()
        options = {"s2o.tau": 0.0, "s2o.min_seq_len": 0, "s2o.inner_backend": "eager"}
        with torch.no_grad(), record_calls() as calls:
            output = torch.compile(by_hand, backend="s2o", options=options)(*given, key_mask)
        assert [call.path for call in calls] == ["s2o"]
        torch.testing.assert_close(output, by_hand(*given, key_mask), **limit(torch.float32))
