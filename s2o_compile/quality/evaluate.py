"""``evaluate``: measures the cost of sparse attention on the user's own model and text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from s2o_compile.api import watched
from s2o_compile.capture.compiled_copy import compiled_copy
from s2o_compile.config import S2OConfig, config_or_default
from s2o_compile.errors import EvaluationError
from s2o_compile.kernels.observe import Observer, observe_attention
from s2o_compile.kernels.support.errors import warn
from s2o_compile.kernels.support.torch_compat import dtype_of
from s2o_compile.quality.batches import (
    Batch,
    Progress,
    TokenBatch,
    check_lengths,
    check_model,
    exact_sites,
    nothing_sparse,
    token_batches,
)
from s2o_compile.quality.evaluation import Evaluation
from s2o_compile.quality.logits import Logits, LogitsReader
from s2o_compile.quality.needles import NEEDLE_LEN, NEEDLES, NeedleRecall, hide_needles
from s2o_compile.quality.next_token import NextToken
from s2o_compile.quality.site_quality import SiteMeter


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    config: S2OConfig | None = None,
    *,
    needles: bool = True,
    taus: Sequence[float] = (),
    seed: int = 0,
    progress: Progress | None = None,
    planted: bool | None = None,
) -> Evaluation:
    """Run a causal language model densely and through S2O on the same tokens, and compare.

    Every attention that runs sparse gets its density, and the error of its output against exact attention on the same
    inputs. These inputs come from the sparse layers before it. The model gets next-token loss, agreement of the best
    prediction, and KL divergence. With ``needles``, every batch is read once more with random strings in its first half
    that return in its second half. The loss on the repeats says whether far tokens are still found.

    Each batch is read densely and through S2O, with ``needles`` twice. Each sparse call of the first reading is
    followed by an exact one, and by one for each of ``taus``. Nothing is compiled behind the passes, whatever the
    configuration's inner backend, so that only attention differs. Dynamo is reset: code compiled before is compiled
    anew at its next call.

    Of a causal model of transformers both last hidden states [B, N, H] are held. Logits are made from them in pieces of
    64 MiB in float32. The model's first tokens show that this gives its own logits. Other models are read whole: both
    logits [B, N, vocabulary] are held in the model's dtype, with a `WholeLogitsWarning` from 1 GiB on.

    Args:
        model: In eval mode, not compiled. It is called with token ids [B, N], or with the items of a mapping, and
            returns logits [B, N, vocabulary], or an object that has them as ``.logits`` (any causal model of
            transformers).
        batches: Token ids int64 [B, N], or mappings of the model's keyword inputs with such ``input_ids``; one or more.
            Tokens that an ``attention_mask`` [B, N] hides are not counted. They are moved to the model's device.
        config: Quality and implementation; None for the defaults.
        needles: Whether to read needles, which takes at least 1920 tokens a batch and no padding.
        taus: Further taus at which every attention is measured on its inputs, for a curve of error against density.
        seed: Seed of the needles.
        progress: Called with the name of every step; returns a context manager around it.
        planted: The old name of ``needles``.

    Raises:
        OptionError: The configuration is no S2OConfig.
        EvaluationError: Nothing would run sparse, or the model or a batch cannot be used.
    """
    if planted is not None:
        warn("planted is now called needles; the old name will go.", DeprecationWarning)
        needles = planted
    config, progress = config_or_default(config, "evaluate"), progress or nullcontext
    check_model("evaluate", model)
    checked = token_batches("evaluate", model, batches)
    check_lengths("evaluate", checked, config, dtype_of(model))
    haystacks = [hide_needles(batch.ids, seed=seed + place) for place, batch in enumerate(checked) if needles]
    if needles and not all(batch.real.all() for batch in checked):
        raise EvaluationError(
            "evaluate: expected batches without padding, to hide needles in, got an attention_mask with zeros. Give "
            "unpadded batches, or needles=False."
        )
    meter, next_token, repeats, firsts = SiteMeter(taus), NextToken(), NextToken(), NextToken()
    with watched(config) as watch, LogitsReader("evaluate", model, checked[0]) as reader:
        sparse_model = compiled_copy(model, watch.backend)

        def read(batch: TokenBatch, name: str, observer: Observer) -> tuple[Logits, Logits]:
            with progress(f"{name}: S2O"), observe_attention(observer):
                sparse = reader.read(sparse_model, batch)
            if not meter.seen:
                raise nothing_sparse("evaluate", watch.recording.report)
            with progress(f"{name}: dense"), observe_attention(lambda call: call.exact()):
                return reader.read(model, batch), sparse

        for place, batch in enumerate(checked):
            name = f"batch {place + 1} of {len(checked)}"
            next_token.add(*read(batch, name, meter), batch.ids, batch.counted)
            if needles:
                haystack = haystacks[place]
                logits = read(replace(batch, ids=haystack.ids), f"{name}, with needles", lambda call: None)
                repeats.add(*logits, haystack.ids, haystack.repeated)
                firsts.add(*logits, haystack.ids, haystack.first)
                del logits  # before the next are made
        sites = meter.sites()
        left_exact = exact_sites(watch.recording.report, {site.name for site in sites})
    recall = NeedleRecall(
        count=NEEDLES,
        length=NEEDLE_LEN,
        loss_dense=repeats.mean("loss_dense"),
        loss_s2o=repeats.mean("loss_s2o"),
        loss_first=firsts.mean("loss_dense"),
    )
    return Evaluation(
        model=model_name(model),
        device=device_name(checked[0].ids.device),
        config=config,
        lengths=tuple(batch.ids.shape[1] for batch in checked for _ in batch.ids),
        tokens=next_token.tokens,
        loss_dense=next_token.mean("loss_dense"),
        loss_s2o=next_token.mean("loss_s2o"),
        top1_agreement=next_token.mean("agreed"),
        kl=next_token.mean("kl"),
        sites=sites,
        exact_sites=left_exact,
        needles=recall if needles else None,
        dtype=dtype_name(model),
    )


def model_name(model: nn.Module) -> str:
    """A model's name in reports: of its folder or hub, else of its class."""
    return getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__


def dtype_name(model: nn.Module) -> str:
    """The dtype of a model's first parameter in reports, empty if it has none."""
    return next((str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()), "")


def device_name(device: torch.device) -> str:
    """A device's name in reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
