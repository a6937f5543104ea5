"""What the account of an optimized model costs: microseconds a call with and without it, around no model at all.

    python benchmarks/account.py [--json benchmarks/results/account-cpu.json]

    sparse   calls of a model that has run sparse, as in decode after a prefill
    short    calls of a model that has only run short, where nothing is settled
    operator what a call of the operator pays in it

The compiled function is replaced by one that does nothing. Times are of the process, least of many repetitions.
"""

from __future__ import annotations

import argparse
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results_file import Rows
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.capture.entry import ENTRY
from s2o_compile.kernels.statistics import ModelCall, count, running

NUMBER, REPETITIONS = 2000, 300


class Attention(nn.Module):
    """Causal attention of one head over states [B, N, D]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """States [B, N, D]."""
        return scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]


def microseconds(call: Callable[[], object]) -> float:
    """The least time of a call."""
    times = timeit.repeat(call, number=NUMBER, repeat=REPETITIONS, timer=time.process_time)
    return round(min(times) / NUMBER * 1e6, 3)


def account_row(min_seq_len: int) -> dict[str, object]:
    """Calls with one token and what ``generate`` passes beside it."""
    config = S2OConfig(min_seq_len=min_seq_len, inner_backend="eager")
    model, x = s2o_compile.optimize(Attention(), config), torch.randn(1, 200, 16)
    model(x)
    entry: Any = vars(model)[ENTRY]
    entry._compiled[""] = lambda *_, **__: None
    names = {"attention_mask": torch.ones(1, 200), "position_ids": torch.ones(1, 1), "use_cache": True}
    with_account = microseconds(lambda: entry.run(model, (x[:, :1],), names))
    entry.compilation.account = None
    without = microseconds(lambda: entry.run(model, (x[:, :1],), names))
    return {"with_us": with_account, "without_us": without, "account_us": round(with_account - without, 3)}


def count_row() -> dict[str, object]:
    """What one call of the operator pays."""
    running.call = ModelCall()
    inside = microseconds(lambda: count("s2o"))
    running.call = None
    return {
        "with_us": inside,
        "without_us": (without := microseconds(lambda: None)),
        "account_us": round(inside - without, 3),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    rows = Rows(parser.parse_args().json)
    with torch.no_grad():
        rows.measure("sparse", {}, partial(account_row, 0))
        rows.measure("short", {}, partial(account_row, 100_000))
        rows.measure("operator", {}, count_row)


if __name__ == "__main__":
    main()
