"""``s2o calibrate``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import torch

from s2o_compile.cli.about import made_by
from s2o_compile.cli.demo import seconds_to_read
from s2o_compile.cli.loading import check_reads
from s2o_compile.cli.models import full_name
from s2o_compile.cli.options import (
    ConfigFile,
    Console,
    Device,
    Json,
    Model,
    Tokens,
    check_json,
    check_out,
    choose_config,
    choose_device,
    load,
    show,
    show_steps,
    tokenize,
    typer,
    writing,
)
from s2o_compile.config import S2OConfig, check_error
from s2o_compile.kernels.core.tuned import LONG, shortest_sparse, why_never
from s2o_compile.kernels.support.torch_compat import dtype_of
from s2o_compile.quality.calibrate import LEAST_ERROR, Calibration, calibration
from s2o_compile.quality.evaluate import device_name
from s2o_compile.quality.head_curves import RATE

READINGS = 4
"""Time of a step over that of a reading, roughly: every attention runs exactly and at ten taus."""


def calibrate(
    model: Model = "smollm2",
    error: Annotated[float, typer.Option(help="Relative L2 error of every attention's output, 0.02 for 2 %.")] = 0.02,
    tokens: Tokens = 8192,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text to measure on, may be repeated; else Python's language reference.")
    ] = None,
    config_file: ConfigFile = None,
    device: Device = "",
    out: Annotated[Path, typer.Option(help="Configuration to write, JSON.")] = Path("s2o.json"),
    json_file: Json = None,
) -> None:
    """Measure every head on your text and write the configuration that keeps an error budget."""
    check_out("--out", out)
    check_json(json_file)
    check_error("--error", error, least=LEAST_ERROR)
    config = choose_config(None, config_file)
    # Even a short text is measured; what is written keeps the length from which the model is to run sparse.
    measured = dataclasses.replace(config, min_seq_len=min(tokens, 2048))
    with show_steps(Console(stderr=True)) as step:
        device = choose_device(device)
        with step("loading the model"):
            loaded, tokenizer = load(model, tokens, device)
            ids = [tokenize(loaded, tokenizer, tokens, file).to(device) for file in text or [None]]
        check_reads(loaded, ids[0])
        step.expect(len(ids), READINGS * seconds_to_read(loaded, ids[0]))
        found = calibration(loaded, ids, error, config=measured, progress=step)
    written = dataclasses.replace(found.config, min_seq_len=config.min_seq_len)
    about = {
        "model": full_name(model),
        "text": [str(file) for file in text or ["Python's language reference"]],
        "tokens": tokens,
        "device": device_name(ids[0].device),
        **made_by(),
    }
    with writing("--out", out) as file:
        file.write_text(written.to_json(about) + "\n", encoding="utf-8")
    says = _summary(found, written, error, tokens, ids[0].device, dtype_of(loaded))

    def to_json() -> str:
        figures = {"sparse": found.sparse, "sites": len(found.choices), "density": found.density, "time": found.time}
        return json.dumps({"about": about, "error": error, "config": str(out)} | figures)

    def print_it(console: Console) -> None:
        console.print(
            f"{says}\n"
            f"Use it: s2o_compile.optimize(model, S2OConfig.from_json(open({str(out)!r}).read())), "
            f"and see what it costs on other text: s2o evaluate --config {out} --text FILE",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )

    show(json_file, to_json, print_it)


def _summary(
    found: Calibration, written: S2OConfig, error: float, tokens: int, device: torch.device, dtype: torch.dtype
) -> str:
    """What will run sparse, from which length on, and what that should gain."""
    count, marked = len(found.choices), sum(map(len, written.dense_heads.values()))
    shortest = shortest_sparse(written.min_seq_len, device, dtype)
    never = why_never(LONG, written.min_seq_len, device, dtype)
    lengths = f"at no length ({never})" if never else f"from {shortest} tokens on"
    says = (
        f"{found.sparse} of {count} attentions will run sparse {lengths} (min_seq_len "
        f"{written.min_seq_len!r} on {device.type}), within an error of {error:.2%}. {marked} key/value heads are "
        f"marked dense.\nAt {tokens} tokens they computed {found.density:.0%} of the query-key pairs. That should take "
        f"{found.time:.0%} of the time of dense attention, if S2O computes at {RATE:g} of the dense rate (measured on "
        "an H100); the ranking of keys is not counted."
    )
    short = f"\nPrompts of {tokens} tokens run dense. Calibrate on a text as long as your prompts."
    return says + short if tokens < shortest and not never else says
