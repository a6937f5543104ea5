"""Tiny random models of every architecture that the installed transformers can build, and inputs that they accept."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.zoo_measure import Subject
from benchmarks.zoo_shrink import VOCABULARY, shrink
from benchmarks.zoo_special import SPECIAL, UNBUILT

BATCH, LENGTH, PADDED = 2, 160, 23
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
    """Model type -> (kind, class name)."""
    found: dict[str, tuple[str, str]] = {}
    for kind, family in FAMILIES:
        name = f"MODEL_FOR_{family}_MAPPING_NAMES" if family else "MODEL_MAPPING_NAMES"
        for architecture, classes in getattr(modeling_auto, name).items():
            found.setdefault(architecture, (kind, classes if isinstance(classes, str) else classes[0]))
    return found


def build(architecture: str, implementation: str) -> nn.Module:
    """A tiny random model in eval mode.

    Raises:
        CannotBuildError: With the reason.
    """
    if architecture in UNBUILT:
        raise CannotBuildError(UNBUILT[architecture])
    name = architectures()[architecture][1]
    if implementation == "flex_attention":
        _without_inductor()
    try:
        kind = getattr(transformers, name)
        configuration = CONFIG_MAPPING[architecture]
        small = configuration(**shrink(configuration().to_dict(), SPECIAL.get(architecture)))
        small._attn_implementation = implementation
        torch.manual_seed(0)
        model = kind(small).float().eval()
        _name_tokens(model)
    except Exception as error:  # a configuration that cannot be shrunk fails in its own way
        text = " ".join(str(error).split())
        raise CannotBuildError(f"{type(error).__name__}: {text[:160]}") from error
    if sum(p.numel() for p in model.parameters()) > 50_000_000:
        raise CannotBuildError("the shrunk model still has more than 50 million parameters")
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
    model = build(architecture, implementation)
    plain = _accepted(model)
    yield "no mask", plain
    inputs = plain.inputs
    if "input_ids" not in inputs or plain.note:
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


def _padding(ids: Tensor, *, left: bool) -> Tensor:
    """int64 [B, N]: the first of the batch is shorter."""
    mask = torch.ones_like(ids)
    mask[0, slice(0, PADDED) if left else slice(LENGTH - PADDED, LENGTH)] = 0
    return mask


def _accepted(model: nn.Module) -> Subject:
    """The first of the likely inputs that the model runs with.

    Raises:
        CannotBuildError: With what the last try said.
    """
    reason = "no input fits its signature"
    for note, inputs in _candidates(model):
        subject = Subject(model, inputs, note=note)
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                model(**inputs)
        except Exception as error:  # not the inputs that this model wants
            text = " ".join(str(error).split())
            reason = f"accepts none of the inputs tried; last: {type(error).__name__}: {text[:120]}"
            continue
        return subject
    raise CannotBuildError(reason)


def _candidates(model: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:  # noqa: ANN401 (a transformers model)
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY - 32, (BATCH, LENGTH), generator=generator)
    pixels = _pixels(model.config, generator)
    available = {
        "input_ids": [ids],
        "decoder_input_ids": [ids.flip(1)],
        "pixel_values": pixels,
        "input_features": _features(model.config, generator),
        "input_values": [0.1 * torch.randn(1, 320 * LENGTH + 80, generator=generator)],
        "pixel_values_videos": [],
        "hidden_states": [torch.randn(1, LENGTH, 64, generator=generator)],
        "inputs_embeds": [torch.randn(1, LENGTH, 64, generator=generator)],
    }
    combinations = (
        ("input_ids", "decoder_input_ids"),
        ("input_ids",),
        ("input_features", "decoder_input_ids"),
        ("input_features",),
        ("input_values", "decoder_input_ids"),
        ("input_values",),
        ("pixel_values",),
        ("pixel_values", "decoder_input_ids"),
        ("input_ids", "pixel_values"),
        ("hidden_states",),
        ("inputs_embeds",),
    )
    main = getattr(model, "main_input_name", "input_ids")
    for names in sorted(combinations, key=lambda names: main not in names):
        if not all(name in accepted for name in names):
            continue
        for values in itertools.product(*(available[name] for name in names)):
            yield "", dict(zip(names, values, strict=True))


def _pixels(config: Any, generator: torch.Generator) -> list[Tensor]:  # noqa: ANN401 (a configuration)
    """Images and videos of the sizes that a vision configuration speaks of."""
    vision = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", None) or 3
    frames = getattr(vision, "num_frames", None) or getattr(vision, "frames_per_clip", None) or 0
    sizes = [(1, channels, height, width)]
    if frames:
        sizes.insert(0, (1, frames, channels, height, width))
    return [torch.randn(size, generator=generator) for size in sizes]


def _features(config: Any, generator: torch.Generator) -> list[Tensor]:  # noqa: ANN401 (a configuration)
    """Spectrograms, channels first (as Whisper) and last."""
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "feature_size")
    bins = next((getattr(audio, name) for name in names if isinstance(getattr(audio, name, None), int)), 80)
    frames = 2 * (getattr(audio, "max_source_positions", None) or LENGTH)
    shapes = ((1, bins, frames), (1, 2 * LENGTH, bins), (1, 4 * LENGTH, bins))
    return [torch.randn(shape, generator=generator) for shape in shapes]
