"""Logits of a few tokens at a time, so that no tensor of all tokens times the vocabulary is made.

A causal model of transformers is a body, ``base_model``, and what its forward does with the body's output: a head, a
scale, a softcap. A hook keeps the body's output [B, N, H] and hands on the last token alone. Later the forward runs
again on some tokens, with the kept states in place of the body. So nothing is assumed about the steps behind the body.
Every model is tried on its first tokens. One that gives other logits this way is read whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from s2o_compile.capture.generation_masks import name_of_cache
from s2o_compile.errors import EvaluationError, WholeLogitsWarning
from s2o_compile.kernels.support.errors import warn
from s2o_compile.quality.batches import TokenBatch

PIECE_BYTES = 2**26
"""Bytes that the float32 logits of a piece may fill, unless one token fills more."""

TRIED_TOKENS = 12
"""Tokens of a batch on which pieces are compared with the model's own logits."""

LARGE_BYTES = 2**30
"""Bytes of whole logits from which their size is worth a warning."""


@dataclass(frozen=True)
class Logits:
    """Logits of a batch [B, N], given by token: held, or made from hidden states when they are asked for.

    Attributes:
        vocabulary: Logits of a token.
        at: Logits [P, V] in the model's dtype, of the sequence ``row`` at ``places``, int64 [P].
    """

    vocabulary: int
    at: Callable[[int, Tensor], Tensor]


class LogitsReader:
    """Reads the logits of a model and of its copies, in pieces where that is shown to be the same.

    Use it as a context manager around all reading, and copy the model inside: the copy then has the hook on the body.

    Args:
        caller: Name of the function in messages.
        model: The uncompiled model.
        batch: Tokens of which the first are tried.

    Attributes:
        reason: Why logits are read whole; empty if they are read in pieces.
        vocabulary: Logits of a token, 0 if they are read whole.
    """

    def __init__(self, caller: str, model: nn.Module, batch: TokenBatch) -> None:
        self._caller, self._model, self._warned = caller, model, False
        self._kept: list[Tensor] = []
        self._given: Tensor | None = None
        self._body: nn.Module | None = None
        self._output: Any = None
        self.vocabulary = 0
        self.reason = "has no base_model"
        for body in _bodies(model):
            self.reason = self._try(body, batch.first(TRIED_TOKENS))
            if not self.reason:
                return
        self._body = None

    def __enter__(self) -> LogitsReader:
        self._handle = None if self._body is None else self._body.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def run(self, model: nn.Module, batch: TokenBatch) -> None:
        """Run the model or a copy for its attention alone, without logits where they can be left out."""
        batch.run(model, logits_to_keep=1)
        self._kept.clear()

    def next_token(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, dict[str, object]]:
        """Run the model or a copy on a batch and keep its cache.

        Returns:
            The best next token of every sequence, int64 [B, 1], and the cache of keys and values, by its name.

        Raises:
            EvaluationError: The model returns no logits [B, _, V], or no cache.
        """
        output: Any = batch.run(model, use_cache=True, logits_to_keep=1)
        self._kept.clear()
        logits, cache = getattr(output, "logits", None), name_of_cache(getattr(output, "__dict__", {}))
        if not isinstance(logits, Tensor) or logits.dim() != 3 or not cache:
            raise EvaluationError(
                f"{self._caller}: expected an output with .logits and a cache, as a causal model of transformers "
                f"returns it, got {type(output).__name__}. Give such a model."
            )
        return logits[:, -1].argmax(-1, keepdim=True), {cache: getattr(output, cache)}

    def read(self, model: nn.Module, batch: TokenBatch) -> Logits:
        """Run the model or a copy on a batch.

        Raises:
            EvaluationError: The model returns no logits [B, N, V].
        """
        if self._body is None:
            whole = self._checked_size(batch.logits(model, self._caller))
            return Logits(whole.shape[2], lambda row, places: whole[row, places])
        self._kept.clear()
        batch.without_labels().run(model)
        (hidden,) = self._kept
        self._kept.clear()
        return Logits(
            self.vocabulary, lambda row, places: self.behind(batch.at(row, places), hidden[row, places][None])[0]
        )

    def behind(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """Logits [B, P, V] of tokens with these hidden states [B, P, H]: the model's forward without its body."""
        assert self._body is not None
        self._given = hidden
        try:
            with patch.object(self._body, "forward", lambda *_, **__: _with_hidden(self._output, hidden)):
                return batch.without_labels().logits(self._model, self._caller)
        finally:
            self._given = None

    def _keep(self, _module: nn.Module, _inputs: object, output: Any) -> Any:  # noqa: ANN401 (what a body returns)
        """The hook on the body: keep its hidden states, and let only the last token go on to the head."""
        if self._given is not None:
            return None
        hidden = _hidden(output)
        self._kept.append(hidden)
        return _with_hidden(output, hidden[:, -1:])

    def _try(self, body: nn.Module, batch: TokenBatch) -> str:
        """Compare the logits of a few tokens, whole and in pieces; the reason why they differ, or nothing."""
        seen: list[Any] = []
        self._body = body
        try:
            with body.register_forward_hook(lambda *call: seen.append(call[-1])):
                whole = batch.logits(self._model, self._caller)
            if len(seen) != 1:
                return f"runs its {type(body).__name__} {len(seen)} times"
            self._output = _with_hidden(seen[0], None)
            hidden, half = _hidden(seen[0]), (batch.ids.shape[1] + 1) // 2
            for row in range(len(hidden)):
                for places in torch.arange(hidden.shape[1], device=hidden.device).split(half):
                    piece = self.behind(batch.at(row, places), hidden[row, places][None])[0]
                    if not _same(piece, whole[row, places]):
                        return f"returns other logits from the hidden states of its {type(body).__name__}"
        except EvaluationError:  # no logits: reading them whole says it
            return "returns no logits"
        except Exception as error:  # whatever a model raises on few tokens or on states of another length
            return f"cannot be run from hidden states ({type(error).__name__})"
        self.vocabulary = whole.shape[2]
        return ""

    def _checked_size(self, logits: Tensor) -> Tensor:
        if logits.nbytes >= LARGE_BYTES and not self._warned:
            self._warned = True
            warn(
                f"{self._caller}: expected a model whose logits can be made in pieces, got one that {self.reason}. "
                f"Its logits {tuple(logits.shape)} are held twice, {logits.nbytes / 2**30:.1f} GiB each. Give shorter "
                "batches, or a model of transformers.",
                WholeLogitsWarning,
            )
        return logits


def _bodies(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose output may be all that a model's head sees."""
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model:
        yield body
        decoder = getattr(body, "decoder", None)  # OPT and its kind call it past the body
        if isinstance(decoder, nn.Module):
            yield decoder


def _hidden(output: Any) -> Tensor:  # noqa: ANN401 (what a body returns)
    return output if isinstance(output, Tensor) else output[0]


def _with_hidden(output: Any, hidden: Tensor | None) -> Any:  # noqa: ANN401 (what a body returns)
    """A body's output with other hidden states: a tensor, a tuple, or an output object of transformers."""
    if isinstance(output, Tensor) or output is None:
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})


def _same(piece: Tensor, whole: Tensor) -> bool:
    """Whether two logits differ by no more than sums in another order do."""
    if piece.shape != whole.shape:
        return False
    bound = max(4 * torch.finfo(whole.dtype).eps, 1e-5) * whole.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    return bool(torch.isclose(piece, whole, rtol=0.0, atol=bound, equal_nan=True).all())
