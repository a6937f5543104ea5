"""Attention of public files for sound, series, proteins and tables: the expression alone, each form written anew."""

# ruff: noqa: ANN001, ANN201, D103 (every function is a form: benchmarks/public_form.py says what it takes)

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.public_form import (
    BATCH,
    DIM,
    HEADS,
    LENGTH,
    NINF,
    RELATIVE,
    flat,
    form,
    length_first,
)


@form(
    "openai/whisper whisper/model.py",
    "`qk + mask[:n, :n]`, a stored mask; float32 softmax",
    "read at run time",
    buffers={"mask": torch.full((64, 64), NINF).triu_(1)},
)
def whisper(self, q, k, v, tokens):
    n, scale = q.shape[2], 16**-0.25
    qk = (q * scale) @ (k * scale).transpose(-1, -2) + self.mask[:n, :n]
    return (F.softmax(qk.float(), dim=-1).to(q.dtype) @ v).permute(0, 2, 1, 3).flatten(start_dim=2)


@form(
    "wenet-e2e/wenet wenet/models/transformer/attention.py",
    "padding filled by -inf before the softmax and by zero behind it",
    "bidirectional, key padding",
)
def wenet(self, q, k, v, tokens):
    mask = tokens[:, None].unsqueeze(-3).eq(0)
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(16)
    attention = torch.softmax(scores.masked_fill(mask, NINF).float(), dim=-1).type_as(v).masked_fill(mask, 0.0)
    return torch.matmul(attention, v)


@form(
    "sooftware/conformer conformer/attention.py",
    "scores of relative positions are added, then both are scaled",
    "dense: a position bias or a second product",
    parameters={"p": torch.linspace(-1, 1, LENGTH * DIM).view(LENGTH, DIM)},
)
def conformer(self, q, k, v, tokens):
    score = (torch.matmul(q, k.transpose(2, 3)) + torch.matmul(q, self.p.T).flip(-1)) / math.sqrt(16)
    score.masked_fill_(~tokens[:, None, None], -1e9)
    return torch.matmul(F.softmax(score, -1), v)


@form(
    "lucidrains/conformer conformer/conformer.py; jaywalnut310/vits attentions.py (relative keys)",
    "scaled scores of relative positions are added to scaled scores",
    "dense: adds numbers to the scores",
    parameters={"rel": torch.linspace(-1, 1, LENGTH * LENGTH * DIM).view(LENGTH, LENGTH, DIM)},
)
def relative_keys(self, q, k, v, tokens):
    dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.25
    dots = dots + torch.einsum("b h n d, n r d -> b h n r", q, self.rel) * 0.25
    dots.masked_fill_(~tokens[:, None, None], -torch.finfo(dots.dtype).max)
    return torch.einsum("b h i j, b h j d -> b h i d", dots.softmax(dim=-1), v)


@form(
    "ming024/FastSpeech2 transformer/Modules.py",
    "`/ np.power(d, 0.5)`, bmm of [H * B, n, D] under a padding mask repeated for the heads",
    "bidirectional, key padding",
)
def fastspeech(self, q, k, v, tokens):
    q, k, v = (x.permute(1, 0, 2, 3).reshape(HEADS * BATCH, -1, 16) for x in (q, k, v))
    n = q.shape[1]
    mask = (~tokens).unsqueeze(1).expand(-1, n, -1).repeat(HEADS, 1, 1)
    attention = torch.bmm(q, k.transpose(1, 2)) / np.power(16, 0.5)
    return torch.bmm(nn.Softmax(dim=2)(attention.masked_fill(mask, -np.inf)), v)


@form(
    "jaywalnut310/vits attentions.py (without relative positions)",
    "`masked_fill(mask == 0, -1e4)`, the mask hides padded queries, too",
    "read at run time",
)
def vits(self, q, k, v, tokens):
    mask = tokens[:, None, :, None] * tokens[:, None, None]
    scores = torch.matmul(q / math.sqrt(16), k.transpose(-2, -1)).masked_fill(mask == 0, -1e4)
    return torch.matmul(F.softmax(scores, dim=-1), v)


@form(
    "facebookresearch/audiocraft audiocraft/modules/transformer.py",
    "`einsum(bthd,bkhd->bhtk)`, `where(valid, 0, -inf)` is added",
    "causal, window 12",
)
def audiocraft(self, q, k, v, tokens):
    q, k, v = map(length_first, (q, k, v))
    at = torch.arange(q.shape[1])
    delta = at.view(-1, 1) - at.view(1, -1)
    mask = torch.where((delta >= 0) & (delta < 12), torch.zeros([]), torch.full([], NINF)).to(q.dtype)
    weights = torch.softmax(torch.einsum("bthd,bkhd->bhtk", q / 16**0.5, k) + mask, dim=-1)
    return torch.einsum("bhtk,bkhd->bthd", weights, v).flatten(2)


@form(
    "facebookresearch/demucs demucs/demucs.py",
    "keys times queries, the softmax over dimension 2; the diagonal filled by -100",
    "dense: hides scores by -100.0, which large scores outweigh",
)
def demucs(self, q, k, v, tokens):
    q, k, v = (x.transpose(-1, -2) for x in (q, k, v))
    dots = torch.einsum("bhct,bhcs->bhts", k, q)
    dots /= 4.0
    dots.masked_fill_(torch.eye(q.shape[-1], dtype=torch.bool), -100)
    return torch.einsum("bhts,bhct->bhcs", torch.softmax(dots, dim=2), v)


@form(
    "zhouhaoyi/Informer2020 models/attn.py; thuml/Time-Series-Library layers/SelfAttention_Family.py",
    "`masked_fill_(triu(ones), -np.inf)`, `softmax(scale * scores)`",
    "causal",
)
def informer(self, q, k, v, tokens):
    q, k, v = map(length_first, (q, k, v))
    n = q.shape[1]
    scores = torch.einsum("blhe,bshe->bhls", q, k)
    scores.masked_fill_(torch.triu(torch.ones([BATCH, 1, n, n], dtype=torch.bool), diagonal=1), -np.inf)
    return torch.einsum("bhls,bshd->blhd", torch.softmax(0.25 * scores, dim=-1), v).contiguous()


@form(
    "thuml/Time-Series-Library layers/SelfAttention_Family.py (DSAttention)",
    "`scores * tau + delta`, both computed",
    "dense: adds numbers to the scores",
)
def destationary(self, q, k, v, tokens):
    scores = (q @ k.mT) * v.mean((1, 2, 3))[:, None, None, None] + v.mean((1, 3))[:, None, None]
    return torch.softmax(scores, -1) @ v


@form(
    "yandex-research/tabular-dl-revisiting-models bin/ft_transformer.py",
    "`softmax(q @ k.transpose(1, 2) / math.sqrt(d))` of [B * H, n, D]",
    "bidirectional",
)
def ft_transformer(self, q, k, v, tokens):
    q, k, v = map(flat, (q, k, v))
    return F.softmax(q @ k.transpose(1, 2) / math.sqrt(16), dim=-1) @ v


@form(
    "aqlaboratory/openfold openfold/model/primitives.py (mask alone)",
    "`1e9 * (mask - 1)` is added in place",
    "read at run time",
)
def openfold(self, q, k, v, tokens):
    a = torch.matmul(q, k.transpose(-1, -2))
    a += 1e9 * (tokens.to(q.dtype)[:, None, None] - 1)
    return torch.matmul(F.softmax(a, dim=-1), v)


@form(
    "aqlaboratory/openfold openfold/model/primitives.py (pair bias)",
    "a bias of pairs is added, too",
    "dense: adds numbers to the scores",
    parameters={"bias": RELATIVE},
)
def openfold_pairs(self, q, k, v, tokens):
    a = torch.matmul(q, k.transpose(-1, -2))
    for bias in (1e9 * (tokens.to(q.dtype)[:, None, None] - 1), self.bias):
        a += bias
    return torch.matmul(F.softmax(a, dim=-1), v)


@form(
    "lucidrains/alphafold2 alphafold2_pytorch/alphafold2.py (mask alone)",
    "filled by -finfo.max where query or key is padding",
    "read at run time",
)
def alphafold2(self, q, k, v, tokens):
    dots = torch.einsum("b h i d, b h j d -> b h i j", q * 0.25, k)
    mask = tokens[:, None, :, None] * tokens[:, None, None, :]
    return torch.einsum(
        "b h i j, b h j d -> b h i d", dots.masked_fill(~mask, -torch.finfo(dots.dtype).max).softmax(-1), v
    )


@form(
    "facebookresearch/esm esm/axial_attention.py (rows)",
    "`einsum(rinhd,rjnhd->hnij)` sums over rows and dimensions",
    "dense: summed over several dimensions, as attention that is tied over the rows",
)
def esm_rows(self, q, k, v, tokens):
    q, k, v = (torch.stack([x.permute(2, 0, 1, 3)] * 3) for x in (q, k, v))
    weights = torch.einsum("rinhd,rjnhd->hnij", q, k)
    weights = weights.masked_fill(~tokens[None, :, None], -10000)
    return torch.einsum("hnij,rjnhd->rinhd", weights.softmax(-1), v)


@form(
    "facebookresearch/esm esm/axial_attention.py (columns)",
    "`einsum(icnhd,jcnhd->hcnij)`, five dimensions",
    "bidirectional",
)
def esm_columns(self, q, k, v, tokens):
    q, k, v = (torch.stack([x.permute(2, 0, 1, 3)] * 3, 1) for x in (q, k, v))
    weights = torch.einsum("icnhd,jcnhd->hcnij", q, k)
    return torch.einsum("hcnij,jcnhd->icnhd", weights.softmax(-1), v)
