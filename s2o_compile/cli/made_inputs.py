"""Inputs made from a configuration: what a model of transformers of any kind can be called with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2o_compile.cli.loading import check_reads, positions_of, shorten_cause
from s2o_compile.errors import LoadingError

TRIED_TOKENS = 8
"""Tokens on which a model of texts is tried; one of other inputs is tried on all of them."""

IDS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True, kw_only=True)
class MadeInputs:
    """Inputs by the names of a model's forward, and what they are in words."""

    inputs: dict[str, Tensor]
    text: str


def longest_text(model: Any) -> int | None:  # noqa: ANN401 (a transformers model)
    """The fewest positions that a model's configuration names for its text; None if it names none."""
    return min(positions_of(model).values(), default=None)


@torch.no_grad()
def make_inputs(source: str, model: Any, tokens: int, batch: int = 1) -> MadeInputs:  # noqa: ANN401 (of transformers)
    """Random inputs for a model: ids, an image, sound, or several of them. It is tried on them.

    Args:
        source: The model's name in messages.
        model: A transformers model.
        tokens: Length of a text, and of sound in steps of attention. An image has the size that the configuration says.
        batch: Inputs in a batch.

    Raises:
        LoadingError: Inputs of this kind cannot be made, or the model does not run with them.
        OptionError: The model reads fewer tokens.
    """
    makers = _Makers(model, tokens, batch)
    names = _names(model)
    unknown = [name for name in names if not hasattr(makers, name)]
    if unknown or not names:
        got = ", ".join(unknown) or "none that is known"
        raise LoadingError(
            f"{source}: expected a model of text, images or sound, got a {type(model).__name__}, whose inputs are made "
            f"by no rule here ({got}). Call s2o_compile.explain(model, **inputs) with your own, in Python."
        )
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    dtype = next((x.dtype for x in model.parameters() if x.is_floating_point()), torch.float32)
    inputs = {}
    for name in names:
        made = getattr(makers, name)(generator)
        inputs[name] = made.to(device, dtype if made.is_floating_point() else None)
    try:
        model(**{name: x[:, :TRIED_TOKENS] if name in IDS else x for name, x in inputs.items()})
    except Exception as error:  # whatever a model raises on inputs that are not its own
        shapes = _in_words(inputs)
        raise LoadingError(
            f"{source}: expected a {type(model).__name__} that runs with {shapes}, got {type(error).__name__}: "
            f"{shorten_cause(error)}. Call s2o_compile.explain(model, **inputs) with your own inputs, in Python."
        ) from error
    if set(inputs) == {"input_ids"}:
        check_reads(model, inputs["input_ids"])
    return MadeInputs(inputs=inputs, text=f"made inputs: {_in_words(inputs)}")


def _in_words(inputs: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, x.shape))}" for name, x in inputs.items())


def _names(model: Any) -> list[str]:  # noqa: ANN401 (a transformers model)
    """The inputs that a forward cannot do without."""
    parameters, config = inspect.signature(model.forward).parameters, model.config
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    needed = [name for name, x in parameters.items() if x.default is x.empty and x.kind is positional]
    main = getattr(model, "main_input_name", "input_ids")
    names = [main, *needed] if main in parameters else needed
    if config.is_encoder_decoder and "decoder_input_ids" in parameters:
        names.append("decoder_input_ids")
    # A model that compares texts and images, such as CLIP, wants both; one that writes about them can do without.
    both = {"input_ids", "pixel_values"}
    if both <= parameters.keys() and hasattr(config, "vision_config") and not model.can_generate():
        names += sorted(both)
    return list(dict.fromkeys(names))


class _Makers:
    """A maker for each input that is known, by its name."""

    def __init__(self, model: Any, tokens: int, batch: int) -> None:  # noqa: ANN401 (a transformers model)
        self._model, self._config, self._tokens, self._batch = model, model.config, tokens, batch
        has_bins = getattr(model.config, "num_mel_bins", None) is not None
        self.input_values: Callable[[torch.Generator], Tensor] = self._spectrum if has_bins else self._wave

    def input_ids(self, generator: torch.Generator) -> Tensor:
        """int64 [B, N]."""
        return self._ids(self._tokens, generator)

    def decoder_input_ids(self, generator: torch.Generator) -> Tensor:
        """int64 [B, N], not longer than the decoder's positions."""
        return self._ids(min(self._tokens, longest_text(self._model) or self._tokens), generator)

    def pixel_values(self, generator: torch.Generator) -> Tensor:
        """[B, C, H, W]."""
        size = self._field("image_size", default=224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return torch.rand(self._batch, self._field("num_channels", default=3), height, width, generator=generator)

    def input_features(self, generator: torch.Generator) -> Tensor:
        """[B, bins, frames] as Whisper reads it."""
        frames = 2 * self._field("max_source_positions", default=self._tokens)
        return torch.randn(self._batch, self._field("num_mel_bins", default=80), frames, generator=generator)

    def _spectrum(self, generator: torch.Generator) -> Tensor:
        """[B, frames, bins]."""
        frames = self._field("max_length", default=2 * self._tokens)
        return torch.randn(self._batch, frames, self._field("num_mel_bins", default=80), generator=generator)

    def _wave(self, generator: torch.Generator) -> Tensor:
        """[B, samples]: as many as the strides of the convolutions before the attention make tokens of."""
        samples = self._tokens * math.prod(self._field("conv_stride", default=(320,)))
        return 0.1 * torch.randn(self._batch, samples, generator=generator)

    def _ids(self, tokens: int, generator: torch.Generator) -> Tensor:
        vocabulary = self._config.get_text_config().vocab_size
        return torch.randint(vocabulary, (self._batch, tokens), generator=generator)

    def _field(self, name: str, default: Any) -> Any:  # noqa: ANN401 (whatever a configuration holds)
        """A field of the configuration, or of its part for images."""
        parts = (self._config, getattr(self._config, "vision_config", None))
        return next((found for part in parts if (found := getattr(part, name, None)) is not None), default)
