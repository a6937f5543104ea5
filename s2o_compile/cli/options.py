"""Shared by the commands: their packages and options, and how they load a model and its text."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from s2o_compile.cli.demo import Step, document
from s2o_compile.cli.loading import check_causal, load_weights, loading
from s2o_compile.cli.models import KNOWN, NAMES, DemoUnavailableError, load_model
from s2o_compile.config import S2OConfig
from s2o_compile.errors import OptionError
from s2o_compile.kernels.support import files
from s2o_compile.kernels.support.arguments import shown
from s2o_compile.kernels.support.json_text import decode

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from typer.core import TyperCommand
except ImportError as error:
    raise SystemExit(
        f"s2o: expected rich and typer, got no {error.name}. Run `pip install 's2o-compile[cli]'`."
    ) from error

__all__ = [
    "BarColumn",
    "Console",
    "Progress",
    "SpinnerColumn",
    "Table",
    "TextColumn",
    "TimeElapsedColumn",
    "TyperCommand",
    "typer",
]

Tau = Annotated[
    float | None, typer.Option(help="Quality against speed; 0 is exact. Alone it measures no error. Default: 0.5.")
]
Error = Annotated[
    float | None, typer.Option(help="Sampled error that no attention may exceed; --tau beside it says where to begin.")
]
Device = Annotated[str, typer.Option(help='"cpu" or "cuda"; by default cuda where there is one.')]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="S2OConfig as JSON; --tau wins over its tau.")]
MODEL_HELP = f"{NAMES}, or a transformers model: a directory or a hub name."
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
Text = Annotated[Path | None, typer.Option(help="Text to read; by default Python's language reference.")]
Tokens = Annotated[int, typer.Option(help="Tokens of the text that are read.", min=2)]


def choose_device(wanted: str) -> str:
    """The device asked for, or the best there is."""
    available = torch.cuda.is_available()
    if wanted not in ("", "cpu", "cuda") or (wanted == "cuda" and not available):
        got = f"{wanted!r}{'' if available else ' on a machine without a CUDA device'}"
        raise DemoUnavailableError(f'--device: expected "cpu" or "cuda", got {got}. Leave it out to choose by machine.')
    return wanted or ("cuda" if available else "cpu")


def choose_config(tau: float | None, file: Path | None = None, **fields: Any) -> S2OConfig:  # noqa: ANN401 (its fields)
    """The configuration of a file, or the defaults, with this tau if one is given.

    Further fields take the place of the defaults, and a ``min_seq_len`` also that of "auto" in a file.
    """
    if file is None:
        config = S2OConfig(**fields)
    else:
        text = read_file("--config", file)
        try:
            config = S2OConfig.from_json(text)
        except OptionError as error:
            raise OptionError(f"--config {shown(str(file))}: {error}") from error
        if config.min_seq_len == "auto":
            config = dataclasses.replace(config, min_seq_len=fields.get("min_seq_len", "auto"))
    return config if tau is None else dataclasses.replace(config, tau=tau, error=None, site_tau={})


def read_file(option: str, file: Path) -> str:
    """The text of a file that an option names, without a byte order mark."""
    try:
        return decode(file.read_bytes())
    except (OSError, ValueError) as error:  # no UTF-8, or a name that can be no file's
        raise OptionError(
            f"{option}: expected a text file in UTF-8, got {shown(str(file))} ({error}). Give another path."
        ) from error


def check_out(option: str, file: Path | None) -> None:
    """Refuse a file that cannot be written, before the work whose result it would hold."""
    if file is None:
        return
    try:
        in_a_directory = file.absolute().parent.is_dir() and not file.is_dir()
        if in_a_directory:
            files.try_writing(file)
    except (OSError, ValueError) as error:  # or a name that can be no file's
        raise _not_written(option, file, error) from error
    if not in_a_directory:
        raise OptionError(
            f"{option}: expected a file in a directory that exists, got {str(file)!r}. Make its directory, or give "
            "another path."
        )


def typed(context: typer.Context, names: Collection[str]) -> list[str]:
    """The options of these parameters that stand on the command line."""
    given = {name for name in names if str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"}
    return [parameter.opts[0] for parameter in context.command.params if parameter.name in given]


def refuse(beside: str, options: Sequence[str]) -> None:
    """Refuse options that would be ignored beside something else.

    Raises:
        OptionError: There are some.
    """
    if options:
        given = " and ".join(options)
        raise OptionError(f"{beside}: expected it alone, got {given}, which would change nothing. Leave it out.")


@contextmanager
def writing(option: str, file: Path) -> Iterator[Path]:
    """The file to write to, which becomes the option's once it is whole; names the option where it cannot."""
    try:
        with files.writing(file) as part:
            yield part
    except OSError as error:
        raise _not_written(option, file, error) from error


def _not_written(option: str, file: Path, error: Exception) -> OptionError:
    cause = getattr(error, "strerror", None) or error
    return OptionError(
        f"{option}: expected a file that may be written, got {shown(str(file))} ({cause}). Give another path."
    )


def load(model: str, tokens: int, device: str, *, random_weights: bool = False) -> tuple[Any, Any]:
    """Model and, unless its weights are random, tokenizer.

    Raises:
        LoadingError: There is no such model, or it cannot be loaded whole.
        DemoUnavailableError: The packages that carry a known model are missing, or it does not read so many tokens.
    """
    if model in KNOWN:
        if random_weights:
            raise OptionError(
                f"--random-weights: expected a directory or a hub name beside it, got {model!r}, whose weights are at "
                "hand. Leave it out."
            )
        return load_model(tokens, device, model)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise DemoUnavailableError(
            "--model: expected transformers, got none. Run `pip install transformers`."
        ) from error
    source = f"model {shown(model)}"
    remedy = f"Give {NAMES}, a directory that save_pretrained wrote, or a hub name."
    with loading(source, remedy):
        config = AutoConfig.from_pretrained(model)
    check_causal(source, config)
    if random_weights:
        with loading(source, remedy):
            loaded, tokenizer = AutoModelForCausalLM.from_config(config).eval(), None
    else:
        loaded = load_weights(source, remedy, pretrained_model_name_or_path=model)
        with loading(f"tokenizer of {source}", remedy):
            tokenizer = AutoTokenizer.from_pretrained(model)
    return loaded.to(device), tokenizer  # pyright: ignore[reportArgumentType] (transformers types .to by a mixin)


def tokenize(model: Any, tokenizer: Any, tokens: int, file: Path | None) -> Tensor:  # noqa: ANN401 (of transformers)
    """Exactly ``tokens`` ids [1, tokens] from the beginning of a file, or of the demo's document.

    Raises:
        OptionError: The text is too short, or has ids that the model does not know.
    """
    text = document() if file is None else read_file("--text", file)
    with loading("the model's tokenizer", "Save the tokenizer anew beside the model."):
        ids = tokenizer(text, verbose=False).input_ids[:tokens]
    if len(ids) < tokens:
        raise OptionError(f"--tokens: expected at most the {len(ids)} of the text, got {tokens}. Give a longer --text.")
    known = model.get_input_embeddings().weight.shape[0]
    if not 0 <= min(ids) <= max(ids) < known:
        raise OptionError(
            f"--model: expected a tokenizer whose ids lie below {known}, as the model's embedding has them, got "
            f"{max(ids)}. Save the tokenizer that the model was trained with beside it."
        )
    return torch.tensor([ids])


@contextmanager
def show_steps(console: Console) -> Iterator[Step]:
    """A display of steps: yields a function that takes a name and returns a context for the step."""
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:

        @contextmanager
        def step(name: str) -> Iterator[None]:
            task = progress.add_task(name, total=1)
            yield
            progress.update(task, completed=1)

        yield step
