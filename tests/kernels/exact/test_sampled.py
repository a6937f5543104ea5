"""Exact attention of sampled queries: the exact executor's rows, by torch and by the Triton kernel."""

import pytest
import torch

from s2o_compile.kernels.budget import ROUNDS
from s2o_compile.kernels.core.budget_rule import lower_tau
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.exact import sampled
from s2o_compile.kernels.impl.torch.exact import attend_exact

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said} encountered:RuntimeWarning")  # by the interpreter
    for said in ("divide by zero", "invalid value")
]

CASES = {
    "causal": {"causal": True},
    "bidirectional": {},
    "softcap": {"causal": True, "softcap": 5.0},
    "padded": {"causal": True, "key_mask": torch.arange(300)[None] >= torch.tensor([[0], [170]])},
    "rows without a key": {"causal": True, "causal_offset": -40},
    "fewer queries": {"causal": True, "queries": 90},
    "fewer queries than samples": {"causal": True, "queries": 40},
    "wide value": {"causal": True, "value_dim": 320},
}


def make_call(queries=300, value_dim=32, device="cpu", dtype=torch.float32, **terms):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 32), (2, 2, 300, 32), (2, 2, 300, value_dim))
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    terms = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in terms.items()}
    call = AttentionCall.of(query, key, value, **terms).for_kernels()
    return call.but(mask=call.mask.for_batch(2))


def assert_rows(found, call, tolerance):
    expected = attend_exact(call)
    rows = found.rows.cpu()
    assert torch.equal(rows, sampled.sample_rows(call.n_queries, rows.device, len(rows)))
    torch.testing.assert_close(found.output.cpu(), expected.output[:, :, rows].float().cpu(), **tolerance)
    torch.testing.assert_close(found.lse.cpu(), expected.lse[:, :, rows].cpu(), **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_by_torch(name):
    call = make_call(**CASES[name])
    assert_rows(sampled.attend_rows(call), call, {"rtol": 1e-5, "atol": 1e-5})


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        *((name, "cpu", torch.float32) for name in CASES),
        *(pytest.param(name, "cuda", torch.bfloat16, marks=pytest.mark.gpu) for name in CASES),
    ],
)
def test_by_triton(name, device, dtype, monkeypatch):
    pytest.importorskip("triton")
    from s2o_compile.kernels.impl.triton import sampled as triton_sampled

    monkeypatch.setattr(triton_sampled, "PROGRAMS", 48)
    monkeypatch.setattr(triton_sampled, "SHORTEST", 128)  # several programs share the keys
    call = make_call(**CASES[name], device=device, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert_rows(triton_sampled.attend_rows(call, 200), call, tolerance)  # two blocks, the second one short


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_triton_begins_again_where_a_weight_overflows(device):
    """A key far above the first ones of its split, which the softmax counts from: its weight leaves float32."""
    pytest.importorskip("triton")
    from s2o_compile.kernels.impl.triton import sampled as triton_sampled

    call = make_call(causal=True, device=device)
    query, key = call.query.clone(), call.key.clone()
    query[..., 0], key[..., 0], key[:, :, 200] = 1.0, 0.0, 0.0
    key[:, :, 200, 0] = 300.0 / call.scale
    call = call.but(query=query, key=key)
    assert_rows(triton_sampled.attend_rows(call, 200), call, {"rtol": 1e-5, "atol": 1e-4})


@pytest.mark.parametrize(("programs", "splits"), [(1, 1), (16, 1), (96, 5)])
def test_splits_give_the_card_enough_programs(programs, splits, monkeypatch):
    pytest.importorskip("triton")
    from s2o_compile.kernels.impl.triton import sampled as triton_sampled

    grids = []
    launch = triton_sampled.launch
    monkeypatch.setattr(triton_sampled, "launch", lambda *a, **k: grids.append(a[1]) or launch(*a, **k))
    monkeypatch.setattr(triton_sampled, "PROGRAMS", programs)
    monkeypatch.setattr(triton_sampled, "SHORTEST", 64)
    call = make_call(causal=True)
    assert_rows(triton_sampled.attend_rows(call, 200), call, {"rtol": 1e-5, "atol": 1e-5})
    assert grids[0] == (splits, 8, 2)  # 300 keys, 2 entries of 4 heads, two blocks of rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sinks", [None, torch.tensor([-torch.inf, -1.0, 2.0, 50.0])], ids=["", "sinks"])
def test_triton_measures_what_torch_measures(name, sinks, device):
    pytest.importorskip("triton")
    from s2o_compile.kernels.impl.triton import sampled as triton_sampled

    call = make_call(**CASES[name], device=device)
    call = call if sinks is None else call.but(sinks=sinks.to(device))
    exact = sampled.attend_rows(call, 50)
    generator = torch.Generator().manual_seed(1)
    shape = (2, call.n_queries, 4, call.value.shape[3])  # laid out as a model's projections leave it
    output = torch.randn(shape, generator=generator).to(device).transpose(1, 2)
    lse = torch.randn(output.shape[:3], generator=generator).to(device)
    output[1, 2, :] = torch.nan
    found = triton_sampled.error_sums(call, exact, output, lse)
    torch.testing.assert_close(found, sampled.error_sums(call, exact, output, lse), equal_nan=True)
    assert found[0, 1, 2].isnan() or name == "padded"


def unread(n_queries, device="cpu"):
    """Every third query of the one batch entry, and the first half of the other."""
    rows = torch.arange(n_queries, device=device)
    return torch.stack((rows % 3 == 0, rows < n_queries // 2))


@pytest.mark.parametrize("name", ["causal", "padded", "fewer queries"])
def test_rows_that_nobody_reads_do_not_count(name):
    call = make_call(**CASES[name])
    exact = sampled.attend_rows(call, 50)
    output, hidden = torch.zeros(2, 4, call.n_queries, 32), unread(call.n_queries)
    output[:, :, exact.rows] = exact.output
    output.masked_fill_(hidden[:, None, :, None], torch.nan)
    found = sampled.error_sums(call.but(unread_rows=hidden), exact, output, output[..., 0])
    assert (found[0] == 0).all()
    assert (found[1] > 0).all()
    before = sampled.error_sums(call, exact, output.nan_to_num(), output[..., 0])
    assert (found[0, 0] < before[0, 0]).all()  # the other entry's are padding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["causal", "padded", "fewer queries"])
def test_triton_leaves_out_the_same_rows(name, device):
    pytest.importorskip("triton")
    from s2o_compile.kernels.impl.triton import sampled as triton_sampled

    call = make_call(**CASES[name], device=device)
    call = call.but(unread_rows=unread(call.n_queries, device))
    exact = sampled.attend_rows(call, 50)
    output = torch.randn(2, 4, call.n_queries, 32, generator=torch.Generator().manual_seed(1)).to(device)
    expected = sampled.error_sums(call, exact, output, output[..., 0])
    torch.testing.assert_close(triton_sampled.error_sums(call, exact, output, output[..., 0]), expected)
    before = sampled.error_sums(call.but(unread_rows=None), exact, output, output[..., 0])
    assert (expected[:, 0] < before[:, 0]).all()  # the other entry's are padding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("largest", [*ROUNDS.steps])
def test_triton_lowers_tau_as_torch_does(largest, device):
    pytest.importorskip("triton")
    from s2o_compile.kernels.impl.triton import sampled as triton_sampled

    off = [[0.0, 1e-4, 4e-3, torch.nan, 1.0], [1e-3, 1e-3, 1e-3, 1e-3, 1e-3], [0.0, 1e-4, 1e-3, torch.inf, 0.0]]
    size = [[1.0, 2.0, 0.0, 1.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]]
    sums = torch.tensor([off, size], device=device)
    tau = torch.tensor([[1.0, 0.5, 3.0, 0.1, 0.0]], device=device).expand(3, 5).contiguous()
    expected, limit = tau.clone(), torch.empty_like(tau)
    lower_tau(sums, expected, limit, 0.05, largest)
    found, found_limit = tau.clone(), torch.empty_like(tau)
    launched = triton_sampled.launch_lower_tau(sums, found, found_limit, 0.05, largest)
    torch.testing.assert_close((found, found_limit), (expected, limit))
    assert limit.isinf().any()
    assert not limit.isinf().all()
    lower_tau(sums, expected, limit, 0.05, 0.3)
    launched.again(largest=0.3)
    torch.testing.assert_close((found, found_limit), (expected, limit))


@pytest.mark.parametrize(("length", "count"), [(1, 64), (63, 64), (64, 64), (1000, 64), (131072, 256)])
def test_rows_are_spread(length, count):
    rows = sampled.sample_rows(length, torch.device("cpu"), count)
    assert len(rows) == min(length, count)
    assert (rows.diff() > 0).all()
    assert rows.min() >= 0
    assert rows.max() < length
    starts = torch.arange(len(rows) + 1) * length // len(rows)
    assert ((rows >= starts[:-1]) & (rows < starts[1:])).all(), "one in each of as many equal parts"


def test_rows_have_no_period():
    rows = sampled.sample_rows(4096, torch.device("cpu"))
    assert len((rows % 64).unique()) > 32, "rows of an image would be sampled in a few columns only"


def test_error_of_a_known_distance():
    call = make_call(causal=True)
    exact = sampled.attend_rows(call, 300)
    output = exact.output * 1.1
    found = sampled.relative_error(*sampled.error_sums(call, exact, output, exact.lse))
    torch.testing.assert_close(found, torch.full((2, 4), 0.1), rtol=1e-4, atol=0)
    assert sampled.relative_error(*sampled.error_sums(call, exact, exact.output, exact.lse)).eq(0).all()


def test_a_sink_sees_the_mass_that_is_missing():
    call = make_call(causal=True)
    exact = sampled.attend_rows(call, 300)
    lse = exact.lse - 0.5  # the output is right, and a third of its mass was not visited
    sinks = torch.tensor([-50.0, 2.0, 5.0, 50.0])
    found = sampled.relative_error(*sampled.error_sums(call.but(sinks=sinks), exact, exact.output, lse))
    assert found[:, 0].max() < 1e-4
    share = torch.sigmoid(lse - sinks[:, None]) / torch.sigmoid(exact.lse - sinks[:, None])
    assert (found[:, 2] > 0.2).all()
    assert (found[:, 2] < 1 - share[:, 2].min(-1).values).all()


def test_nan_is_no_error_that_holds():
    call = make_call(causal=True)
    exact = sampled.attend_rows(call, 300)
    output = exact.output.clone()
    output[0, 1, 7, 3] = torch.nan
    found = sampled.relative_error(*sampled.error_sums(call, exact, output, exact.lse))
    assert found.isnan().nonzero().tolist() == [[0, 1]]
    nothing = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # nothing is off; something is, and nothing should be there
    assert sampled.relative_error(*nothing).tolist() == [0.0, torch.inf]
