"""``bench``: how much faster is this model on this device, from which length on, and what does it cost?"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2o_compile.api import Watch, optimize, watched
from s2o_compile.capture.compiled_copy import compiled_copy
from s2o_compile.capture.one_at_a_time import ONE_AT_A_TIME
from s2o_compile.config import S2OConfig, config_or_default
from s2o_compile.errors import EvaluationError, NothingRewrittenWarning
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.quality.batches import Batch, Progress, TokenBatch, check_model, exact_sites
from s2o_compile.quality.evaluate import device_name, dtype_name, model_name
from s2o_compile.quality.logits import LogitsReader
from s2o_compile.quality.next_token import NextToken
from s2o_compile.recording import SPARSE
from s2o_compile.report import Report, mean
from s2o_compile.speed.benchmark import NAMES, Benchmark, Row
from s2o_compile.speed.measure import Timing, cause, free_memory, time_calls

WAYS: dict[str, Callable[[nn.Module, S2OConfig], Callable[..., object]]] = {
    "plain": lambda model, _: model,
    "compiled": lambda model, _: torch.compile(model),
    "s2o": optimize,
}
"""What is called for each field of `Row` that is timed."""

STEPS = 1 + len(WAYS)
"""Steps of an input, as ``progress`` hears of them."""


@torch.no_grad()
def bench(
    model: nn.Module,
    inputs: Batch | Iterable[Batch],
    config: S2OConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Benchmark:
    """Time a model in plain PyTorch, under ``torch.compile`` and through S2O, and say from which length on S2O pays.

    A causal model of transformers is timed as ``generate`` reads a prompt: logits of the last token alone, without a
    cache. Each way gets a first call, in which it compiles, and then up to five timed ones. Density, sampled error and
    loss come from two more readings. So an input is read at least eight times. Code of an input is compiled for its
    own length. A way that fails, for want of memory or of a compiler, is reported, and the others go on.

    Dynamo is reset: code compiled before is compiled anew at its next call.

    Args:
        model: Any module in eval mode, not compiled, on its device and in its dtype.
        inputs: A tensor, such as token ids int64 [B, N] or pixels, or a mapping of keyword inputs; or several of these.
            They are moved to the model's device. Next-token losses are measured where a mapping or a tensor holds
            token ids, and the model returns logits [B, N, vocabulary] for them.
        config: Quality and implementation. None for the defaults, but with sparse attention at every length: that is
            what the benchmark judges. The defaults run short attention dense.
        progress: Called with the name of every step; returns a context manager around it.

    Raises:
        EvaluationError: The model or an input cannot be used.
        OptionError: The configuration is no S2OConfig.
    """
    config = S2OConfig(min_seq_len=TILE_LEN) if config is None else config_or_default(config, "bench")
    progress = progress or nullcontext
    check_model("bench", model)
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    given = [_Input.of(model, x, device) for x in _listed(inputs)]
    with ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingRewrittenWarning)  # the verdict says it
        rows = sorted((_row(model, x, config, progress) for x in given), key=lambda row: row.tokens)
    return Benchmark(
        model=model_name(model),
        device=device_name(device) if device.type != "cpu" else f"cpu ({torch.get_num_threads()} threads)",
        dtype=dtype_name(model),
        config=config,
        rows=tuple(rows),
    )


@dataclass(frozen=True, kw_only=True)
class _Input:
    """One input, as the model is called with it.

    Attributes:
        args: By position.
        keywords: By name, with those that leave out the cache and all logits but the last.
        batch: The same as token ids whose next ones the model may predict; None if it has others.
    """

    args: tuple[Any, ...]
    keywords: dict[str, Any]
    batch: TokenBatch | None
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, given: Batch, device: torch.device) -> _Input:
        if not isinstance(given, (Tensor, Mapping)):
            raise EvaluationError(
                f"bench: expected a tensor or a mapping of keyword inputs, got {type(given).__name__}. Give the output "
                "of a tokenizer with return_tensors='pt'."
            )
        keywords = {} if isinstance(given, Tensor) else dict(given)
        keywords = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in keywords.items()}
        args = (given.to(device),) if isinstance(given, Tensor) else ()
        ids, others = (args[0], None) if args else (keywords.get("input_ids"), keywords)
        batch = None
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() and _predicts(model, keywords):
            rest = others and {name: x for name, x in others.items() if name != "input_ids"}
            batch = TokenBatch(ids=ids, keywords=rest)
        known = inspect.signature(model.forward).parameters
        lean = {"use_cache": False} | ({} if batch is None else {"logits_to_keep": 1})
        keywords = {name: x for name, x in lean.items() if name in known} | keywords
        return cls(args=args, keywords=keywords, batch=batch, device=device)

    def run(self, model: Callable[..., object]) -> object:
        return model(*self.args, **self.keywords)


def _predicts(model: nn.Module, keywords: Mapping[str, object]) -> bool:
    """Whether a model may predict the next of its input ids, as far as it tells before it runs."""
    return "decoder_input_ids" not in keywords and bool(getattr(model, "can_generate", lambda: True)())


def _listed(inputs: Batch | Iterable[Batch]) -> list[Any]:
    listed: list[Any] = [inputs] if isinstance(inputs, (Tensor, Mapping)) else list(inputs)
    if not listed:
        raise EvaluationError("bench: expected at least one input, got none. Give some.")
    return listed


def _row(model: nn.Module, given: _Input, config: S2OConfig, progress: Progress) -> Row:
    length = "" if given.batch is None else f"{given.batch.ids.shape[1]} tokens, "
    with progress(f"{length}quality"):
        row = _quality(model, given, config)
    free_memory(given.device)

    timings = {}
    for name, make in WAYS.items():
        torch.compiler.reset()
        try:
            with progress(f"{length}{NAMES[name]}"):
                timings[name] = time_calls(partial(given.run, make(model, config)), given.device)
        finally:
            torch.compiler.reset()
    return replace(row, **timings)


def _quality(model: nn.Module, given: _Input, config: S2OConfig) -> Row:
    """A row without times: density, sampled error, and losses where the model predicts tokens."""
    tokens, losses, reasons = 0, {}, []
    with watched(config) as watch:
        try:
            if given.batch is None:
                given.run(compiled_copy(model, watch.backend))
            else:
                losses = _losses(model, watch, given.batch)
        except Exception as error:  # whatever a model raises, or memory that is not there: the times are still wanted
            reasons.append(f"quality was not measured: {cause(error)}")
        report = watch.recording.report
    measured = [site for site in report.sites if site.path == "s2o"]
    reasons += dict.fromkeys(exact_sites(report, {site.name for site in measured}).values())
    tokens = _most_keys(report) if given.batch is None else given.batch.ids.shape[1]
    nothing = Timing()
    return Row(
        tokens=tokens,
        plain=nothing,
        compiled=nothing,
        s2o=nothing,
        sparse=sum(site.path in SPARSE for site in report.sites),
        sites=len(report.sites),
        density=mean(site.density for site in measured),
        error=mean(site.error for site in measured),
        reasons=tuple(reasons),
        **losses,
    )


def _losses(model: nn.Module, watch: Watch, batch: TokenBatch) -> dict[str, float]:
    """Next-token losses of the model and of a copy, by the names of `Row`; none if it turns out to return no logits."""
    next_token = NextToken()
    with LogitsReader("bench", model, batch) as reader:
        sparse_model = compiled_copy(model, watch.backend)  # with the reader's hook
        if reader.reason == "returns no logits":
            batch.run(sparse_model)
            return {}
        sparse, dense = reader.read(sparse_model, batch), reader.read(model, batch)
        next_token.add(dense, sparse, batch.ids, batch.counted)
    return {name: next_token.mean(name) for name in ("loss_dense", "loss_s2o")}


def _most_keys(report: Report) -> int:
    """The most keys of an attention, as far as its length is a number."""
    lengths = (site.key_shape[2] for site in report.sites if len(site.key_shape) > 2)
    return max((int(length) for length in lengths if length.isdecimal()), default=0)
