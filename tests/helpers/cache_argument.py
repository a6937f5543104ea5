"""The name that transformers gives the argument of a cache: ``past_key_values``, from 5.24 on ``cache``."""

import inspect

import transformers

CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
)
