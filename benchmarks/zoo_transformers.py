"""Tiny random models of every architecture that the installed transformers can build, and inputs that they accept."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from benchmarks import zoo_inputs
from benchmarks.zoo_inputs import LENGTH
from benchmarks.zoo_measure import Subject, stir
from benchmarks.zoo_shrink import shrink
from benchmarks.zoo_special import SPECIAL, UNBUILT

PADDED, LARGEST = 23, 200_000_000
# The first family that lists an architecture decides its class: what it was made for comes before what it can also do.
FAMILIES = (
    ("encoder-decoder", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("speech", "SPEECH_SEQ_2_SEQ"),
    ("encoder", "MASKED_LM"),
    ("vision-language", "IMAGE_TEXT_TO_TEXT"),
    ("causal LM", "CAUSAL_LM"),
    ("speech", "CTC"),
    ("speech", "AUDIO_CLASSIFICATION"),
    ("vision", "IMAGE_CLASSIFICATION"),
    ("vision", "VIDEO_CLASSIFICATION"),
    ("vision", "OBJECT_DETECTION"),
    ("vision", "DEPTH_ESTIMATION"),
    ("encoder", "TEXT_ENCODING"),
    ("other", ""),
)
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


class CannotBuildError(Exception):
    """The architecture has no tiny model here; the message says why."""


def architectures() -> dict[str, tuple[str, str]]:
    """Model type -> (kind, class name), of every model type that some Auto class knows."""
    found: dict[str, tuple[str, str]] = {}
    families = [
        (kind, f"MODEL_FOR_{family}_MAPPING_NAMES" if family else "MODEL_MAPPING_NAMES") for kind, family in FAMILIES
    ]
    families += [("other", name) for name in sorted(vars(modeling_auto)) if re.match(r"MODEL_.*_MAPPING_NAMES$", name)]
    for kind, name in families:
        for architecture, classes in getattr(modeling_auto, name).items():
            found.setdefault(architecture, (kind, classes if isinstance(classes, str) else classes[0]))
    return found


def parts() -> list[str]:
    """Model types whose configuration no Auto class knows: parts of other models, and no model of their own."""
    return sorted(set(CONFIG_MAPPING_NAMES) - set(architectures()))


def build(architecture: str, implementation: str, *, fill: bool = False) -> nn.Module:
    """A tiny random model in eval mode; ``fill`` as in `shrink`.

    Raises:
        CannotBuildError: With the reason.
    """
    if architecture in UNBUILT:
        raise CannotBuildError(UNBUILT[architecture])
    if implementation == "flex_attention":
        _without_inductor()
    try:
        kind = getattr(transformers, architectures()[architecture][1])
        configuration = CONFIG_MAPPING[architecture]
        small = configuration(**shrink(configuration().to_dict(), SPECIAL.get(architecture), fill=fill))
        small._attn_implementation = implementation
        torch.manual_seed(0)
        model = kind(small).float().eval()
        _name_tokens(model)
        stir(model)
    except Exception as error:  # a configuration that cannot be shrunk fails in its own way
        text = " ".join(str(error).split())
        raise CannotBuildError(f"{type(error).__name__}: {text[:160]}") from error
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        raise CannotBuildError(f"the shrunk model still has more than {LARGEST // 10**6} million parameters")
    if implementation != getattr(model.config, "_attn_implementation", None):
        raise CannotBuildError(f"has no {implementation} attention")
    return model


def _without_inductor() -> None:
    """The original's flex_attention without the compilation of its own, which g++ rejects for cached lengths."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    WrappedFlexAttention.__call__ = lambda self: flex_attention


def _name_tokens(model: Any) -> None:  # noqa: ANN401 (a transformers model)
    """Tokens that generate wants and that a default configuration may lack."""
    generation = getattr(model, "generation_config", None)
    for name in ("pad_token_id", "bos_token_id", "decoder_start_token_id") if generation else ():
        if getattr(generation, name, None) is None:
            setattr(generation, name, 1)


def supports(architecture: str, implementation: str) -> bool:
    """Whether the class says that it has this attention; eager always is."""
    name = architectures()[architecture][1]
    flag = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}.get(implementation)
    return flag is None or bool(getattr(getattr(transformers, name, None), flag, False))


def subjects(architecture: str, implementation: str) -> Iterator[tuple[str, Subject]]:
    """The cases of one architecture: (name of the case, subject)."""
    plain = _plain(architecture, implementation)
    model: Any = plain.model
    yield "no mask", plain
    inputs = plain.inputs
    if not {"input_ids"} <= inputs.keys() <= {"input_ids", "decoder_input_ids"}:
        return
    left = not architectures()[architecture][0].startswith("encoder")
    mask = _padding(inputs["input_ids"], left=left)
    padded = {**inputs, "attention_mask": mask}
    decoder = "decoder_input_ids" in inputs
    if "attention_mask" in inspect.signature(model.forward).parameters:
        yield "padded", replace(plain, inputs=padded, keep=None if decoder else mask.bool())
    if not decoder and getattr(model, "can_generate", bool)():
        yield "generate", replace(plain, inputs=padded, generate=True)
    elif decoder and getattr(model, "can_generate", bool)():
        padded.pop("decoder_input_ids")
        yield "generate", replace(plain, inputs=padded, generate=True)


def _plain(architecture: str, implementation: str) -> Subject:
    """The case without a mask; the first failure is the one to tell."""
    failure = None
    for fill in (False, True):
        try:
            return zoo_inputs.accepted(build(architecture, implementation, fill=fill))
        except CannotBuildError as error:
            failure = failure or error
        except zoo_inputs.NoInputsError as error:
            failure = failure or CannotBuildError(str(error))
    raise failure or CannotBuildError("not tried")


def _padding(ids: Tensor, *, left: bool) -> Tensor:
    """int64 [B, N]: the first of the batch is shorter."""
    mask = torch.ones_like(ids)
    mask[0, slice(0, PADDED) if left else slice(LENGTH - PADDED, LENGTH)] = 0
    return mask
