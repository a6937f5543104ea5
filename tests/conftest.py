"""What the operator's tests share: cases with readable ids, exact attention in float64, and bounds derived from it.

There are no tolerances in these tests. An implementation may err ``ERROR_FACTOR`` times as much from float64 as plain
softmax attention in the same dtype does on the same inputs.
"""

import dataclasses
import gc
import math
import os
import signal
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():  # without a GPU kernels are interpreted; Triton reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ["S2O_TUNED"] = ""  # what this machine was tuned to is no part of the tests
os.environ.setdefault("S2O_CACHE", os.path.join(tempfile.gettempdir(), f"s2o-tests-{os.getuid()}"))  # no home is needed
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import torch._dynamo.guards  # imports Triton

from s2o_compile.kernels import prepared
from s2o_compile.kernels.core import plan as plan_module
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import Plan
from s2o_compile.kernels.support import torch_compat
from tests.helpers import durations, interpreter

# A process in the background ignores interrupts, and so would those that tests start to interrupt them.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tensors are small: threads that wait for each other made tests 30 times slower on busy cores
# Dynamo empties the CPU's cache to time the guards of every graph, for its log alone: 18 of the 45 ms of a small one.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
interpreter.prepare_once()

ERROR_FACTOR = 4
"""Online softmax rescales its sums once a block, and a tile that stops early normalises by a smaller sum."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PACKAGED = pytest.mark.skipif(
    torch_compat.torch_release() > torch_compat.LAST_PACKAGED, reason="this torch writes no packages"
)

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
"""The device parameter of a GPU test."""

INTERPRETED = pytest.param(
    "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
)
"""The device parameter of a Triton test that is interpreted."""


def query_on(device, dtype, head_dim):
    """Says of a query on any device what chooses an implementation."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 1, 1, head_dim))


def on(device, *values):
    """Parameters (device, *value), readable as ``cpu-value``; a float is a tau."""
    name = device.values[0]
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    ids = ["-".join([name, *(f"tau{x}" if isinstance(x, float) else str(x) for x in row)]) for row in rows]
    return [pytest.param(name, *row, marks=device.marks, id=i) for row, i in zip(rows, ids, strict=True)]


def quick_rows(table, quick):
    """The keys of a table as parameters; those that are not named as quick are in the slow tier."""
    assert {*quick} <= {*table}
    return [
        pytest.param(*(key if isinstance(key, tuple) else (key,)), marks=[] if key in quick else [pytest.mark.slow])
        for key in table
    ]


@pytest.fixture(autouse=True)
def _nothing_prepared():
    """Calls are planned anew: a test may change what plans depend on."""
    prepared.forget()


@dataclass(frozen=True)
class Inputs:
    """Tensors and mask of one attention call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: AttentionMask
    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    fully_masked: str = "zeros"

    @property
    def tensors(self):
        return self.query, self.key, self.value

    @property
    def call(self):
        """The same as the operator's executors take it; its log-sum-exp is wanted, because tests look at it."""
        return AttentionCall(**vars(self), return_lse=True)

    def to(self, target):
        """The same on another device or in another floating dtype."""
        key_mask = self.mask.key_mask
        if key_mask is not None and not isinstance(target, torch.dtype):
            key_mask = key_mask.to(target)
        query, key, value = (x.to(target) for x in self.tensors)
        return dataclasses.replace(
            self,
            query=query,
            key=key,
            value=value,
            mask=dataclasses.replace(self.mask, key_mask=key_mask),
            sinks=None if self.sinks is None else self.sinks.to(target),
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shape, dtype, mask and layout of one attention call.

    ``padding`` is "left", "right", or "all" (every key of the last batch element hidden). ``layout`` is how the tensors
    lie: "plain" [B, H, N, D], "transposed" from [B, N, H, D], "packed" slices of one [B, N, all heads, D], or
    "strided", every second number of a row. ``value_dim`` is ``head_dim`` unless given; sinks are as heavy as all of a
    row's keys, more or less.
    """

    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    queries: int
    keys: int | None = None
    head_dim: int = 64
    dtype: str = "fp32"
    causal: bool = True
    offset: int | None = None
    window: int | None = None
    chunk: int | None = None
    padding: str = ""
    layout: str = "plain"
    value_dim: int | None = None
    softcap: float | None = None
    sinks: bool = False
    fully_masked: str = "zeros"

    @property
    def n_keys(self):
        return self.queries if self.keys is None else self.keys

    @property
    def causal_offset(self):
        """Bottom-right unless the case says otherwise."""
        if not self.causal:
            return 0
        return self.n_keys - self.queries if self.offset is None else self.offset

    def __str__(self):
        length = f"N{self.queries}" if self.keys is None else f"N{self.queries}-Nk{self.keys}"
        parts = [f"B{self.batch}", f"H{self.heads}", f"Hkv{self.kv_heads}", length, f"D{self.head_dim}", self.dtype]
        parts.append("causal" if self.causal else "full")
        if self.offset is not None:
            parts.append(f"offset{self.offset}")
        if self.window is not None:
            parts.append(f"window{self.window}")
        if self.chunk is not None:
            parts.append(f"chunk{self.chunk}")
        if self.padding:
            parts.append(f"padded_{self.padding}")
        if self.layout != "plain":
            parts.append(self.layout)
        if self.value_dim is not None:
            parts.append(f"Dv{self.value_dim}")
        if self.softcap is not None:
            parts.append(f"softcap{self.softcap}")
        if self.sinks:
            parts.append("sinks")
        if self.fully_masked != "zeros":
            parts.append(f"fully_masked_{self.fully_masked}")
        return "-".join(parts)

    def key_mask(self):
        if not self.padding:
            return None
        mask = torch.ones(self.batch, self.n_keys, dtype=torch.bool)
        for b in range(self.batch):
            hidden = (b + 1) * self.n_keys // (self.batch + 3)
            if self.padding == "left":
                mask[b, :hidden] = False
            elif self.padding == "right":
                mask[b, self.n_keys - hidden :] = False
        if self.padding == "all":
            mask[-1] = False
        return mask

    def inputs(self, device="cpu", *, seed=0, heavy=16):
        """Attention whose mass lies, for the most part, on one in ``heavy`` keys: random tensors never stop early."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        dim = self.head_dim
        direction = torch.nn.functional.normalize(normal(dim), dim=0)
        query = normal(self.batch, self.heads, self.queries, dim) + 8 * direction
        key = normal(self.batch, self.kv_heads, self.n_keys, dim)
        important = torch.rand(self.batch, self.kv_heads, self.n_keys, 1, generator=generator) < 1 / heavy
        key = key + important * direction * dim**0.5
        value = normal(self.batch, self.kv_heads, self.n_keys, self.value_dim or dim)
        tensors = (x.to(device, DTYPES[self.dtype]) for x in (query, key, value))
        key_mask = self.key_mask()
        mask = AttentionMask(
            causal=self.causal,
            offset=self.causal_offset,
            window=self.window,
            attention_chunk=self.chunk,
            key_mask=None if key_mask is None else key_mask.to(device),
        )
        inputs = Inputs(*lay_out(self.layout, *tensors), mask, dim**-0.5, self.softcap, fully_masked=self.fully_masked)
        if not self.sinks:
            return inputs
        sinks = normal(self.heads) + visible_lse(inputs)
        return dataclasses.replace(inputs, sinks=sinks.to(device, DTYPES[self.dtype]))


def lay_out(layout, *tensors):
    """The same numbers, laid out as ``Case.layout`` says."""
    if layout == "plain":
        return tensors
    if layout == "transposed":
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    if layout == "packed":
        if len({x.shape[2] for x in tensors}) > 1:  # cross attention packs keys and values only
            query, *rest = tensors
            return *lay_out("transposed", query), *lay_out("packed", *rest)
        if len({x.shape[3] for x in tensors}) > 1:  # a value head dim of its own does not fit in
            *rest, value = tensors
            return *lay_out("packed", *rest), *lay_out("transposed", value)
        packed = torch.cat([x.transpose(1, 2) for x in tensors], dim=2)
        return tuple(x.transpose(1, 2) for x in packed.split([x.shape[1] for x in tensors], dim=2))
    if layout == "strided":
        return tuple(torch.stack([x, torch.full_like(x, float("nan"))], dim=-1).flatten(-2)[..., ::2] for x in tensors)
    raise ValueError(layout)


def visible_pairs(inputs):
    """Bool [B, 1, Nq, Nk], written out from the mask's definition and not by the code under test."""
    n_queries, n_keys, mask = inputs.query.shape[2], inputs.key.shape[2], inputs.mask
    device = inputs.query.device
    i, j = torch.arange(n_queries, device=device)[:, None], torch.arange(n_keys, device=device)[None, :]
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    if mask.causal:
        seen &= j <= i + mask.offset
    if mask.window is not None:
        seen &= j > i + mask.offset - mask.window
    if mask.attention_chunk is not None:
        seen &= j // mask.attention_chunk == (i + mask.offset) // mask.attention_chunk
    seen = seen.expand(inputs.query.shape[0], 1, -1, -1)
    return seen if mask.key_mask is None else seen & mask.key_mask[:, None, None, :]


def softmax_attention(inputs, dtype):
    """Output and log-sum-exp by the plain formula, all of it in ``dtype``.

    Zeros, or with ``fully_masked="mean"`` the mean value, and -inf where neither key nor sink is seen.
    """
    group = inputs.query.shape[1] // inputs.key.shape[1]
    query, key, value = (x.to(dtype) for x in inputs.tensors)
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    logits = query @ key.transpose(-1, -2) * inputs.scale
    if inputs.softcap is not None:
        logits = inputs.softcap * (logits / inputs.softcap).tanh()
    logits = logits.masked_fill_(~visible_pairs(inputs), float("-inf"))
    if inputs.sinks is not None:
        sinks = inputs.sinks.to(dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    lse = logits.logsumexp(-1)
    fully_masked_weight = 1 / key.shape[2] if inputs.fully_masked == "mean" else 0.0
    weights = logits.softmax(-1).masked_fill_((lse == float("-inf"))[..., None], fully_masked_weight)
    return weights[..., : key.shape[2]] @ value, lse


def visible_lse(inputs):
    """Mean log-sum-exp of the rows that see some key, to place sinks by."""
    lse = softmax_attention(inputs.to("cpu"), torch.float64)[1]
    return lse[lse.isfinite()].mean().item() if lse.isfinite().any() else 0.0


def exact_attention(inputs):
    """Output and log-sum-exp in float64."""
    return softmax_attention(inputs, torch.float64)


def distance(actual, expected):
    """Largest absolute difference; infinite where only one of the two is -inf or NaN."""
    actual, expected = actual.double(), expected.to(actual.device).double()
    difference = (actual - expected).abs().masked_fill(actual == expected, 0.0).nan_to_num(nan=math.inf)
    return difference.max().item()


def bounds(inputs, dtype=None):
    """How far an output in ``dtype`` and its float32 log-sum-exp may lie from float64.

    One rounding of the result is always allowed. Eager float64 cannot be judged by float64: its bound is float32's,
    scaled by the two machine epsilons.
    """
    dtype = inputs.query.dtype if dtype is None else dtype
    output, lse = exact_attention(inputs)

    def bound(eager, exact, kind):
        finite = exact[exact.isfinite()]
        rounding = torch.finfo(kind).eps * (finite.abs().max().item() if len(finite) else 1.0)
        return ERROR_FACTOR * max(distance(eager, exact), rounding)

    eager, eager_lse = softmax_attention(inputs, torch.float32)
    if dtype == torch.float64:
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return bound(eager, output, torch.float32) * ratio, bound(eager_lse, lse, torch.float32) * ratio
    if dtype != torch.float32:
        eager, _ = softmax_attention(inputs, dtype)
    return bound(eager, output, dtype), bound(eager_lse, lse, torch.float32)


def assert_close(result, expected, inputs, dtype=None):
    """Output and log-sum-exp (where both have one) agree within ``bounds``."""
    limit, lse_limit = bounds(inputs, dtype)
    assert distance(result[0], expected[0]) <= limit
    assert distance(result[1], expected[1]) <= lse_limit


def dense_area(inputs):
    """Query-key pairs of a dense kernel, all heads; it computes padding too."""
    unpadded = dataclasses.replace(inputs, mask=dataclasses.replace(inputs.mask, key_mask=None))
    return visible_pairs(unpadded).sum().item() * inputs.query.shape[1]


def computed_pairs(computed, n_queries):
    """Query-key pairs behind an executor's ``computed`` [B, H, tiles]."""
    rows = torch.tensor([min(plan_module.TILE_LEN, n_queries - t) for t in range(0, n_queries, plan_module.TILE_LEN)])
    return (computed.cpu().long() * rows).sum().item()


def move_plan(plan, device):
    """The same plan on another device."""
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    return Plan(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in fields.items()})


def score_all(prepare, inputs, segment_len, shared):
    """Scores of a whole call by a ranking."""
    return prepare(inputs.call, segment_len, shared)(inputs.call, slice(None))


@pytest.fixture
def fresh_dynamo():
    """No code compiled before the test, none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_addoption(parser):
    longest = {"type": float, "default": durations.LONGEST}
    parser.addoption("--longest", **longest, help="Seconds from which on a test is slow.")
    parser.addoption("--fuzz-seconds", type=float, default=60, help="How long tests/passes/test_fuzz.py searches.")
    parser.addoption("--fuzz-seed", type=int, default=0, help="The first seed of its modules.")


def pytest_itemcollected(item):
    """Moves what takes long to the slow tier."""
    if durations.is_slow(item.nodeid, item.config.getoption("longest")):
        item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Keeps all workers busy to the end: Makefile hands out whole files in this order."""
    durations.long_files_first(items)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Looks for no garbage: thousands of tests are collected, and kept."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
