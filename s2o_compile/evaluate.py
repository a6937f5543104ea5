"""``evaluate``: what sparse attention costs on the user's own model and text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from s2o_compile.api import watched
from s2o_compile.compiled_copy import compiled_copy
from s2o_compile.config import S2OConfig
from s2o_compile.errors import EvaluationError
from s2o_compile.evaluation import Evaluation
from s2o_compile.kernels.observation import Observer, observe_attention
from s2o_compile.kernels.plan import TILE_LEN
from s2o_compile.kernels.tuned import crossover
from s2o_compile.next_token import NextToken
from s2o_compile.planted import STRING_LEN, STRINGS, PlantedRecall, plant
from s2o_compile.report import Report
from s2o_compile.site_quality import SiteMeter

Batch = Tensor | Mapping[str, Tensor]
Progress = Callable[[str], AbstractContextManager[object]]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    config: S2OConfig | None = None,
    *,
    planted: bool = True,
    taus: Sequence[float] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Run a causal language model densely and through S2O on the same tokens, and compare.

    Of every attention that runs sparse: density, and the error of its output against exact attention on the same
    inputs, which are those that sparse layers before it really give. Of the model: next-token loss, agreement of the
    best prediction, KL divergence. With ``planted``, every batch is read once more with random strings in its first
    half that return in its second, and the loss on the repeats says whether far tokens are still found.

    Each batch is read densely and through S2O, with ``planted`` twice; each sparse call of the first reading is
    followed by an exact one, and by one for each of ``taus``. Nothing is compiled behind the passes, whatever the
    configuration's inner backend: attention is what differs. Both logits [B, N, vocabulary] are held in the model's
    dtype. Dynamo is reset: code compiled before is compiled anew at its next call.

    Args:
        model: In eval mode, not compiled. It is called with token ids [B, N], or with the items of a mapping, and
            returns logits [B, N, vocabulary], or an object that has them as ``.logits`` (any causal model of
            transformers).
        batches: Token ids int64 [B, N], or mappings of the model's keyword inputs with such ``input_ids``; one or more.
            Tokens that an ``attention_mask`` [B, N] hides are not counted. They are moved to the model's device.
        config: Quality and implementation; None for the defaults.
        planted: Whether to plant strings, which takes at least 1920 tokens a batch and no padding.
        taus: Further taus at which every attention is measured on its inputs, for a curve of error against density.
        seed: Of the planted strings.
        progress: Called with the name of every step; returns a context manager around it.

    Raises:
        EvaluationError: Nothing would run sparse, or the model or a batch is not what is expected.
    """
    config, progress = config or S2OConfig(), progress or nullcontext
    _check_model(model)
    texts = _texts(model, batches)
    _check_lengths(texts, config)
    planted_texts = [plant(text.ids, seed=seed + place) for place, text in enumerate(texts) if planted]
    if planted and not all(text.real.all() for text in texts):
        raise EvaluationError(
            "evaluate: expected batches without padding, to plant strings in, got an attention_mask with zeros. Give "
            "unpadded batches, or planted=False."
        )
    meter, next_token, repeats, firsts = SiteMeter(taus), NextToken(), NextToken(), NextToken()
    with watched(config) as watch:
        sparse_model = compiled_copy(model, watch.backend)

        def read(text: _Text, name: str, observer: Observer) -> tuple[Tensor, Tensor]:
            with progress(f"{name}: S2O"), observe_attention(observer):
                sparse = text.logits(sparse_model)
            if not meter.seen:
                raise _nothing_sparse(watch.recording.report)
            with progress(f"{name}: dense"), observe_attention(lambda call: call.exact()):
                return text.logits(model), sparse

        for place, text in enumerate(texts):
            name = f"batch {place + 1} of {len(texts)}"
            next_token.add(*read(text, name, meter), text.ids, text.counted)
            if planted:
                strings = planted_texts[place]
                logits = read(replace(text, ids=strings.ids), f"{name}, strings planted", lambda call: None)
                repeats.add(*logits, strings.ids, strings.repeated)
                firsts.add(*logits, strings.ids, strings.first)
                del logits  # before the next are made
        sites = meter.sites()
        exact_sites = _exact_sites(watch.recording.report, {site.name for site in sites})
    recall = PlantedRecall(
        strings=STRINGS,
        string_len=STRING_LEN,
        loss_dense=repeats.mean("loss_dense"),
        loss_s2o=repeats.mean("loss_s2o"),
        loss_first=firsts.mean("loss_dense"),
    )
    return Evaluation(
        model=getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__,
        device=_device_name(texts[0].ids.device),
        config=config,
        lengths=tuple(text.ids.shape[1] for text in texts for _ in text.ids),
        tokens=next_token.tokens,
        loss_dense=next_token.mean("loss_dense"),
        loss_s2o=next_token.mean("loss_s2o"),
        top1_agreement=next_token.mean("agreed"),
        kl=next_token.mean("kl"),
        sites=sites,
        exact_sites=exact_sites,
        planted=recall if planted else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A batch: token ids [B, N], and the other keyword inputs; None if the model takes ids alone, by position."""

    ids: Tensor
    keywords: Mapping[str, Tensor] | None

    @property
    def real(self) -> Tensor:
        """Bool [B, N]: no padding."""
        mask = (self.keywords or {}).get("attention_mask")
        return torch.ones_like(self.ids, dtype=torch.bool) if mask is None else mask.bool()

    @property
    def counted(self) -> Tensor:
        """Bool [B, N]: tokens that a token before them predicts."""
        real = self.real
        return real & real.roll(1, 1)

    def logits(self, model: nn.Module) -> Tensor:
        """The model's logits [B, N, V]."""
        options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        if self.keywords is None:
            output = model(self.ids, **options)
        else:
            output = model(input_ids=self.ids, **{**self.keywords, **options})
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != self.ids.shape:
            got = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
            batch, length = self.ids.shape
            raise EvaluationError(
                f"evaluate: expected logits [{batch}, {length}, vocabulary], or an object with such .logits, from the "
                f"model, got {got}. Wrap the model in a module that returns its logits."
            )
        return logits


def _texts(model: nn.Module, batches: Batch | Iterable[Batch]) -> list[_Text]:
    """The batches on the model's device, checked."""
    device = next((parameter.device for parameter in model.parameters()), None)
    listed: list[Batch] = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)  # pyright: ignore
    texts = []
    for batch in listed:
        keywords = {name: x.to(device) for name, x in batch.items()} if isinstance(batch, Mapping) else None
        ids = batch if keywords is None else keywords.pop("input_ids", None)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"{type(batch).__name__} without"
            raise EvaluationError(
                f"evaluate: expected batches of token ids int64 [B, N], or mappings with input_ids, got {got}. Give "
                "what a tokenizer returns with return_tensors='pt'."
            )
        text = _Text(ids=ids.to(device), keywords=keywords)
        if text.real.shape != ids.shape:
            raise EvaluationError(
                f"evaluate: expected an attention_mask {tuple(ids.shape)}, as input_ids, got {tuple(text.real.shape)}. "
                "Give the tokenizer's."
            )
        texts.append(text)
    if not texts:
        raise EvaluationError("evaluate: expected at least one batch of token ids, got none. Give some text to read.")
    return texts


def _check_model(model: nn.Module) -> None:
    compiled = isinstance(model, torch._dynamo.OptimizedModule) or getattr(model, "_compiled_call_impl", None)
    if not isinstance(model, nn.Module) or compiled:
        got = "a compiled one" if compiled else type(model).__name__
        raise EvaluationError(
            f"evaluate: expected an uncompiled torch.nn.Module, got {got}. Give the original: it is what S2O is "
            "compared with, and it is compiled inside."
        )
    if model.training:
        raise EvaluationError("evaluate: expected a model in eval mode, got one in training mode. Call model.eval().")


def _check_lengths(texts: Sequence[_Text], config: S2OConfig) -> None:
    """Refuse batches so short that all attention runs dense."""
    for place, text in enumerate(texts):
        device, length = text.ids.device, text.ids.shape[1]
        shortest = config.min_seq_len if isinstance(config.min_seq_len, int) else crossover(device)
        shortest = max(shortest, TILE_LEN)
        if length < shortest:
            raise EvaluationError(
                f"evaluate: expected batches of at least {shortest} tokens, got {length} in batch {place + 1}: all "
                f"attention would run dense, by min_seq_len={config.min_seq_len!r} on {device.type}. Give longer "
                f"batches, or S2OConfig(min_seq_len={TILE_LEN})."
            )


def _nothing_sparse(report: Report) -> EvaluationError:
    reasons = sorted(set(_exact_sites(report, set()).values())) or ["no attention was captured"]
    return EvaluationError(
        f"evaluate: expected some attention to run sparse, got none of {len(report.sites)}: {'; '.join(reasons)}. "
        "s2o_compile.explain(model, *inputs) lists them."
    )


def _exact_sites(report: Report, sparse: set[str]) -> dict[str, str]:
    """Sites that did not run sparse, and why."""
    by_path = {
        "": "did not run",
        "dense": "ran dense",
        "window": "a sliding window, which is computed exactly",
        "masked": "ran dense, under its mask",
    }
    left = [site for site in report.sites if site.name not in sparse]
    return {site.name: by_path.get(site.path, site.path) if site.rewritten else site.reason for site in left}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
