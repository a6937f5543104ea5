"""``s2o evaluate`` and ``s2o plot``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from s2o_compile.api import optimize
from s2o_compile.cli.demo import seconds_to_read
from s2o_compile.cli.loading import check_reads
from s2o_compile.cli.models import full_name
from s2o_compile.cli.options import (
    Command,
    ConfigFile,
    Console,
    Device,
    Error,
    Json,
    Model,
    Steps,
    Tau,
    TextFile,
    Tokens,
    check_json,
    check_out,
    choose_config,
    choose_device,
    load,
    read_file,
    refuse,
    show,
    show_steps,
    tokenize,
    typed,
    typer,
    writing,
)
from s2o_compile.cli.tasks import choose_lengths, run_tasks
from s2o_compile.config import S2OConfig, unknown_name
from s2o_compile.errors import OptionError
from s2o_compile.kernels.observe import ObservedCall, observe_attention
from s2o_compile.kernels.support.errors import warn
from s2o_compile.kernels.support.torch_compile import names_of_modules
from s2o_compile.quality.evaluate import evaluate as evaluate_model
from s2o_compile.quality.evaluation import Evaluation
from s2o_compile.quality.visit_map import VisitMap, visit_map

TAUS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5)
"""Where ``--curve`` measures."""

RENAMED = {"--planted": "--needles", "--no-planted": "--no-needles"}


class RenamedOptions(Command):
    """A command whose old options work and warn."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 (typer has a click of its own)
        """Put the present options in the place of old ones."""
        for old, new in RENAMED.items():
            if old in args:
                warn(f"{old} is now called {new}; the old name will go.", DeprecationWarning)
        return super().parse_args(ctx, [RENAMED.get(word, word) for word in args])


def evaluate(
    model: Model = "smollm2",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the text that are read; 8192 by default.", min=2)
    ] = None,
    text: TextFile = None,
    tau: Tau = None,
    error: Error = None,
    config_file: ConfigFile = None,
    needles: Annotated[
        bool | None,
        typer.Option(help="Also hide random strings in the text and ask for them again; the default."),
    ] = None,
    curve: Annotated[bool, typer.Option(help="Also measure every attention at nine other taus.")] = False,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Solve tasks of long context instead: needles, variables, common words.")
    ] = False,
    lengths: Annotated[
        list[int] | None,
        typer.Option(help="--tasks: tokens of a prompt, may be repeated; else --tokens, its half, its quarter.", min=1),
    ] = None,
    device: Device = "",
    json_file: Json = None,
) -> None:
    """Read a text densely and through S2O: loss, agreement, recall, and the error of every attention."""
    check_json(json_file)
    beside = {"--needles": needles, "--tokens": tokens if lengths else None}
    tokens = tokens or 8192
    asked = choose_lengths(lengths, tokens, tasks=tasks, curve=curve)
    if tasks:
        refuse("--tasks", [option for option, value in beside.items() if value is not None])
        run_tasks(model, asked, text, _config(tau, config_file, asked[0] // 2, error), device, json_file)
        return
    taus = TAUS if curve else ()
    config, with_needles = _config(tau, config_file, tokens, error), needles is not False
    found = _evaluate(model, tokens, text, config, device, needles=with_needles, taus=taus)

    def print_it(console: Console) -> None:
        console.print(found.text(console.width), soft_wrap=True, highlight=False, markup=False)

    show(json_file, found.to_json, print_it)


def plot(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help='"density", "error", "depth" or "attention".')],
    evaluation: Annotated[Path | None, typer.Argument(help="JSON of s2o evaluate; without it, one is made.")] = None,
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .pdf or .svg.")] = Path("s2o.png"),
    model: Model = "smollm2",
    tokens: Tokens = 4096,
    text: TextFile = None,
    tau: Tau = None,
    config_file: ConfigFile = None,
    site: Annotated[str, typer.Option(help='"attention": which site; by default the first.')] = "",
    head: Annotated[int, typer.Option(help='"attention": which query head.', min=0)] = 0,
    device: Device = "",
) -> None:
    """Draw density by head, error against density, stop depth over the text, or the keys that one head visited."""
    from s2o_compile.quality.pictures import PICTURES, draw_attention

    if kind not in (*PICTURES, "attention"):
        raise OptionError(unknown_name("picture", kind, (*PICTURES, "attention")))
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise OptionError(f"--out: expected a name in .png, .pdf or .svg, got {str(out)!r}. Name such a file.")
    if kind != "attention":
        refuse(f"plot {kind}", typed(context, ("site", "head")))
        if evaluation is not None:
            refuse("evaluation", typed(context, ("model", "tokens", "text", "tau", "config_file", "device")))
    check_out("--out", out)
    if kind == "attention":
        if evaluation is not None:
            raise OptionError(
                "plot attention: expected no evaluation, which holds no tensors, got one. Leave it out: this picture "
                "runs the model."
            )
        config = _config(tau, config_file, tokens)
        visits = _visits(model, tokens, text, config, device, site, head)
        title = f"{full_name(model)}, {tokens} tokens, {config.quality}"
        with writing("--out", out) as picture:
            draw_attention(visits, picture, title=title)
        return
    if evaluation is not None:
        found = Evaluation.from_json(read_file("evaluation", evaluation))
    else:
        taus = TAUS if kind == "error" else ()
        found = _evaluate(model, tokens, text, _config(tau, config_file, tokens), device, needles=False, taus=taus)
    with writing("--out", out) as picture:
        PICTURES[kind](found, picture)


def _config(tau: float | None, file: Path | None, tokens: int, error: float | None = None) -> S2OConfig:
    """A file's configuration, or the defaults, under which even a short text runs sparse."""
    return choose_config(tau, file, error, min_seq_len=min(tokens, 2048))


def _evaluate(
    model: str, tokens: int, text: Path | None, config: S2OConfig, device: str, *, needles: bool,
    taus: tuple[float, ...],
) -> Evaluation:  # fmt: skip
    with show_steps(Console(stderr=True)) as step:
        loaded, ids = _read(model, tokens, text, device, step)
        step.expect(4 if needles else 2, seconds_to_read(loaded, ids))
        found = evaluate_model(loaded, ids, config, needles=needles, taus=taus, progress=step)
    return dataclasses.replace(found, model=full_name(model))


def _read(model: str, tokens: int, text: Path | None, device: str, step: Steps) -> tuple[torch.nn.Module, Tensor]:
    device = choose_device(device)
    with step("loading the model"):
        loaded, tokenizer = load(model, tokens, device)
        ids = tokenize(loaded, tokenizer, tokens, text).to(device)
    check_reads(loaded, ids)
    return loaded, ids


def _check_place(model: Any, site: str, head: int) -> None:  # noqa: ANN401 (a transformers model)
    """Refuse a site and a head that the model does not have, as far as it tells before it runs."""
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int) and head >= heads:
        raise OptionError(f"--head: expected one of 0 to {heads - 1}, got {head}. Choose one of these query heads.")
    names = names_of_modules(model).values()
    if "." in site and site.partition("#")[0] not in names:
        near = [name for name in names if name.endswith(("attn", "attention"))]
        raise OptionError(f"--site: {unknown_name('site', site, near)} `s2o explain` lists the sites of a model.")


@torch.no_grad()
def _visits(
    model: str, tokens: int, text: Path | None, config: S2OConfig, device: str, site: str, head: int
) -> VisitMap:
    """The keys that a head of a site visits, of the first site if none is named."""
    with show_steps(Console(stderr=True)) as step:
        loaded, ids = _read(model, tokens, text, device, step)
        _check_place(loaded, site, head)
        fast = optimize(loaded, dataclasses.replace(config, inner_backend="eager"))
        sites, found = [], []

        def look(call: ObservedCall) -> None:
            sites.append(call.site)
            if call.site == (site or sites[0]):
                found.append(visit_map(call, head))

        step.expect(1, seconds_to_read(loaded, ids))
        with step("S2O"), observe_attention(look):
            fast(ids, use_cache=False)
    if not found:
        known = unknown_name("site", site, sites) if sites else "expected some attention to run sparse, got none."
        raise OptionError(f"plot attention: {known} `s2o explain` lists the sites of a model.")
    return found[0]
