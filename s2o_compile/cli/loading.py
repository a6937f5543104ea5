"""Models and tokenizers that transformers reads: whole, or one error that names the folder and the cause.

transformers only warns where weights are missing or of another shape, and fills them with random numbers. A measurement
of such a model says nothing, so it is refused.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2o_compile.errors import LoadingError, OptionError, S2OError, UnusedWeightsWarning
from s2o_compile.kernels.support.arguments import shown
from s2o_compile.kernels.support.errors import warn

NAMED = 3
"""Weights that a message names; it counts the others."""

HUB_SECONDS = 5
"""For the hub's answer to the question whether it has a model."""

LONGEST_CAUSE = 240
"""Characters of the cause in a message."""


@contextlib.contextmanager
def loading(source: str, remedy: str, what: str = "a model that can be loaded") -> Iterator[None]:
    """Turn whatever is raised inside into one LoadingError that names the source. Keep code of this project outside."""
    try:
        yield
    except S2OError:
        raise
    except Exception as error:  # transformers, safetensors, gguf, tokenizers and pickle raise whatever they like
        cause = shorten_cause(error)
        kind = "" if isinstance(error, (OSError, ValueError)) and str(error) else f"{type(error).__name__}: "
        raise LoadingError(f"{source}: expected {what}, got {kind}{cause}. {remedy}") from error


TOKENIZER_FILES = re.compile(r"token|vocab|merges|spiece|spm|bpe|\.(?:model|tiktoken|jinja)$")
"""What is in the name of a file that tokenizers of transformers are saved in."""


def check_tokenizer(source: str, model: str) -> None:
    """Refuse a folder without a tokenizer, of which transformers says in four lines what it may lack.

    Raises:
        LoadingError: No file of it can be a tokenizer's.
    """
    folder = Path(model)
    if folder.is_dir() and not any(TOKENIZER_FILES.search(file.name) for file in folder.iterdir()):
        raise LoadingError(
            f"{source}: expected a tokenizer beside the model, got none. Save it there "
            f"(tokenizer.save_pretrained({shown(model)})). `s2o explain` and `s2o bench` need none."
        )


def find_model(source: str, model: str, remedy: str) -> dict[str, Any]:
    """Where a model is, as keywords of every ``from_pretrained``: a path, a name that the hub has, or one of its cache.

    The hub is asked once, briefly. Left to itself transformers asks for half a minute where there is no network.

    Raises:
        LoadingError: There is no such path, the cache has no such name, and no hub answers.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    where: dict[str, Any] = {"pretrained_model_name_or_path": model}
    if Path(model).exists():
        return where
    try:
        cached = try_to_load_from_cache(model, "config.json")
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=HUB_SECONDS)
    except HFValidationError:  # no name that the hub could have
        got = "no such folder"
    except HfHubHTTPError:  # it answers: transformers says what it said
        return where
    except Exception as error:  # every version has its own errors for no network, a slow one, and offline mode
        if isinstance(cached, str):
            return where | {"local_files_only": True}
        got = f"no such folder, no such name in the hub's cache here, and no answer of the hub ({shorten_cause(error)})"
    else:
        return where
    raise LoadingError(f"{source}: expected a model that can be loaded, got {got}. {remedy}")


def positions_of(model: Any) -> dict[str, int]:  # noqa: ANN401 (a transformers model)
    """The numbers of positions that a model's configuration names for its text."""
    config = getattr(model, "config", None)
    fields = {} if config is None else vars(config.get_text_config())
    return {name: x for name, x in fields.items() if "position" in name and isinstance(x, int) and x > 1}


@torch.no_grad()
def check_reads(model: Any, ids: Tensor) -> None:  # noqa: ANN401 (a transformers model)
    """Try a model on more tokens than it has positions, which some read all the same.

    Raises:
        OptionError: It fails on them.
    """
    tokens = ids.shape[1]
    most = {name: x for name, x in positions_of(model).items() if x < tokens}
    if not most:
        return
    try:
        model(ids)
    except Exception as error:  # whatever a model raises there
        name = min(most, key=most.__getitem__)
        raise OptionError(
            f"--tokens: expected at most {most[name]}, the {name} of {type(model).__name__}, got {tokens}, on which it "
            f"fails ({type(error).__name__}: {shorten_cause(error)}). Choose fewer."
        ) from error


def shorten_cause(error: Exception) -> str:
    """What an exception says, in one line that is not too long."""
    cause = " ".join(str(error).split()).rstrip(".")
    return cause if len(cause) <= LONGEST_CAUSE else f"{cause[:LONGEST_CAUSE]} ..."


def check_causal(source: str, config: object) -> None:
    """Refuse a model that reads no token ids, or predicts no next one.

    Raises:
        LoadingError: transformers has no causal language model for this configuration.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise LoadingError(
            f"{source}: expected a causal language model, got a {type(config).__name__}, for which transformers has "
            "none. `s2o explain` and `s2o bench` take any model of transformers."
        )


def any_class(config: Any) -> Any:  # noqa: ANN401 (a transformers configuration)
    """The class of transformers that a model was saved from, or the likeliest for its configuration."""
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    for name in config.architectures or ():
        kind = getattr(transformers, str(name), None)
        if hasattr(kind, "from_pretrained"):
            return kind
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModel
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return transformers.AutoModelForMaskedLM  # an encoder, of which transformers makes decoders, too
    return transformers.AutoModelForCausalLM


def load_weights(source: str, remedy: str, kind: Any, **where: Any) -> Any:  # noqa: ANN401 (of transformers)
    """A model in eval mode, every weight of which was read; ``where`` goes to the class's ``from_pretrained``.

    Raises:
        LoadingError: It cannot be loaded, or weights are missing or of another shape.
    """
    with loading(source, remedy), _quietly():
        # Mismatched weights are refused below, and named there.
        read: Any = kind.from_pretrained(**where, output_loading_info=True, ignore_mismatched_sizes=True)
    model, found = read
    # Weights that are tied to others, or that the architecture declares to be optional, are not among the missing.
    if found["missing_keys"]:
        got = f"none for {_some(found['missing_keys'])}"
        raise LoadingError(f"{source}: expected a weight for each parameter of the model, got {got}. {remedy}")
    if found["mismatched_keys"]:
        wrong = [f"{name} {list(stored)} for {list(wanted)}" for name, stored, wanted in found["mismatched_keys"]]
        raise LoadingError(f"{source}: expected weights of the model's shapes, got {_some(wrong)}. {remedy}")
    if found["unexpected_keys"]:
        warn(
            f"{source}: the model of the configuration has no {_some(found['unexpected_keys'])}. They are left out.",
            UnusedWeightsWarning,
        )
    return model.eval()


def _some(names: Collection[str]) -> str:
    shown_names = ", ".join(shown(name)[1:-1] for name in sorted(names)[:NAMED])
    left = len(names) - NAMED
    return shown_names if left <= 0 else f"{shown_names} and {left} more"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' own report and bars, because `load_weights` reports missing weights."""
    from transformers import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
