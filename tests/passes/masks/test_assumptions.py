"""``assume_causal_mask``: a mask that enters the graph is causal because the user says so, and can be checked."""

import pytest
import torch
from torch.nn import functional as F

from s2o_compile import S2OConfig, explain, optimize, record
from s2o_compile.passes.graph.rejected import Rejected
from tests.helpers.masks import capture, k_index, q_index

INF, MIN = float("-inf"), torch.finfo(torch.float32).min
CAUSAL = torch.ones(5, 9, dtype=torch.bool).tril(4)
PROMISED = {
    "bool": (lambda q, k, mask: mask, CAUSAL),
    "expanded": (lambda q, k, mask: mask[None, None].expand(2, 1, 5, 9), CAUSAL),
    "sliced": (lambda q, k, mask: mask[:, :, -5:, :9], torch.ones(2, 1, 8, 12, dtype=torch.bool)),
    "cast": (lambda q, k, mask: mask.bool(), CAUSAL.long()),
    "float": (lambda q, k, mask: mask, torch.zeros(5, 9)),
    "float-cast": (lambda q, k, mask: mask.float()[None], torch.zeros(5, 9, dtype=torch.bfloat16)),
    "of-each-head": (lambda q, k, mask: mask, torch.zeros(1, 4, 5, 9)),
}


@pytest.mark.parametrize(("mask_of", "mask"), PROMISED.values(), ids=PROMISED)
def test_a_promise_is_taken_for_masks_that_enter_the_graph(mask_of, mask):
    proof, _ = capture(mask_of, mask, dynamic=False, assume_causal=True)
    assert str(proof) == "causal (promised)"
    assert proof.offset is None
    assert isinstance(capture(mask_of, mask, dynamic=False)[0], Rejected)


def written(q, k, mask):
    mask[0, 0] = False
    return mask


NOT_PROMISED = {
    "computed": (lambda q, k, x: x > 0, torch.randn(5, 9)),
    "gated": (lambda q, k, x: x & (k_index(k) <= q_index(q)), CAUSAL),
    "inverted": (lambda q, k, x: ~x, CAUSAL),
    "padding-by-query": (lambda q, k, x: x[:, :5, None].expand(2, 5, 9)[:, None], torch.ones(2, 9, dtype=torch.bool)),
    "float-padding": (lambda q, k, x: x[:, None, None].expand(2, 1, 5, 9), torch.zeros(2, 9)),
    "float-padding-of-one-row": (lambda q, k, x: x[:, None, None], torch.zeros(2, 9)),
    "written": (written, CAUSAL),
}


@pytest.mark.parametrize(("mask_of", "mask"), NOT_PROMISED.values(), ids=NOT_PROMISED)
def test_nothing_else_is_promised(mask_of, mask):
    proof, _ = capture(mask_of, mask.clone(), dynamic=False, assume_causal=True)
    assert isinstance(proof, Rejected), str(proof)


def test_what_can_be_proven_is_proven():
    proof, _ = capture(lambda q, k: k_index(k) <= q_index(q) - 1, assume_causal=True)
    assert str(proof) == "causal, offset -1"


class Masked(torch.nn.Module):
    def forward(self, q, k, v, mask):
        for _ in range(2):
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return q


def inputs(queries=40, keys=40):
    return [torch.randn(1, 2, length, 16) for length in (queries, keys, keys)]


CONFIG = {"tau": 0.0, "min_seq_len": 0, "assume_causal_mask": True}
KINDS = {
    "bool": lambda mask: mask,
    "float-inf": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, INF),
    "float-min": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, MIN),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@torch.no_grad()
def test_a_kept_promise_passes_the_check_and_a_broken_one_is_an_error(kind, inner, fresh_dynamo):
    config = S2OConfig(**CONFIG, check_assumptions=True, inner_backend=inner)
    q, k, v = inputs(30, 40)
    causal = torch.ones(30, 40, dtype=torch.bool).tril(10)
    model = Masked()
    run = optimize(model, config)
    with record() as recording:
        torch.testing.assert_close(run(q, k, v, kind(causal)), model(q, k, v, kind(causal)), atol=1e-5, rtol=1e-5)
    assert [site.mask for site in recording.report.sites] == ["causal (promised)"] * 2
    for wrong in (causal.tril(9), causal.logical_or(torch.arange(40) == 39), causal & (torch.arange(40) > 0)):
        with pytest.raises(RuntimeError, match="assume_causal_mask=True promises"):
            run(q, k, v, kind(wrong))


@torch.no_grad()
def test_a_float_mask_that_only_lowers_scores_breaks_the_promise(fresh_dynamo):
    run = optimize(Masked(), S2OConfig(**CONFIG, check_assumptions=True, inner_backend="eager"))
    bias = torch.zeros(40, 40).masked_fill(torch.ones(40, 40).triu(1).bool(), -3.0)
    with pytest.raises(RuntimeError, match="assume_causal_mask=True promises"):
        run(*inputs(), bias)


@torch.no_grad()
def test_without_the_promise_the_mask_stays_and_without_the_check_nothing_is_compared(fresh_dynamo):
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    assert explain(Masked(), *inputs(), causal, config=S2OConfig(read_masks=False)).rewritten == 0
    unchecked = optimize(Masked(), S2OConfig(**CONFIG, inner_backend="eager"))
    q, k, v = inputs()
    expected = Masked()(q, k, v, causal)
    torch.testing.assert_close(unchecked(q, k, v, ~causal), expected, atol=1e-5, rtol=1e-5)  # taken at the user's word


@torch.no_grad()
def test_the_check_runs_at_every_length_of_a_dynamic_graph(fresh_dynamo):
    run = optimize(Masked(), S2OConfig(**CONFIG, check_assumptions=True, inner_backend="eager"))
    with record() as recording:
        for queries, keys in ((30, 40), (21, 21), (50, 64)):
            q, k, v = inputs(queries, keys)
            causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            for tensor in (q, k, v, causal):
                for dim in (0, 1) if tensor is causal else (2,):
                    torch._dynamo.mark_dynamic(tensor, dim)
            torch.testing.assert_close(run(q, k, v, causal), Masked()(q, k, v, causal), atol=1e-5, rtol=1e-5)
            with pytest.raises(RuntimeError, match="assume_causal_mask=True promises"):
                run(q, k, v, causal.roll(1, 1))
    assert len(recording.graphs) == 1
