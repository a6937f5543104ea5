"""The small decoder of `recall_model.py`, built as modern models are.

Heads of 128 in groups of four, queries and keys normalised, RoPE, SwiGLU, tied embeddings. All but attention works on
tokens [T, width] and knows no rows, so that one compilation serves every length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from recall_data import Batch, Vocabulary
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A model and how it is trained. Every step takes ``tokens`` tokens, in rows of the stage's length."""

    layers: int = 4
    width: int = 512
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    hidden: int = 1536
    rope_base: float = 1e6
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    first_length: int = 32
    tokens: int = 32768
    warmup: int = 100
    matrix_rate: float = 0.02
    other_rate: float = 4e-3


TINY = Settings(
    layers=2,
    width=128,
    heads=2,
    kv_heads=1,
    head_dim=64,
    hidden=256,
    vocabulary=Vocabulary(letters=16, symbols=47),
    tokens=2048,
)


class Norm(nn.Module):
    """RMS norm with a gain, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension; dtype as given."""
        return F.rms_norm(x.float(), x.shape[-1:], self.gain.float(), 1e-6).to(x.dtype)


class Linear(nn.Linear):
    """Without a bias, computed in the dtype of its input: weights stay in float32 while they are trained."""

    def __init__(self, inputs: int, outputs: int, *, zero: bool = False) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.zeros_(self.weight) if zero else nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: x [T, H, D] by angles [T, D / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Projections(nn.Module):
    """Queries, keys and values of tokens [T, width]. It knows no rows: one compilation serves every length."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, self.head_dim = settings.width, settings.head_dim
        self.norm, self.query_norm, self.key_norm = Norm(width), Norm(self.head_dim), Norm(self.head_dim)
        self.query = Linear(width, settings.heads * self.head_dim)
        self.key = Linear(width, settings.kv_heads * self.head_dim)
        self.value = Linear(width, settings.kv_heads * self.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each [T, H, D]."""
        x = self.norm(x)
        query, key, value = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.query, self.key, self.value))
        return rotate(self.query_norm(query), cos, sin), rotate(self.key_norm(key), cos, sin), value


class Mixer(nn.Module):
    """What follows attention, token by token: its output projection and SwiGLU, each added."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, hidden = settings.width, settings.hidden
        self.attended, self.norm = Linear(settings.heads * settings.head_dim, width, zero=True), Norm(width)
        self.gate, self.up, self.down = Linear(width, hidden), Linear(width, hidden), Linear(hidden, width, zero=True)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """[T, width], from [T, width] and [T, heads * head_dim]."""
        x = x + self.attended(attended)
        normed = self.norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Block(nn.Module):
    """One layer."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.projections, self.mixer = Projections(settings), Mixer(settings)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, rows: int) -> Tensor:
        """[T, width], T tokens of ``rows`` rows."""
        query, key, value = (part.unflatten(0, (rows, -1)).transpose(1, 2) for part in self.projections(x, cos, sin))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.mixer(x, attended.transpose(1, 2).flatten(2).flatten(0, 1))


class Decoder(nn.Module):
    """The model. It computes in ``dtype``, whatever its weights are kept in."""

    def __init__(self, settings: Settings, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self._base, self._half = dtype, settings.rope_base, settings.head_dim // 2
        self.embedding = nn.Embedding(settings.vocabulary.size, settings.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.first_norm, self.last_norm = Norm(settings.width), Norm(settings.width)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B, N, vocabulary] of ids [B, N]; positions [B, N] where they are not 0 to N - 1."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        places = torch.arange(self._half, device=ids.device, dtype=torch.float32)
        angles = positions.flatten()[:, None].float() * self._base ** (-places / self._half)
        cos, sin = angles.cos(), angles.sin()
        x = self.first_norm(self.embedding(ids).flatten(0, 1).to(self.dtype))
        for block in self.blocks:
            x = block(x, cos, sin, ids.shape[0])
        return F.linear(self.last_norm(x), self.embedding.weight.to(self.dtype)).unflatten(0, ids.shape)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Counts and losses on device: right answers, answers, sums of loss on answers and on text, tokens of text."""

    right: Tensor
    answers: Tensor
    answer_loss: Tensor
    text_loss: Tensor
    texts: Tensor


def answer(model: nn.Module, batch: Batch, **inputs: Tensor) -> Answered:
    """Let the model read a batch."""
    logits = model(batch.ids, **inputs)[:, :-1].flatten(0, 1).float()
    targets, answers, text = batch.ids[:, 1:].flatten(), batch.answers[:, :-1].flatten(), batch.text[:, :-1].flatten()
    loss = F.cross_entropy(logits, targets, reduction="none")
    return Answered(
        right=((logits.detach().argmax(-1) == targets) & answers).sum(),
        answers=answers.sum(),
        answer_loss=(loss * answers).sum(),
        text_loss=(loss * text).sum(),
        texts=text.sum(),
    )
