"""generate() with a static cache: the prefill's mask is built inside the graph, where it can be proven.

With a cache that can be compiled, ``generate`` builds the 4-D masks ahead of the forward, by the model's own
``create_masks_for_generate`` or by transformers' function of that name. They enter the graph as inputs and cannot be
proven. An optimized model postpones that call: for a prefill it returns the call's arguments, and its compiled frame
makes the call. The same function makes the same masks, but the graph shows how.

A static cache counts its tokens in a tensor, whose value cannot be proven either. If it already holds tokens (a second
turn, chunked prefill), their number is read once ahead of the forward and enters the graph as a size.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.support.torch_compile import mark_dynamic

PREPARE = "_s2o_arguments"
"""The method of an optimized module that changes the keyword arguments of a call, inside its compiled frame."""

_HOOK = "create_masks_for_generate"
_MARK = "inputs_embeds"  # an argument of the call; dicts of finished masks have layer types for keys
_FILLED = "filled"  # a tensor with two rows more than the cache has tokens: graphs specialise on sizes of 0 and 1
_FIRST = "is_first_iteration"  # generate keeps tensors and None in a dict: a tensor for True
_OPERANDS = ("attention_mask", "decoder_attention_mask")


def mask_methods(base: type) -> dict[str, object]:
    """The methods by which an optimized model of transformers builds the masks of a prefill in its compiled frame.

    Empty for every other class. A model with a ``generate`` of its own may look into masks between the two, and is left
    alone, too.
    """
    generation = sys.modules.get("transformers.generation.utils")
    function: Callable[..., object] | None = getattr(base, _HOOK, getattr(generation, _HOOK, None))
    plain = getattr(getattr(generation, "GenerationMixin", None), "generate", None)
    if function is None or plain is None or getattr(base, "generate", None) is not plain:
        return {}
    takes_model = isinstance(inspect.getattr_static(base, _HOOK, None), types.FunctionType)
    filled_cache = _filled_cache()

    def build(model: object, **call: Any) -> object:  # noqa: ANN401 (what generate passes)
        return function(model, **call) if takes_model else function(**call)

    def create_masks_for_generate(self: Any, **call: Any) -> object:  # noqa: ANN401 (a model, what generate passes)
        if not _is_prefill(call, self.config):
            return build(self, **call)
        tokens = _tokens(call[name_of_cache(call)])
        return build(self, **call) if tokens is None else _postponed(call, tokens)

    def prepare(self: Any, kwargs: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 (a model, what it accepts)
        for name in _OPERANDS:
            call = kwargs.get(name)
            if isinstance(call, dict) and _MARK in call:
                arguments = {key: value for key, value in call.items() if key not in (_FILLED, _FIRST)}
                cache_name, filled = name_of_cache(kwargs), call.get(_FILLED)
                cache = kwargs[cache_name]
                if filled is not None:
                    cache = filled_cache(cache, filled.shape[0] - 2)
                arguments |= {cache_name: cache, _FIRST: call[_FIRST] is not None}
                kwargs[name] = build(self, config=self.config, **arguments)
        return kwargs

    return {_HOOK: create_masks_for_generate, PREPARE: prepare}


def name_of_cache(values: Mapping[str, Any]) -> str:
    """The name of the cache among arguments or outputs, by its type: versions name it differently. Empty for none."""
    return next((name for name, value in values.items() if is_cache(value)), "")


def is_cache(x: object) -> bool:
    """Whether this is a cache of transformers."""
    kind = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    return kind is not None and isinstance(x, kind)


def _is_prefill(call: dict[str, Any], config: object) -> bool:
    """Whether the masks are those of several queries, made of arguments that the forward can repeat."""
    others = {name for name, value in call.items() if value is not None and not isinstance(value, Tensor)}
    queries = call.get(_MARK)
    return (
        others == {"config", name_of_cache(call), _FIRST}
        and call["config"] is config
        and isinstance(call[_FIRST], bool)
        and isinstance(queries, Tensor)
        and queries.shape[1] > 1
        and not torch.compiler.is_dynamo_compiling()
    )


def _tokens(cache: Any) -> int | None:  # noqa: ANN401 (a cache of transformers)
    """How many tokens a cache holds: 0 if it is not allocated yet, None if its layers do not say, or not the same."""
    if not _is_allocated(cache):
        return 0
    caches = sys.modules["transformers.cache_utils"]
    if type(cache) is not caches.StaticCache:
        return None
    if any(type(layer) not in (caches.StaticLayer, caches.StaticSlidingWindowLayer) for layer in cache.layers):
        return None
    lengths = {int(layer.get_seq_length()) for layer in cache.layers}
    return lengths.pop() if len(lengths) == 1 else None


def _is_allocated(cache: Any) -> bool:  # noqa: ANN401 (a cache of transformers)
    """Whether a cache has memory; that of an encoder-decoder has no layers itself, and masks go by its own tokens."""
    return getattr(cache, "self_attention_cache", cache).is_initialized


def _postponed(call: dict[str, Any], tokens: int) -> dict[str, Tensor | None]:
    """Copies of the arguments for the forward: the masks stay those of the call, whoever writes into its tensors.

    They are contiguous, as generate's own, so that marks stay with them. Sizes that grow from chunk to chunk are
    dynamic from the start.
    """
    arguments = {
        name: None if value is None else value.clone(memory_format=torch.contiguous_format)
        for name, value in call.items()
        if value is None or isinstance(value, Tensor)
    }
    arguments[_FIRST] = arguments[_MARK] if call[_FIRST] else None
    if not _is_allocated(call[name_of_cache(call)]):
        return arguments
    arguments[_FILLED] = call[_MARK].new_empty(tokens + 2, 0)
    mark_dynamic(arguments[_FILLED], 0)
    if arguments.get("attention_mask") is not None:
        mark_dynamic(arguments["attention_mask"], 1)
    return arguments


def _filled_cache() -> Callable[[Any, int], object]:
    """The class of a static cache whose number of tokens is a size of the graph."""

    class FilledCache(sys.modules["transformers.cache_utils"].Cache):
        def __init__(self, cache: Any, tokens: int) -> None:  # noqa: ANN401 (a cache of transformers)
            self.layers = cache.layers
            self.tokens = tokens

        def get_seq_length(self, layer_idx: int = 0) -> int:
            length = self.layers[layer_idx].get_seq_length()
            return self.tokens if isinstance(length, Tensor) else length

    return FilledCache
