"""Small models and inputs for tests of the public face."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class TinyAttention(nn.Module):
    """Causal self-attention, as a user would write it."""

    def __init__(self, dim=32, heads=4, kv_heads=2):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        batch, length, dim = x.shape
        split = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (y.view(batch, length, -1, self.head_dim).transpose(1, 2) for y in self.qkv(x).split(split, -1))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim))


class TinyModel(nn.Module):
    """Two attentions and a head."""

    def __init__(self, dim=32):
        super().__init__()
        self.layers = nn.ModuleList(TinyAttention(dim) for _ in range(2))
        self.head = nn.Linear(dim, 8)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def tiny_model():
    torch.manual_seed(0)
    return TinyModel().eval()


def tiny_input(length=200, batch=1):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(1))


class TinyLanguageModel(nn.Module):
    """Token ids in, logits out; positions are embedded, so that attention differs from row to row."""

    def __init__(self, vocabulary=50, dim=32):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(4096, dim)
        self.layers = nn.ModuleList(TinyAttention(dim) for _ in range(2))
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, ids):
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def tiny_language_model():
    torch.manual_seed(0)
    return TinyLanguageModel().eval()


def tiny_tokens(length=700, batch=1, vocabulary=50):
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


class Characters:
    """A tokenizer of printable characters, ids 2 to 96, behind a first token. It keeps what it decoded."""

    def __init__(self):
        self.decoded = []

    def __call__(self, text, *, verbose=True, add_special_tokens=True):
        ids = [2 + max(0, ord(character) - 32) for character in text]
        return SimpleNamespace(input_ids=[1, *ids] if add_special_tokens else ids)

    def decode(self, ids, *, skip_special_tokens):
        self.decoded.append(list(ids))
        return "".join(chr(32 + id_ - 2) for id_ in ids if id_ >= 2)
