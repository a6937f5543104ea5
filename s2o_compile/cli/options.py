"""Shared by the commands: their packages and options, and how they load a model and its text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from s2o_compile.cli.demo import document
from s2o_compile.cli.loading import any_class, check_causal, check_tokenizer, find_model, load_weights, loading
from s2o_compile.cli.models import KNOWN, NAMES, DemoUnavailableError, load_model
from s2o_compile.config import S2OConfig
from s2o_compile.errors import OptionError
from s2o_compile.kernels.support import files
from s2o_compile.kernels.support.arguments import shown
from s2o_compile.kernels.support.json_text import decode

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from rich.text import Text
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
    "Text",
    "TextColumn",
    "TimeElapsedColumn",
    "TimeRemainingColumn",
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
TextFile = Annotated[Path | None, typer.Option(help="Text to read; by default Python's language reference.")]
Tokens = Annotated[int, typer.Option(help="Tokens of the text that are read.", min=2)]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help='Also write the result to a file, as JSON; "-" prints it, and nothing else.'
    ),
]
STANDARD_OUTPUT = Path("-")


def choose_device(wanted: str) -> str:
    """The device asked for, or the best there is."""
    available = torch.cuda.is_available()
    if wanted not in ("", "cpu", "cuda") or (wanted == "cuda" and not available):
        got = f"{wanted!r}{'' if available else ' on a machine without a CUDA device'}"
        raise DemoUnavailableError(f'--device: expected "cpu" or "cuda", got {got}. Leave it out to choose by machine.')
    return wanted or ("cuda" if available else "cpu")


def choose_config(
    tau: float | None,
    file: Path | None = None,
    error: float | None = None,
    **fields: Any,  # noqa: ANN401 (its fields)
) -> S2OConfig:
    """The configuration of a file, or the defaults, with this tau and this error if one of them is given.

    Further fields take the place of the defaults, and a ``min_seq_len`` also that of "auto" in a file.
    """
    if file is None:
        config = S2OConfig(**fields)
    else:
        text = read_file("--config", file)
        try:
            config = S2OConfig.from_json(text)
        except OptionError as fault:
            raise OptionError(f"--config {shown(str(file))}: {fault}") from fault
        if config.min_seq_len == "auto":
            config = dataclasses.replace(config, min_seq_len=fields.get("min_seq_len", "auto"))
    if tau is None and error is None:
        return config
    return dataclasses.replace(config, tau=tau, error=error, site_tau=config.site_tau if tau is None else {})


def read_file(option: str, file: Path) -> str:
    """The text of a file that an option names, without a byte order mark."""
    try:
        return decode(file.read_bytes())
    except (OSError, ValueError) as error:  # no UTF-8, or a name that can be no file's
        raise OptionError(
            f"{option}: expected a text file in UTF-8, got {shown(str(file))} ({error}). Give another path."
        ) from error


def show(json_file: Path | None, to_json: Callable[[], str], print_it: Callable[[Console], None]) -> None:
    """Print a result, or its JSON if ``--json -`` asks for it; write it where ``--json`` names a file.

    What is printed beside JSON on standard output goes to standard error.
    """
    if json_file == STANDARD_OUTPUT:
        print(to_json())
        return
    print_it(Console())
    if json_file is not None:
        with writing("--json", json_file) as file:
            file.write_text(to_json() + "\n", encoding="utf-8")


def check_json(file: Path | None) -> None:
    """Refuse a file of ``--json`` that cannot be written, before the work."""
    if file != STANDARD_OUTPUT:
        check_out("--json", file)


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


REMEDY = f"Give {NAMES}, a directory that save_pretrained wrote, or a hub name."


def load(model: str, tokens: int, device: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Raises:
        LoadingError: There is no such model, it is of another kind, or it cannot be loaded whole.
        DemoUnavailableError: The packages that carry a known model are missing, or it does not read so many tokens.
    """
    if model in KNOWN:
        return load_model(tokens, device, model)
    source, where, config = _config_of(model)
    check_causal(source, config)
    check_tokenizer(source, model)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = load_weights(source, REMEDY, AutoModelForCausalLM, **where)
    remedy = "Save the tokenizer beside the model. `s2o bench` needs none."
    with loading(f"tokenizer of {source}", remedy, what="one that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(**where)
    return loaded.to(device), tokenizer


def check_random_weights(model: str, *, random_weights: bool) -> None:
    """Raise OptionError where a model whose weights are at hand is asked for without them."""
    if random_weights and model in KNOWN:
        raise OptionError(
            f"--random-weights: expected a directory or a hub name beside it, got {model!r}, whose weights are at "
            "hand. Leave it out."
        )


def load_any(model: str, tokens: int, device: str, *, random_weights: bool = False) -> tuple[Any, Any]:
    """A model of any class of transformers in eval mode, and its tokenizer, or None if there is none.

    Raises:
        LoadingError: There is no such model, or it cannot be loaded whole.
        DemoUnavailableError: The packages that carry a known model are missing, or it does not read so many tokens.
    """
    if model in KNOWN:
        return load_model(tokens, device, model)
    source, where, config = _config_of(model)
    kind = any_class(config)
    if random_weights:
        with loading(source, REMEDY):
            made = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
            return made.eval().to(device), None
    return load_weights(source, REMEDY, kind, **where).to(device), _tokenizer_or_none(where)


def _tokenizer_or_none(where: dict[str, Any]) -> Any:  # noqa: ANN401 (a transformers tokenizer)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**where)
    except Exception:  # whatever transformers raises where there is none, or none that it can read
        return None


def _config_of(model: str) -> tuple[str, dict[str, Any], Any]:
    """A model's name in messages, the keywords of ``from_pretrained`` that find it, and its configuration."""
    source = f"model {shown(model)}"
    try:
        where = find_model(source, model, REMEDY)  # ahead of transformers, which takes seconds to import
        from transformers import AutoConfig
    except ImportError as error:
        raise DemoUnavailableError(
            "--model: expected transformers, got none. Run `pip install transformers`."
        ) from error
    with loading(source, REMEDY):
        return source, where, AutoConfig.from_pretrained(**where)


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


class Command(TyperCommand):
    """A command whose options that may be repeated take several values at once: ``--tokens 8192 32768``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 (typer has a click of its own)
        """Repeat the option before each further value, as click wants it."""
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        repeated, option = [], ""
        for word in args:
            if word.startswith("-"):
                option = word if word in several else ""
            elif option and repeated[-1] != option:
                repeated.append(option)
            repeated.append(word)
        try:
            return super().parse_args(ctx, repeated)
        except typer.BadParameter as error:  # it says what was expected
            said = f", got `{' '.join(args)}`. Give another: {getattr(error.param, 'help', '')}"
            error.message += said if error.message else ""  # else an argument is missing
            raise


class Steps:
    """A display of steps, and of the time that is left. A call with a name returns a context for that step."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._expected = progress, 0
        self._each: float | None = None
        self._done: list[float] = []
        self._began = 0.0

    def expect(self, count: int, seconds: float | None = None) -> None:
        """Say how many steps of about equal length follow, and how long one takes, if that is known."""
        self._expected, self._each, self._done = count, seconds, []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A step."""
        task, self._began = self._progress.add_task(name, total=1), time.perf_counter()
        yield
        self._done.append(time.perf_counter() - self._began)
        self._progress.update(task, completed=1)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step is done, by the mean of those that are; None where nobody knows."""
        left = self._expected - len(self._done)
        each = sum(self._done) / len(self._done) if self._done else self._each
        if left <= 0 or each is None:
            return None
        return max(left * each - (time.perf_counter() - self._began), 0.0)


class _TimeLeft(ProgressColumn):
    """The time left of all steps, beside the one that runs."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self._steps = steps

    def render(self, task: Task) -> Text:
        left = None if task.finished else self._steps.seconds_left
        if left is None:
            return Text("")
        minutes, seconds = divmod(round(left), 60)
        return Text(f"about {minutes}:{seconds:02d} left in all", style="progress.remaining")


@contextmanager
def show_steps(console: Console) -> Iterator[Steps]:
    """A display of steps."""
    with Progress(console=console) as progress:
        steps = Steps(progress)
        progress.columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), _TimeLeft(steps)
        yield steps
