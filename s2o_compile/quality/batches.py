"""Batches of token ids, checked, that `evaluate` and `calibrate` give to a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from s2o_compile.config import S2OConfig
from s2o_compile.errors import EvaluationError
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.tuned import shortest_sparse, why_never
from s2o_compile.kernels.support.torch_compile import is_compiled
from s2o_compile.report import Report

Batch = Tensor | Mapping[str, Tensor]
Progress = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Token ids [B, N] and a model's other keyword inputs, or None for a model that takes ids by position."""

    ids: Tensor
    keywords: Mapping[str, Any] | None

    @property
    def real(self) -> Tensor:
        """Bool [B, N]: True for tokens, False for padding."""
        mask = (self.keywords or {}).get("attention_mask")
        return torch.ones_like(self.ids, dtype=torch.bool) if mask is None else mask.bool()

    @property
    def counted(self) -> Tensor:
        """Bool [B, N]: tokens that the token before them predicts."""
        real = self.real
        return real & real.roll(1, 1)

    def first(self, length: int) -> TokenBatch:
        """The first tokens of every sequence."""
        return self._cut(slice(None), slice(length))

    def at(self, row: int, places: Tensor) -> TokenBatch:
        """Some tokens int64 [P] of one sequence, as a batch [1, P]."""
        return self._cut(torch.full_like(places[None], row), places[None])

    def without_labels(self) -> TokenBatch:
        """The batch for logits alone: a loss would need those of every token."""
        kept = {name: x for name, x in (self.keywords or {}).items() if name != "labels"}
        return replace(self, keywords=None if self.keywords is None else kept)

    def _cut(self, rows: Tensor | slice, places: Tensor | slice) -> TokenBatch:
        def cut(x: object) -> object:
            return x[rows, places] if isinstance(x, Tensor) and x.shape[:2] == self.ids.shape else x

        kept = None if self.keywords is None else {name: cut(x) for name, x in self.keywords.items()}
        return TokenBatch(ids=self.ids[rows, places], keywords=kept)

    def run(self, model: nn.Module, **wanted: object) -> object:
        """Call the model, with those of these keywords that it knows."""
        known = inspect.signature(model.forward).parameters
        options = {name: x for name, x in {"use_cache": False, **wanted}.items() if name in known}
        if self.keywords is None:
            return model(self.ids, **options)
        return model(input_ids=self.ids, **{**self.keywords, **options})

    def logits(self, model: nn.Module, caller: str) -> Tensor:
        """The model's logits [B, N, V]."""
        output = self.run(model)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != self.ids.shape:
            got = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
            batch, length = self.ids.shape
            raise EvaluationError(
                f"{caller}: expected logits [{batch}, {length}, vocabulary], or an object with such .logits, from the "
                f"model, got {got}. Wrap the model in a module that returns its logits."
            )
        return logits


def token_batches(caller: str, model: nn.Module, batches: Batch | Iterable[Batch]) -> list[TokenBatch]:
    """Check the batches and move them to the model's device."""
    device = next((parameter.device for parameter in model.parameters()), None)
    listed: list[Batch] = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)  # pyright: ignore
    checked = []
    for batch in listed:
        keywords = None
        if isinstance(batch, Mapping):
            keywords = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        ids = batch if keywords is None else keywords.pop("input_ids", None)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            got = "none" if ids is None else type(ids).__name__
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else got
            raise EvaluationError(
                f"{caller}: expected batches of token ids int64 [B, N], or mappings with input_ids, got {got}. Give "
                "the output of a tokenizer with return_tensors='pt'."
            )
        made = TokenBatch(ids=ids.to(device), keywords=keywords)
        if made.real.shape != ids.shape:
            raise EvaluationError(
                f"{caller}: expected an attention_mask {tuple(ids.shape)}, as input_ids, got {tuple(made.real.shape)}. "
                "Give the tokenizer's."
            )
        checked.append(made)
    if not checked:
        raise EvaluationError(f"{caller}: expected at least one batch of token ids, got none. Give some batches.")
    return checked


def check_model(caller: str, model: nn.Module) -> None:
    """Refuse everything but an uncompiled module in eval mode."""
    if not isinstance(model, nn.Module) or is_compiled(model):
        got = "a compiled one" if is_compiled(model) else type(model).__name__
        raise EvaluationError(
            f"{caller}: expected an uncompiled torch.nn.Module, got {got}. Give the original: S2O is compared with it, "
            "and compiles it inside."
        )
    if model.training:
        raise EvaluationError(f"{caller}: expected a model in eval mode, got one in training mode. Call model.eval().")


def check_lengths(caller: str, batches: Sequence[TokenBatch], config: S2OConfig, dtype: torch.dtype) -> None:
    """Refuse batches so short that all attention, in the model's dtype, runs dense."""
    for place, batch in enumerate(batches):
        device, length = batch.ids.device, batch.ids.shape[1]
        shortest = shortest_sparse(config.min_seq_len, device, dtype)
        if length < TILE_LEN:
            raise EvaluationError(
                f"{caller}: expected batches of at least {TILE_LEN} tokens, the queries of one tile, got {length} in "
                f"batch {place + 1}: shorter attention runs dense. Give longer batches."
            )
        never = why_never(length, config.min_seq_len, device, dtype)
        if never:
            raise EvaluationError(f"{caller}: expected some attention to run sparse, got {never}.")
        if length < shortest:
            raise EvaluationError(
                f"{caller}: expected batches of at least {shortest} tokens, got {length} in batch {place + 1}: all "
                f"attention would run dense, by min_seq_len={config.min_seq_len!r} on {device.type}. Give longer "
                f"batches, or S2OConfig(min_seq_len={TILE_LEN})."
            )


def nothing_sparse(caller: str, report: Report) -> EvaluationError:
    """The error to raise where no attention ran sparse, with the reasons."""
    reasons = sorted(set(exact_sites(report, set()).values())) or ["no attention was captured"]
    return EvaluationError(
        f"{caller}: expected some attention to run sparse, got none of {len(report.sites)}: {'; '.join(reasons)}. "
        "s2o_compile.explain(model, *inputs) lists them."
    )


def exact_sites(report: Report, sparse: set[str]) -> dict[str, str]:
    """Sites that did not run sparse, and why."""
    by_path = {
        "": "did not run",
        "dense": "ran dense",
        "window": "a sliding window, which is computed exactly",
        "masked": "ran dense, under its mask",
    }
    left = [site for site in report.sites if site.name not in sparse]
    return {site.name: by_path.get(site.path, site.path) if site.rewritten else site.reason for site in left}
