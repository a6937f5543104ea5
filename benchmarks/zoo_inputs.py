"""Inputs that a model of transformers accepts: its signature's names, its configuration's sizes, what errors ask for.

A try is a set of parameter names: what the model is called with first of all (``main_input_name``), what it requires,
and what the error of the try before names as missing. Each name has a few likely tensors; some combination must fit.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_measure import Subject
from benchmarks.zoo_shrink import VOCABULARY

BATCH, LENGTH = 2, 160
GRID, TEXT, TRIES = 12, 24, 12  # patches a side where a model takes patches; tokens of a second text; errors answered
_IDS = ("input_ids", "decoder_input_ids")
_MAIN = (
    ("input_ids", "decoder_input_ids"),
    ("input_ids",),
    ("input_features", "decoder_input_ids"),
    ("input_features", "input_features_mask"),
    ("input_features",),
    ("input_values", "decoder_input_ids"),
    ("input_values",),
    ("pixel_values", "spatial_shapes"),
    ("pixel_values", "target_sizes"),
    ("pixel_values",),
    ("pixel_values", "decoder_input_ids"),
    ("flattened_patches", "decoder_input_ids"),
    ("input_ids", "pixel_values"),
    ("input_ids", "input_features"),
    ("hidden_states",),
    ("inputs_embeds",),
    ("states", "actions", "rewards", "returns_to_go", "timesteps"),
    (),
)


class NoInputsError(Exception):
    """None of the inputs tried fits; the message says what went wrong first."""


def accepted(model: nn.Module) -> Subject:
    """The first of the likely inputs that the model runs with.

    Raises:
        NoInputsError: With what the first try said.
    """
    reasons = []
    parameters = inspect.signature(model.forward).parameters
    required = tuple(name for name, parameter in parameters.items() if _is_required(parameter))
    main = getattr(model, "main_input_name", "input_ids")
    pool = _Pool(model)
    for names in sorted(_MAIN, key=lambda names: main not in names):
        names = tuple(dict.fromkeys((*required, *names)))
        if not names or not all(name in parameters for name in names):
            continue
        unknown = [name for name in names if not pool.has(name)]
        if unknown:
            reasons.append(f"no input is known for its {', '.join(unknown)}")
            continue
        inputs, reason = _complete(model, names, pool, list(parameters))
        if inputs is not None:
            return Subject(model, inputs)
        reasons.append(reason)
    raise NoInputsError(f"accepts none of the inputs tried; first: {reasons[0]}" if reasons else "takes no known input")


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _complete(
    model: nn.Module, names: Sequence[str], pool: _Pool, parameters: Sequence[str]
) -> tuple[dict[str, Tensor] | None, str]:
    """Inputs of these names, and of those that errors ask for; or the first error."""
    first, last, seen, open_names = "", "", set(), [tuple(names)]
    for _ in range(TRIES):
        if not open_names:
            break
        current = open_names.pop(0)
        seen.add(frozenset(current))
        for inputs in pool.combinations(current):
            reason = _error(model, inputs)
            if reason is None:
                return inputs, ""
            first, last = first or reason, reason
            for name in parameters:
                more = (*current, name)
                asked = name not in current and re.search(rf"\b{name}\b", reason, re.IGNORECASE)
                if asked and pool.has(name) and frozenset(more) not in seen and more not in open_names:
                    open_names.append(more)
    return None, first if first == last else f"{first}; last: {last}"


def _error(model: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # not the inputs that this model wants
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


class _Pool:
    """Likely tensors for each parameter name."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 (a transformers model)
        self._config = model.config
        self._random = torch.Generator().manual_seed(1)
        self._known: dict[str, list[Tensor]] = {}

    def has(self, name: str) -> bool:
        """Whether there is a tensor for this name."""
        return bool(self._tensors(name))

    def combinations(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """All choices of tensors for these names; a text beside something else has a batch of one."""
        text_alone = all(name in _IDS for name in names)
        patches = any(name.endswith(("grid_thw", "spatial_shapes", "target_sizes")) for name in names)
        options = []
        for name in names:
            tensors = self._tensors("patches" if patches and name in ("pixel_values", "hidden_states") else name)
            options.append([x if text_alone or x.shape[0] != BATCH else x[:1] for x in tensors])
        for tensors in itertools.islice(itertools.product(*options), 24):
            yield dict(zip(names, tensors, strict=True))

    def _tensors(self, name: str) -> list[Tensor]:
        if name not in self._known:
            make = getattr(self, f"_{name}", None)
            self._known[name] = make() if make else self._by_rule(name)
        return self._known[name]

    def _by_rule(self, name: str) -> list[Tensor]:
        if name.endswith("grid_thw"):
            return [torch.tensor([[1, GRID, GRID]])]
        if name.endswith("input_ids"):
            return [self._ids(1, TEXT)]
        return []

    def _ids(self, *shape: int) -> Tensor:
        return torch.randint(3, VOCABULARY - 32, shape, generator=self._random)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random)

    def _size(self, *names: str, default: int) -> int:
        """The first of these fields in the configuration or one of its parts."""
        parts = [self._config, *(x for x in vars(self._config).values() if hasattr(x, "to_dict"))]
        found = (getattr(part, name, None) for name in names for part in parts)
        return next((x for x in found if isinstance(x, int) and not isinstance(x, bool)), default)

    # text

    def _input_ids(self) -> list[Tensor]:
        return [self._ids(BATCH, LENGTH)]

    def _decoder_input_ids(self) -> list[Tensor]:
        return [self._ids(BATCH, LENGTH)]

    def _inputs_embeds(self) -> list[Tensor]:
        return [self._noise(1, LENGTH, self._size("hidden_size", "d_model", default=64))]

    _hidden_states = _inputs_embeds

    def _query_embeds(self) -> list[Tensor]:
        return [self._noise(1, 32, self._size("hidden_size", default=64))]

    def _encoder_hidden_states(self) -> list[Tensor]:
        return [self._noise(1, LENGTH, self._size("encoder_hidden_size", "hidden_size", default=64))]

    def _is_longer(self) -> list[Tensor]:
        return [torch.zeros(1, 1, dtype=torch.bool)]

    def _task_inputs(self) -> list[Tensor]:
        return [self._ids(1, self._size("task_seq_len", default=TEXT))]

    def _bbox(self) -> list[Tensor]:
        corner = torch.randint(0, 100, (BATCH, LENGTH, 2), generator=self._random)
        box = torch.cat([corner, corner + 20], dim=-1)
        return [box, box / 128, torch.cat([box, box], dim=-1) / 128]

    # images

    def _channels(self) -> int:
        return self._size("num_channels", "in_channels", "in_chans", default=3)

    def _image_side(self) -> tuple[int, int]:
        parts = [getattr(self._config, name, None) for name in ("vision_config", "backbone_config", "encoder")]
        sizes = (getattr(part, "image_size", None) for part in (*parts, self._config))
        size = next(filter(None, sizes), 224)
        return tuple(size) if isinstance(size, list | tuple) else (size, size)

    def _pixel_values(self) -> list[Tensor]:
        height, width = self._image_side()
        image = self._noise(1, self._channels(), height, width)
        frames = self._size("num_frames", "frames_per_clip", default=0)
        videos = [self._noise(1, frames, *image.shape[1:])] if frames else []
        return [*videos, image, torch.stack([image, image], dim=1), *self._patches()]

    _prompt_pixel_values = _pixel_values
    _prompt_masks = _pixel_values

    def _pixel_values_videos(self) -> list[Tensor]:
        frames = self._size("num_frames", "frames_per_clip", default=8)
        return [self._noise(1, frames, self._channels(), *self._image_side())]

    def _patches(self) -> list[Tensor]:
        patch = self._size("patch_size", "spatial_patch_size", default=14)
        area = self._channels() * patch**2
        times = self._size("temporal_patch_size", default=1)
        flat = [self._noise(GRID * GRID, area * times), self._noise(1, GRID * GRID, area * times)]
        flat.append(self._noise(GRID * GRID, 2 * area))
        return [*flat, self._noise(GRID * GRID, self._channels(), patch, patch)]

    def _flattened_patches(self) -> list[Tensor]:
        return [self._noise(1, GRID * GRID, 2 + self._size("patch_embed_hidden_size", default=768)).abs().clamp(max=2)]

    def _pixel_attention_mask(self) -> list[Tensor]:
        return [torch.ones(1, GRID * GRID, dtype=torch.int64)]

    def _spatial_shapes(self) -> list[Tensor]:
        return [torch.tensor([[GRID, GRID]])]

    _target_sizes = _spatial_shapes

    def _merge_sizes(self) -> list[Tensor]:
        return [torch.tensor([1]), torch.tensor([2])]

    def _pixel_position_ids(self) -> list[Tensor]:
        return [torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))[None]]

    def _visual_feats(self) -> list[Tensor]:
        return [self._noise(1, LENGTH, self._size("visual_feat_dim", default=64))]

    def _visual_pos(self) -> list[Tensor]:
        return [self._noise(1, LENGTH, self._size("visual_pos_dim", default=4)).abs()]

    def _image(self) -> list[Tensor]:
        return [self._noise(1, 3, 224, 224)]

    # sound

    def _input_features(self) -> list[Tensor]:
        names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "feature_size")
        bins = self._size(*names, "n_mels", "num_mels", "mel_bins", "input_size", "subsampling_input_dim", default=80)
        frames = 2 * self._size("max_source_positions", default=LENGTH)
        shapes = [(1, bins, frames), (1, 2 * LENGTH, bins), (1, 4 * LENGTH, bins), (1, bins, 400)]
        shapes += [(1, 1, 4 * LENGTH, bins), (1, 2 * LENGTH, 128)]
        return [self._noise(*shape) for shape in dict.fromkeys(shapes)]

    _audio_mel = _input_features

    def _input_features_mask(self) -> list[Tensor]:
        lengths = dict.fromkeys(x.shape[dim] for x in self._tensors("input_features")[:4] for dim in (-1, -2))
        return [torch.ones(1, length, dtype=torch.int64) for length in lengths if length >= LENGTH]

    def _audio_mel_mask(self) -> list[Tensor]:
        return [mask.bool().logical_not() for mask in self._input_features_mask()]

    def _input_values(self) -> list[Tensor]:
        wave = 0.1 * self._noise(1, 320 * LENGTH + 80)
        bins, frames = self._size("num_mel_bins", default=80), self._size("max_length", default=4 * LENGTH)
        return [wave, wave[:, None, : 320 * LENGTH], self._noise(1, frames, bins), 0.1 * self._noise(1, 384 * LENGTH)]

    def _latents(self) -> list[Tensor]:
        return [self._noise(1, self._size("hidden_size", default=64), LENGTH), self._noise(1, LENGTH, 64)]

    # series

    def _past_values(self) -> list[Tensor]:
        lags = getattr(self._config, "lags_sequence", None) or [0]
        length = self._size("context_length", default=512)
        channels = self._size("num_input_channels", "input_size", default=1)
        shapes = [(1, length + max(lags), channels), (1, length + max(lags))]
        return [self._noise(*shape) for shape in shapes]

    def _past_time_features(self) -> list[Tensor]:
        return [self._noise(1, self._past_values()[0].shape[1], self._size("num_time_features", default=0))]

    def _past_observed_mask(self) -> list[Tensor]:
        return [torch.ones_like(x) for x in self._past_values()]

    def _past_values_padding(self) -> list[Tensor]:
        return [torch.zeros_like(x, dtype=torch.int64) for x in self._past_values()[1:]]

    def _future_values(self) -> list[Tensor]:
        return [self._noise(1, self._size("prediction_length", default=LENGTH))]

    def _future_time_features(self) -> list[Tensor]:
        shape = 1, self._size("prediction_length", default=LENGTH), self._size("num_time_features", default=0)
        return [self._noise(*shape)]

    def _freq(self) -> list[Tensor]:
        return [torch.zeros(1, 1, dtype=torch.int64)]

    # decisions

    def _states(self) -> list[Tensor]:
        return [self._noise(1, LENGTH, self._size("state_dim", default=17))]

    def _actions(self) -> list[Tensor]:
        return [self._noise(1, LENGTH, self._size("act_dim", default=4))]

    def _rewards(self) -> list[Tensor]:
        return [self._noise(1, LENGTH, 1)]

    _returns_to_go = _rewards

    def _timesteps(self) -> list[Tensor]:
        return [torch.arange(LENGTH)[None]]
