"""The attention implementation "s2o" of transformers: the mask interface and the attention interface."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from types import ModuleType
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

import s2o_compile.kernels.ops  # noqa: F401  (defines torch.ops.s2o)
from s2o_compile.config import S2OConfig, config_or_default, unknown_name
from s2o_compile.errors import AttentionImplementationWarning, InputError, UnknownSiteWarning
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.shards import held_sequence
from s2o_compile.kernels.core.validation import check_whole, sizes_of
from s2o_compile.kernels.dispatch import is_short, warn_of_derivatives
from s2o_compile.kernels.statistics import record, recording
from s2o_compile.kernels.support.derivatives import every_derivative, is_differentiated
from s2o_compile.kernels.support.errors import warn
from s2o_compile.kernels.support.torch_compile import names_of_modules
from s2o_compile.transformers.lazy_mask import LazyMask
from s2o_compile.transformers.mask_functions import ProvenMask
from s2o_compile.transformers.site_names import name_of
from s2o_compile.transformers.tensor_parallel import of_rank

logger = logging.get_logger(__name__)

NAME = "s2o"
"""The attention implementation."""

_SITE = "_s2o_site"
# A sliding window is in the mask already, whatever a model passes beside it.
_KNOWN = frozenset({"softcap", "s_aux", "sliding_window"})
_SDPA_ONLY = ("position_bias", "cache")
# Which keys sparse models choose; some pass them only to implementations that are neither "eager" nor "sdpa".
_CHOSEN_KEYS = frozenset({"indices", "block_indices"})


@dataclass(frozen=True)
class _Site:
    """Settings that `configure` leaves on a module."""

    name: str
    min_seq_len: int | str
    read_masks: bool
    options: dict[str, Any]


_default_sites: WeakKeyDictionary[nn.Module, _Site] = WeakKeyDictionary()


def configure(model: nn.Module, config: S2OConfig | None = None) -> None:
    """Says how the attentions of a model are made sparse, and names them as ``explain`` does.

    Without it the defaults hold, and an attention is named by its path in the outermost module of its first call. The
    fields about compiled graphs (``inner_backend``, ``assume_*``, ``check_assumptions``) change nothing here.

    Args:
        model: A model of transformers with the attention implementation "s2o"; an `AttentionImplementationWarning`
            says if it has another. Call it again to change the configuration.
        config: Quality and implementation; None for the defaults.

    Raises:
        OptionError: The configuration is no S2OConfig.
    """
    config = config_or_default(config, "configure")
    names = names_of_modules(model)
    chosen = {name for module in names for name in _implementations(module)}
    if chosen and NAME not in chosen:
        warn(
            f'configure: expected a model with the attention implementation "{NAME}", got '
            f"{' and '.join(sorted(map(repr, chosen)))}, so nothing of it runs through S2O. Call "
            f'model.set_attn_implementation("{NAME}").',
            AttentionImplementationWarning,
        )
    for field in ("dense_heads", "site_tau"):
        for site in getattr(config, field):
            if _module_of(site) not in names.values():
                near = [name for name in names.values() if name.endswith(("attn", "attention"))]
                warn(f"{field}: {unknown_name('site', site, near)}", UnknownSiteWarning)
    for module, name in names.items():
        object.__setattr__(module, _SITE, _site(name, config))


def s2o_mask(**arguments: Any) -> Tensor | None:  # noqa: ANN401 (whatever this version of transformers passes)
    """The mask interface: a `LazyMask` for a prefill, transformers' own mask for decode and for traced code.

    Models with "sdpa" get bool masks, as from "sdpa". Other models may do arithmetic with their masks, or pass none and
    mean none, so they get the masks of "eager".
    """
    modeling = type(arguments.get("config")).__module__.replace(".configuration_", ".modeling_")
    make, dtype = (sdpa_mask, torch.bool) if _has_sdpa(modeling) else (eager_mask, arguments.get("dtype"))
    if arguments["q_length"] == 1 or any(is_tracing(arguments.get(name)) for name in ("attention_mask", "q_offset")):
        return make(**arguments)
    arguments.pop("config", None)  # neither maker reads it, and it may change
    return LazyMask(make, arguments, dtype or torch.float32)


def s2o_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,  # noqa: ANN401 (whatever models pass)
) -> tuple[Tensor, None]:
    """The attention interface.

    Args:
        module: The attention.
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        attention_mask: The result of `s2o_mask`, or a user's mask of rank 4. None means ``is_causal``, and no mask in
            models without "sdpa".
        dropout: Of the attention weights.
        scaling: Softmax scale, None for ``D ** -0.5``.
        is_causal: Whether no mask means causal; None asks the module.
        softcap: Bound of the logits.
        s_aux: Sinks, [Hq].
        **kwargs: Whatever else the model passes, read as transformers' "sdpa" reads it.

    Returns:
        [B, Nq, Hq, Dv], and None for the weights.

    Raises:
        InputError: The model passes an argument of its own attention that neither this nor "sdpa" has.
    """
    given = [name for name in _others(type(module).__module__) if kwargs.get(name) is not None]
    if given:
        raise InputError(
            f"argument of {type(module).__name__}",
            expected="an attention that SDPA computes, with softcap or sinks at most",
            got=", ".join(given),
            remedy='Choose model.set_attn_implementation("eager") or "sdpa" for this model.',
        )
    if kwargs.get("output_attentions"):
        logger.warning_once('"s2o" makes no attention weights: choose attn_implementation="eager" to read them.')
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    is_causal = is_causal and _has_sdpa(type(module).__module__)
    if isinstance(attention_mask, LazyMask) and attention_mask.holds:
        is_causal = attention_mask.skips_to_causal
        if not _describes(attention_mask, query, key):
            attention_mask = attention_mask.or_none  # of other sizes: as for "sdpa"
    if not is_tracing(query) and not dropout and all(kwargs.get(name) is None for name in _SDPA_ONLY):
        output = _sparse(module, query, key, value, attention_mask, scaling, is_causal, softcap, s_aux)
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
    if not is_tracing(query):
        check_whole()  # a shard of the keys is no operand of SDPA, however few there are
    mask = attention_mask.or_none if _describes(attention_mask, query, key) else attention_mask
    if softcap is None and s_aux is None:
        with every_derivative():
            return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal, **kwargs)
    if mask is None:
        seen = AttentionMask(causal=is_causal and query.shape[2] > 1)
        mask = seen.visible_pairs(query.shape[2], key.shape[2], query.device)
    output = _written_out(query, key, value, mask, scaling, softcap, s_aux, dropout)
    return output.transpose(1, 2).contiguous(), None


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None,
    sinks: Tensor | None, dropout: float,
) -> Tensor:  # fmt: skip
    """The output [B, Hq, Nq, Dv] that SDPA has no arguments for, as models write it out and the passes know it."""
    check_whole()
    n_keys = key.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype is torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    weights = weights if sinks is None else weights[..., :n_keys]
    return torch.nn.functional.dropout(weights, dropout) @ value


def _sparse(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | AttentionMask | None,
    scale: float | None, is_causal: bool, softcap: float | None, sinks: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """The operator's output [B, Hq, Nq, Dv]; None for a call that is short, or none of the operator's."""
    if torch.is_autocast_enabled(query.device.type):  # as SDPA does
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    learned = mask if isinstance(mask, Tensor) else None
    fits = sizes_of(query, key, value) is not None and isinstance(scale, int | float | None)
    if not fits:
        return None
    site = getattr(module, _SITE, None) or _default_site(module)
    if is_differentiated(query, key, value, sinks, learned):
        warn_of_derivatives(query, key, site.min_seq_len)
        return None
    if held_sequence() is None and is_short(query, query.shape[2], key.shape[2], site.min_seq_len):
        if recording():
            record(AttentionCall(query=query, key=key, value=value, scale=1.0, site=site.name), "dense")
        return None
    fully_masked, documents = "zeros", None
    if _describes(mask, query, key):
        proven, fully_masked = mask.proven, mask.fully_masked
        mask, documents = (proven.mask, proven.documents) if isinstance(proven, ProvenMask) else (mask.or_none, None)
    if mask is None:  # aligned to the top left, as SDPA's is_causal
        mask = AttentionMask(causal=is_causal)
    options = of_rank(site.options, module, query.shape[1], key.shape[1])
    shared = {"scale": scale, "softcap": softcap, "site": site.name, **options}
    if not isinstance(mask, AttentionMask):
        return torch.ops.s2o.masked_attention(query, key, value, mask, sinks, **shared)[0] if site.read_masks else None
    shared |= {"causal": mask.causal, "causal_offset": mask.offset, "window": mask.window, "fully_masked": fully_masked}
    if documents is not None:
        ids = documents.query_ids, None if documents.of_itself else documents.key_ids
        ids = (None if x is None else x.to(query.device) for x in ids)
        return torch.ops.s2o.packed_attention(query, key, value, *ids, mask.key_mask, sinks, **shared)[0]
    chunk = mask.attention_chunk
    return torch.ops.s2o.attention(query, key, value, mask.key_mask, sinks, attention_chunk=chunk, **shared)[0]


def _describes(mask: object, query: Tensor, key: Tensor) -> TypeGuard[LazyMask]:
    """Whether a mask is one of ours, for these queries and keys, and nobody wrote into it."""
    return isinstance(mask, LazyMask) and mask.shape[2:] == (query.shape[2], key.shape[2]) and mask.holds


@torch.compiler.assume_constant_result
@lru_cache
def _others(modeling: str) -> tuple[str, ...]:
    """Arguments that the attention written out in a file of models has, and neither this one nor "sdpa"."""
    own = getattr(sys.modules.get(modeling), "eager_attention_forward", sdpa_attention_forward)
    given, known = (inspect.signature(function).parameters.keys() for function in (own, sdpa_attention_forward))
    return tuple(sorted(_CHOSEN_KEYS | (given - known - _KNOWN)))


@torch.compiler.assume_constant_result
def _has_sdpa(modeling: str) -> bool:
    """Whether all models of a file say that SDPA may stand in for the attention that they write out."""
    return modeling in sys.modules and _all_have_sdpa(sys.modules[modeling])


@lru_cache
def _all_have_sdpa(modeling: ModuleType) -> bool:
    classes = [x for x in vars(modeling).values() if isinstance(x, type) and x.__module__ == modeling.__name__]
    models = [x for x in classes if issubclass(x, PreTrainedModel)]
    return bool(models) and all(model._supports_sdpa for model in models)


def _implementations(module: nn.Module) -> tuple[str, ...]:
    """The attention implementation of a model of transformers; none for a part of one."""
    chosen = getattr(module.config, "_attn_implementation", None) if isinstance(module, PreTrainedModel) else None
    return (chosen,) if isinstance(chosen, str) else ()


def _module_of(site: str) -> str:
    """The module of a site: one that attends several times is ``attn`` and ``attn#2`` in a graph."""
    return site.partition("#")[0]


def _default_site(module: nn.Module) -> _Site:
    """The settings of a module that nobody configured."""
    if module not in _default_sites:
        _default_sites[module] = _site(name_of(module), S2OConfig())
    return _default_sites[module]


def _site(name: str, config: S2OConfig) -> _Site:
    """A module's settings: the strictest of its sites', because calls of one module are not told apart here."""
    marked, taus = (
        [numbers for site, numbers in by_site.items() if _module_of(site) == name]
        for by_site in (config.dense_heads, config.site_tau)
    )
    if marked or taus:
        heads, least = chain.from_iterable(marked), map(min, zip(*taus, strict=False))
        config = replace(config, dense_heads={name: tuple(heads)}, site_tau={name: tuple(least)})
    return _Site(name, config.min_seq_len, config.read_masks, config.operator_options(name))


AttentionInterface.register(NAME, s2o_attention_forward)
AttentionMaskInterface.register(NAME, s2o_mask)
