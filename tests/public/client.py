"""A program as users write it, for type checkers: every public call, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import s2o_compile
from s2o_compile import Evaluation, Package, PrefillCache, Recording, Report, S2OConfig, S2OError, S2OPlan, Status


class Model(nn.Module):
    """Any module."""

    def extra(self) -> int:
        return 1

    def forward(self, ids: Tensor) -> Tensor:
        return ids


def wrap(model: Model, ids: Tensor) -> Tensor:
    fast: Model = s2o_compile.optimize(model, S2OConfig(tau=0.25, min_seq_len=1024, dense_heads={"a": (0, 1)}))
    assert fast.extra() == 1
    report: Report = s2o_compile.explain(model, ids)
    status: Status = s2o_compile.status(fast)
    names: list[str] = [site.name for site in report.sites]
    density: float | None = report.density
    print(report, status, names, density, status.sparse)
    with torch.no_grad(), s2o_compile.record() as recording:
        fast(ids)
    kept: Recording = recording
    seconds: float = kept.pass_seconds
    print(seconds, kept.report.error)
    output: Tensor = fast(ids)
    return output


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    plan: S2OPlan = s2o_compile.plan(query, key, value, causal=True)
    out = s2o_compile.attention(query, key, value, causal=True, plan=plan)
    starts: Sequence[int] = [0, 10]
    packed = s2o_compile.attention_varlen(query[0], key[0], value[0], starts, starts)
    chunks = PrefillCache()
    chunks.clear()
    assert isinstance(out, Tensor)
    assert isinstance(packed, Tensor)
    return out + packed


def judge(model: Model, batches: list[Tensor]) -> str:
    evaluation: Evaluation = s2o_compile.evaluate(model, batches, S2OConfig(error=0.02))
    config: S2OConfig = s2o_compile.calibrate(model, batches, error=0.02)
    loss: float = evaluation.loss_difference
    print(loss, evaluation.sites[0].error)
    return config.to_json()


def leave(model: Model, ids: Tensor) -> list[str]:
    program = s2o_compile.export(model, (ids,))
    packaged: Package = s2o_compile.package(program, "model.pt2")
    return list(packaged.sparse)


def wrong() -> str:
    try:
        S2OConfig.from_json("{")
    except S2OError as error:
        return str(error)
    return S2OConfig.from_dict({"tau": 0.5}).quality
