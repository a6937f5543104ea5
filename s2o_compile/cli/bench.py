"""``s2o bench``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from s2o_compile.cli.demo import seconds_to_read
from s2o_compile.cli.made_inputs import make_inputs
from s2o_compile.cli.models import full_name
from s2o_compile.cli.options import (
    ConfigFile,
    Console,
    Device,
    Error,
    Json,
    Model,
    Table,
    Tau,
    TextFile,
    check_json,
    choose_config,
    choose_device,
    load_any,
    show,
    show_steps,
    tokenize,
    typer,
)
from s2o_compile.errors import OptionError
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.support.arguments import shown
from s2o_compile.speed.bench import STEPS
from s2o_compile.speed.bench import bench as bench_model
from s2o_compile.speed.benchmark import HEADER, Benchmark

RANDOM_IDS = "Token ids are random, so density, error and loss are not those of text."
RANDOM_INPUTS = "Inputs are random, so density and error are not those of real ones."


def bench(
    model: Model = "smollm2",
    tokens: Annotated[
        list[int] | None, typer.Option(help="Lengths of the prompt, such as 8192 32768; 8192 by default.", min=2)
    ] = None,
    text: TextFile = None,
    tau: Tau = None,
    error: Error = None,
    config_file: ConfigFile = None,
    device: Device = "",
    json_file: Json = None,
) -> None:
    """Time a model in plain PyTorch, under torch.compile and through S2O: is it faster, from which length on?"""
    check_json(json_file)
    lengths = sorted(set(tokens or [8192]))
    config = choose_config(tau, config_file, error, min_seq_len=TILE_LEN)
    with show_steps(Console(stderr=True)) as step:
        device = choose_device(device)
        with step("loading the model"):
            loaded, tokenizer = load_any(model, lengths[-1], device)
            inputs, notes = _inputs(f"model {shown(model)}", loaded, tokenizer, lengths, text)
        step.expect(STEPS * len(inputs), _seconds_of_a_step(loaded, inputs))
        found = bench_model(loaded, inputs, config, progress=step)
    found = dataclasses.replace(found, model=full_name(model), notes=notes)
    show(json_file, found.to_json, lambda console: print_benchmark(console, found))


def _inputs(
    source: str,
    model: Any,  # noqa: ANN401 (of transformers)
    tokenizer: Any,  # noqa: ANN401 (of transformers)
    lengths: list[int],
    text: Path | None,
) -> tuple[list[dict[str, Tensor]], tuple[str, ...]]:
    """Inputs of these lengths, and what a reader must know of them."""
    made = [make_inputs(source, model, length) for length in lengths]
    reads_text = made[0].inputs.keys() == {"input_ids"}
    if text is not None and (tokenizer is None or not reads_text):
        lacks = "has no tokenizer" if reads_text else f"reads {', '.join(made[0].inputs)}"
        raise OptionError(f"--text: expected a model that reads text, got {source}, which {lacks}. Leave it out.")
    if reads_text and tokenizer is not None:
        ids = tokenize(model, tokenizer, lengths[-1], text).to(made[0].inputs["input_ids"].device)
        return [{"input_ids": ids[:, :length]} for length in lengths], ()
    if reads_text:
        return [x.inputs for x in made], (RANDOM_IDS,)
    # The size of an image does not go by --tokens.
    return [x.inputs for x in {x.text: x for x in made}.values()], (RANDOM_INPUTS, made[0].text)


def _seconds_of_a_step(model: Any, inputs: list[dict[str, Tensor]]) -> float | None:  # noqa: ANN401 (of transformers)
    """About how long a step takes, which reads an input twice, if the model reads text."""
    if not all(x.keys() == {"input_ids"} for x in inputs):
        return None
    return 2 * sum(seconds_to_read(model, x["input_ids"]) for x in inputs) / len(inputs)


def print_benchmark(console: Console, found: Benchmark) -> None:
    """The figures as a table, what a reader must know of them, and the verdict."""
    table = Table(title=found.title, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in HEADER:  # two of them wrap, so that 80 characters are enough
        wraps = name in ("compile s", "peak GiB")
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=not wraps)
    before = ""
    for cells in found.lines():
        if cells[0] and before:
            table.add_section()
        table.add_row(*cells)
        before = cells[1]
    console.print(table)
    for remark in found.remarks():
        console.print(f"- {remark}", highlight=False, markup=False)
    console.print(found.verdict, style="bold", highlight=False, markup=False)
