"""``s2o calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from s2o_compile.cli.options import (
    ConfigFile,
    Console,
    Device,
    Model,
    Tokens,
    check_out,
    choose_config,
    choose_device,
    load,
    show_steps,
    tokenize,
    typer,
    writing,
)
from s2o_compile.config import check_error
from s2o_compile.quality.calibrate import LEAST_ERROR
from s2o_compile.quality.calibrate import calibrate as calibrate_model


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
) -> None:
    """Measure every head on your text and write the configuration that keeps an error budget."""
    check_out("--out", out)
    check_error("--error", error, least=LEAST_ERROR)
    config = choose_config(None, config_file, min_seq_len=min(tokens, 2048))
    with show_steps(Console(stderr=True)) as step:
        device = choose_device(device)
        loaded, tokenizer = load(model, tokens, device)
        ids = [tokenize(loaded, tokenizer, tokens, file).to(device) for file in text or [None]]
        found = calibrate_model(loaded, ids, error, config=config, progress=step)
    with writing("--out", out):
        out.write_text(found.to_json() + "\n", encoding="utf-8")
    dense = sum(map(len, found.dense_heads.values()))
    Console().print(
        f"{len(found.site_tau)} attentions calibrated to an error of {error:.2%}, {dense} key/value heads marked "
        f"dense: {out}\nUse it: s2o_compile.optimize(model, S2OConfig.from_json(open({str(out)!r}).read())), "
        f"and see what it costs on other text: s2o evaluate --config {out} --text FILE",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
