"""Fixtures of the operator's tests: plans with small chunks, keys whose weights are chosen, memory full of NaN, and
launches that are only written down."""

import dataclasses
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from s2o_compile.kernels import planner as rank
from s2o_compile.kernels.core import plan as plan_module
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import Plan
from tests.conftest import Inputs, move_plan


@pytest.fixture
def build_plan(monkeypatch):
    """``rank.build_plan`` with small chunks, so that short inputs stop."""

    def build(
        inputs,
        *,
        ranking="per_query",
        ranking_per="group",
        segment_len=256,
        chunk_len=64,
        by="torch",
    ):
        monkeypatch.setattr(plan_module, "default_chunk_len", lambda _: chunk_len)
        monkeypatch.setattr(rank, "default_chunk_len", lambda _: chunk_len)
        options = OperatorOptions(ranking=ranking, ranking_per=ranking_per, segment_len=segment_len)
        return rank.build_plan(inputs.call, options, by)

    return build


@dataclass(frozen=True)
class Weighed:
    """128 queries at the end of 128 + 64 n keys whose softmax weights are chosen: 1 for an own key, ``masses[c] / 64``
    for each of the 64 keys of the c-th chunk of the list. Row i, which sees i + 1 in-segment keys, has seen the mass
    i + 1 + masses[0] + ... + masses[c] after chunk c."""

    masses: tuple[float, ...]
    inputs: Inputs
    plan: Plan

    @property
    def prefix(self):
        return 64 * len(self.masses)

    def gain(self, row, chunk):
        """Share of the mass of ``row`` that the chunk brought."""
        return self.masses[chunk] / (row + 1 + sum(self.masses[: chunk + 1]))

    def stop(self, tau):
        """Chunks visited before the rule holds; None if it never does."""
        for visited in range(1, len(self.masses) + 1):
            most = max(self.gain(row, visited - 1) for row in range(128)) if visited > 1 else 1.0
            if most * self.to_come(visited) < tau:
                return visited
        return None

    def shortened(self, count):
        """The same with a list of fewer keys."""
        return dataclasses.replace(
            self, plan=dataclasses.replace(self.plan, prefix_count=torch.full_like(self.plan.prefix_count, count))
        )

    def to_come(self, visited):
        """Zipf's estimate of the chunks to come, in units of the last one visited."""
        return visited * math.log(len(self.masses) / visited)


@pytest.fixture
def weighed():
    """Factory of ``Weighed``: chunks of the list lie backwards in memory, so that position order is no help."""

    def build(masses, *, device="cpu"):
        chunks, dim = len(masses), 16
        prefix = 64 * chunks
        order = torch.arange(prefix).view(chunks, 64).flip(0).flatten()
        key = torch.zeros(1, 1, prefix + 128, dim)
        key[0, 0, order, 0] = (torch.tensor(masses) / 64).log().repeat_interleave(64)
        query = torch.zeros(1, 1, 128, dim)
        query[..., 0] = 1.0
        value = torch.randn(1, 1, prefix + 128, dim, generator=torch.Generator().manual_seed(1))
        plan = Plan(
            segment_len=128,
            chunk_len=64,
            key_index=order[None, None, None].int(),
            prefix_count=torch.full((1, 1), prefix, dtype=torch.int32),
            tail_value=value[:, :, None, :prefix].mean(3),
        )
        inputs = Inputs(query, key, value, AttentionMask(causal=True, offset=prefix), 1.0)
        return Weighed(tuple(masses), inputs.to(device), move_plan(plan, device))

    return build


@pytest.fixture
def poison_empty(monkeypatch):
    """Fresh memory holds NaN, and integers nobody would write: what stays unwritten shows."""

    def non_finite(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.dtype == torch.bool:
                return x
            number = -(2**30) if x.dtype in (torch.int32, torch.int64) else -12345  # sums leave int32, which shows
            return x.fill_(float("nan") if x.is_floating_point() else number)

        return empty

    monkeypatch.setattr(torch, "empty", non_finite(torch.empty))
    monkeypatch.setattr(torch, "empty_like", non_finite(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", non_finite(torch.Tensor.new_empty))


@pytest.fixture
def launches(monkeypatch):
    """What is launched, instead of launching it: the kernel, its grid, its arguments in their order, and options."""
    kernel = pytest.importorskip("s2o_compile.kernels.impl.triton.forward").gathered_fwd_kernel
    made = []

    def record(self, *args, grid, warmup, **keywords):
        arguments = [*args, *(keywords.pop(name) for name in self.arg_names[len(args) :])]
        made.append((self.__name__, tuple(grid), arguments, keywords))

    monkeypatch.setattr(type(kernel), "run", record)
    return made


@pytest.fixture
def at_once(launches, monkeypatch):
    """What is launched at once: the bases of each list, its device, and the numbers of the other stream."""
    from s2o_compile.kernels.impl.triton import direct
    from s2o_compile.kernels.impl.triton.forward import gathered_fwd_kernel

    made = []

    def run(self, *args, **keywords):
        return SimpleNamespace(run=print, function=1, packed_metadata=(4, 1, 0))

    monkeypatch.setattr(type(gathered_fwd_kernel), "run", run)
    monkeypatch.setattr(direct, "replay", lambda *_: lambda *given: made.append(given))
    return made
