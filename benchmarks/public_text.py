"""Attention of public files for text: the expression alone, each form written anew."""

# ruff: noqa: ANN001, ANN201, D103 (every function is a form: benchmarks/public_form.py says what it takes)

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.public_form import (
    BATCH,
    HEADS,
    NINF,
    TRIANGLE,
    above,
    flat,
    form,
    length_first,
)


@form(
    "karpathy/minGPT mingpt/model.py; karpathy/nanoGPT model.py; CompVis/taming-transformers "
    "taming/modules/transformer/mingpt.py; suno-ai/bark bark/model.py; BlinkDL/RWKV-LM "
    "RWKV-v1/src/model.py",
    "`masked_fill(bias[:, :, :n, :n] == 0, -inf)`, bias a stored triangle",
    "read at run time",
    buffers={"bias": TRIANGLE},
)
def mingpt(self, q, k, v, tokens):
    n = q.shape[2]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    return F.softmax(scores.masked_fill(self.bias[:, :, :n, :n] == 0, NINF), dim=-1) @ v


@form(
    "rasbt/LLMs-from-scratch ch04/01_main-chapter-code/gpt.py",
    "the same in place, scaled by `/ d ** 0.5` behind the mask",
    "read at run time",
    buffers={"mask": torch.ones(64, 64).triu(1)},
)
def rasbt(self, q, k, v, tokens):
    n = q.shape[2]
    scores = q @ k.transpose(2, 3)
    scores.masked_fill_(self.mask.bool()[:n, :n], -torch.inf)
    return torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1) @ v


@form(
    "huggingface/pytorch-openai-transformer-lm model_pytorch.py",
    "`w * b + -1e9 * (1 - b)`, b a stored triangle",
    "dense: scales scores by a tensor that varies along the keys",
    buffers={"b": TRIANGLE},
)
def gpt1(self, q, k, v, tokens):
    w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(v.size(-1))
    b = self.b[:, :, : w.size(-2), : w.size(-1)]
    return torch.matmul(nn.Softmax(dim=-1)(w * b + -1e9 * (1 - b)), v)


@form(
    "meta-llama/llama llama/model.py",
    "`hstack([zeros(n, cached), triu(full(-inf), 1)])` is added",
    "causal",
)
def llama(self, q, k, v, tokens):
    n = q.shape[2]
    mask = torch.triu(torch.full((n, n), NINF), diagonal=1)
    mask = torch.hstack([torch.zeros((n, 0)), mask]).type_as(q)
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1]) + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form(
    "meta-llama/llama llama/model.py (behind a cache)",
    "the same with cached keys",
    "causal",
)
def llama_cached(self, q, k, v, tokens):
    q = q[:, :, 9:]
    n = q.shape[2]
    mask = torch.triu(torch.full((n, n), NINF), diagonal=1)
    mask = torch.hstack([torch.zeros((n, 9)), mask]).type_as(q)
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1]) + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form(
    "tloen/llama-int8 llama/model.py",
    "`triu(full((1, 1, n, n), -inf), start + 1)` is added",
    "causal",
)
def llama_int8(self, q, k, v, tokens):
    n = q.shape[2]
    mask = torch.triu(torch.full((1, 1, n, n), NINF), diagonal=0 + 1).type_as(q)
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1]) + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form(
    "mistralai/mistral-src one_file_ref.py",
    "`log(triu(tril(ones), -window))` is added in place",
    "causal, window 13",
)
def mistral(self, q, k, v, tokens):
    n = q.shape[2]
    mask = torch.log(torch.triu(torch.tril(torch.full((n, n), 1.0, dtype=q.dtype), diagonal=0), diagonal=-12))
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores += mask[None, None, ...]
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form(
    "google/gemma_pytorch gemma/model.py",
    "capped scores; -2.38e38 by triu, its rows chosen by `index_select`",
    "causal",
)
def gemma(self, q, k, v, tokens):
    n = q.shape[2]
    mask = torch.triu(torch.full((1, 1, n, n), -2.3819763e38), diagonal=1).index_select(2, torch.arange(n))
    scores = torch.tanh(torch.matmul(q * 0.25, k.transpose(2, 3)) / 50.0) * 50.0 + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form(
    "google/gemma_pytorch gemma/model.py (local layers)",
    "two masks of -2.38e38 added up",
    "causal, window 12",
)
def gemma_local(self, q, k, v, tokens):
    n = q.shape[2]
    mask = torch.triu(torch.full((1, 1, n, n), -2.3819763e38), diagonal=1)
    mask = mask + torch.tril(torch.full((1, 1, n, n), -2.3819763e38), diagonal=-12)
    scores = torch.matmul(q * 0.25, k.transpose(2, 3)) + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form(
    "deepseek-ai/DeepSeek-V3 inference/model.py (naive)",
    "scores [B, queries, H, keys] by `einsum(bshd,bthd->bsht)`",
    "causal",
)
def deepseek(self, q, k, v, tokens):
    q, k, v = map(length_first, (q, k, v))
    n = q.shape[1]
    mask = torch.full((n, n), NINF).triu_(1)
    scores = torch.einsum("bshd,bthd->bsht", q, k) * 0.25
    scores += mask.unsqueeze(1)
    scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(q)
    return torch.einsum("bsht,bthd->bshd", scores, v).flatten(2)


@form(
    "deepseek-ai/DeepSeek-V3 inference/model.py (absorbed)",
    "the sum of two products, the second one of positions",
    "dense: a position bias or a second product",
)
def deepseek_absorbed(self, q, k, v, tokens):
    q, k = map(length_first, (q, k))
    c, n = k[:, :, 0], q.shape[1]
    scores = (torch.einsum("bshc,btc->bsht", q, c) + torch.einsum("bshr,btr->bsht", q[..., :8], c[..., :8])) * 0.25
    scores += torch.full((n, n), NINF).triu_(1).unsqueeze(1)
    scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(q)
    return torch.einsum("bsht,btc->bshc", scores, c)


@form(
    "mosaicml/llm-foundry llmfoundry/models/layers/attention.py",
    "padding, causal and window fills by finfo.min, one after the other",
    "causal, window 13, key padding",
)
def mpt(self, q, k, v, tokens):
    lowest, n = torch.finfo(q.dtype).min, q.shape[2]
    weights = q.matmul(k.transpose(-2, -1)) * 0.25
    weights = weights.masked_fill(~tokens.view(-1, 1, 1, n), lowest)
    causal = ~weights.new_ones(n, n, dtype=torch.float32).tril().to(torch.bool)
    weights = weights.masked_fill(causal[-n:, -n:].view(1, 1, n, n), lowest)
    window = torch.triu(torch.tril(torch.ones((n, n), dtype=torch.bool), diagonal=12), diagonal=-12)
    weights = weights.masked_fill((~window).view(1, 1, n, n), lowest)
    return torch.softmax(weights, dim=-1).to(v.dtype).matmul(v)


@form(
    "ofirpress/attention_with_linear_biases fairseq/modules/multihead_attention.py",
    "slopes times positions in a causal mask",
    "dense: as ALiBi and other position biases do",
)
def alibi(self, q, k, v, tokens):
    n = q.shape[2]
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(HEADS)])
    bias = slopes[:, None, None] * torch.arange(n)[None, None] + torch.full((n, n), NINF).triu(1)
    return torch.softmax(q @ k.mT * 0.25 + bias.to(q.dtype), -1) @ v


@form(
    "NVIDIA/Megatron-LM megatron/core/transformer/dot_product_attention.py",
    "`baddbmm(empty, q, k, beta=0)`, filled by -10000",
    "read at run time",
)
def megatron(self, q, k, v, tokens):
    empty = torch.empty(BATCH * HEADS, q.shape[2], q.shape[2], dtype=q.dtype)
    scores = torch.baddbmm(empty, flat(q), flat(k).mT, beta=0.0, alpha=0.25)
    scores = scores.view(BATCH, HEADS, q.shape[2], q.shape[2]).masked_fill(above(q), -10000.0)
    return torch.bmm(flat(scores.softmax(-1)), flat(v)).view_as(v)


@form(
    "EleutherAI/gpt-neox megatron/model/transformer.py; bigscience-workshop/Megatron-DeepSpeed "
    "megatron/model/transformer.py",
    "the same, filled in place by finfo.min",
    "causal",
)
def gpt_neox(self, q, k, v, tokens):
    empty = torch.empty(BATCH * HEADS, q.shape[2], q.shape[2], dtype=q.dtype)
    scores = torch.baddbmm(empty, flat(q), flat(k).mT, beta=0.0, alpha=0.25).view(BATCH, HEADS, q.shape[2], -1)
    scores.masked_fill_(above(q)[None, None], torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype))
    return torch.bmm(flat(scores.softmax(-1)), flat(v)).view_as(v)


@form(
    "harvardnlp/annotated-transformer the_annotated_transformer.py; codertimo/BERT-pytorch "
    "bert_pytorch/model/attention/single.py; hkproj/pytorch-transformer model.py",
    "`masked_fill(mask == 0, -1e9)`, the mask of `triu(ones).type(uint8) == 0` and padding",
    "causal, key padding",
)
def annotated(self, q, k, v, tokens):
    subsequent = torch.triu(torch.ones((1, q.shape[2], q.shape[2])), diagonal=1).type(torch.uint8)
    mask = (tokens.unsqueeze(-2) & (subsequent == 0)).unsqueeze(1)
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    return torch.matmul(scores.masked_fill(mask == 0, -1e9).softmax(dim=-1), v)


@form(
    "jadore801120/attention-is-all-you-need-pytorch transformer/Modules.py",
    "the query is divided, `masked_fill(mask == 0, -1e9)`",
    "causal, key padding",
)
def jadore(self, q, k, v, tokens):
    n = q.shape[2]
    subsequent = (1 - torch.triu(torch.ones((1, n, n)), diagonal=1)).bool()
    mask = (tokens.unsqueeze(-2) & subsequent).unsqueeze(1)
    scores = torch.matmul(q / 4.0, k.transpose(2, 3)).masked_fill(mask == 0, -1e9)
    return torch.matmul(F.softmax(scores, dim=-1), v)


@form(
    "gordicaleksa/pytorch-original-transformer models/definitions/transformer_model.py",
    "`masked_fill_(mask == torch.tensor(False), -inf)`",
    "causal, key padding",
)
def original(self, q, k, v, tokens):
    n = q.shape[2]
    mask = tokens[:, None, None] & (torch.triu(torch.ones((1, 1, n, n))) == 1).transpose(2, 3)
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(16)
    scores.masked_fill_(mask == torch.tensor(False), NINF)
    return torch.matmul(nn.Softmax(dim=-1)(scores), v)


@form(
    "tunz/transformer-pytorch model/transformer.py",
    "`q.mul_(scale)`, `masked_fill_(mask, -1e9)`",
    "bidirectional, key padding",
)
def tunz(self, q, k, v, tokens):
    q = q * 1
    q.mul_(0.25)
    x = torch.matmul(q, k.transpose(2, 3))
    x.masked_fill_((~tokens)[:, None].unsqueeze(1), -1e9)
    return torch.softmax(x, dim=3).matmul(v)


@form(
    "hyunwoongko/transformer models/layers/scale_dot_product_attention.py",
    "`masked_fill(mask == 0, -10000)`",
    "read at run time",
)
def hyunwoongko(self, q, k, v, tokens):
    scores = (q @ k.transpose(2, 3)) / math.sqrt(16)
    return nn.Softmax(dim=-1)(scores.masked_fill(above(q), -10000)) @ v


@form(
    "graykode/nlp-tutorial 5-1.Transformer/Transformer.py; graykode/nlp-tutorial 5-2.BERT/BERT.py",
    "`/ np.sqrt(d)`, a repeated padding mask, `masked_fill_(mask, -1e9)`",
    "bidirectional, key padding",
)
def graykode(self, q, k, v, tokens):
    n = q.shape[2]
    mask = tokens.eq(0).unsqueeze(1).expand(BATCH, n, n).unsqueeze(1).repeat(1, HEADS, 1, 1)
    scores = torch.matmul(q, k.transpose(-1, -2)) / np.sqrt(16)
    scores.masked_fill_(mask, -1e9)
    return torch.matmul(nn.Softmax(dim=-1)(scores), v)


@form(
    "bentrevett/pytorch-seq2seq legacy/6 - Attention is All You Need.ipynb",
    "`/ self.scale`, a tensor [1]; `masked_fill(mask == 0, -1e10)`",
    "causal, key padding",
    buffers={"scale": torch.sqrt(torch.FloatTensor([16]))},
)
def bentrevett(self, q, k, v, tokens):
    n = q.shape[2]
    mask = tokens[:, None, None] & torch.tril(torch.ones((n, n))).bool()
    energy = torch.matmul(q, k.permute(0, 1, 3, 2)) / self.scale
    return torch.matmul(torch.softmax(energy.masked_fill(mask == 0, -1e10), dim=-1), v)


@form(
    "ise-uiuc/WhiteFox (sfdp=1_10.py)",
    "`qk.div(torch.sqrt(torch.tensor(float(d))))`",
    "bidirectional",
)
def over_tensor(self, q, k, v, tokens):
    scores = (q @ k.mT).div(torch.sqrt(torch.tensor(float(q.shape[-1])).float()))
    return scores.softmax(dim=-1).matmul(v)


@form(
    "labmlai/annotated_deep_learning_paper_implementations labml_nn/transformers/mha.py",
    "scores [queries, keys, B, H], the softmax over dimension 1",
    "causal",
)
def labml(self, q, k, v, tokens):
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    scores = torch.einsum("ibhd,jbhd->ijbh", q, k)
    scores *= 0.25
    mask = torch.tril(torch.ones(q.shape[0], q.shape[0])).bool()[:, :, None, None]
    attention = scores.masked_fill(mask == 0, NINF).softmax(1)
    return torch.einsum("ijbh,jbhd->ibhd", attention, v)


@form(
    "pbloem/former former/modules.py",
    "`scores[..., rows, columns] = -inf` by triu_indices",
    "dense: writes to some of the scores",
)
def former(self, q, k, v, tokens):
    q, k, v = map(flat, (q / 16 ** (1 / 4), k / 16 ** (1 / 4), v))
    scores = torch.bmm(q, k.transpose(1, 2))
    rows = torch.triu_indices(q.shape[1], q.shape[1], offset=1)
    scores[..., rows[0], rows[1]] = NINF
    return torch.bmm(F.softmax(scores, dim=2), v)


@form(
    "facebookresearch/fairseq fairseq/modules/multihead_attention.py; facebookresearch/esm esm/multihead_attention.py",
    "bmm of [B * H, n, D], an added mask, viewed as 4-d for the padding",
    "causal, key padding",
)
def fairseq(self, q, k, v, tokens):
    n = q.shape[2]
    q, k, v = map(flat, (q * 0.25, k, v))
    weights = torch.bmm(q, k.transpose(1, 2))
    weights += torch.triu(torch.zeros(n, n).fill_(NINF), 1).unsqueeze(0)
    weights = weights.view(BATCH, HEADS, n, n)
    weights = weights.masked_fill((~tokens).unsqueeze(1).unsqueeze(2).to(torch.bool), NINF)
    weights = weights.view(BATCH * HEADS, n, n)
    probabilities = F.dropout(F.softmax(weights, dim=-1, dtype=torch.float32).type_as(weights), 0.1, training=False)
    return torch.bmm(probabilities, v)


@form(
    "lucidrains/x-transformers x_transformers/x_transformers.py (RelativePositionBias, as T5's)",
    "an embedding of distances is added",
    "dense: adds numbers to the scores",
    parameters={"table": torch.linspace(-1, 1, 32 * HEADS).view(32, HEADS)},
)
def t5(self, q, k, v, tokens):
    at = torch.arange(q.shape[2])
    bias = F.embedding((at[None] - at[:, None]).clamp(-16, 15) + 16, self.table).permute(2, 0, 1).unsqueeze(0)
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += bias
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


@form(
    "lucidrains/x-transformers x_transformers/attend.py",
    "capped, two fills by -finfo.max, sinks in front",
    "causal, key padding",
    parameters={"sink": torch.linspace(-1, 1, HEADS)},
)
def x_transformers(self, q, k, v, tokens):
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.25
    sim = (sim / 50.0).tanh() * 50.0
    lowest = -torch.finfo(sim.dtype).max
    sim = sim.masked_fill(~tokens[:, None, None], lowest).masked_fill(above(q), lowest)
    sinks = self.sink.view(1, HEADS, 1, 1).expand(BATCH, HEADS, q.shape[2], 1)
    attention = torch.cat((sinks, sim), dim=-1).softmax(dim=-1, dtype=torch.float32).type(v.dtype)[..., 1:]
    return torch.einsum("b h i j, b h j d -> b h i d", attention, v)


@form(
    "lucidrains/vit-pytorch vit_pytorch/deepvit.py; lucidrains/x-transformers x_transformers/attend.py (talking heads)",
    "heads are mixed behind the softmax",
    "dense: before they meet the values",
    parameters={"mix": torch.eye(HEADS)},
)
def talking(self, q, k, v, tokens):
    attention = (torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.25).softmax(dim=-1)
    return torch.einsum("b h i j, b h j d -> b h i d", torch.einsum("b h i j, h g -> b g i j", attention, self.mix), v)


@form(
    "Lightning-AI/lit-gpt litgpt/model.py; pytorch-labs/gpt-fast model.py; crowsonkb/k-diffusion k_diffusion/layers.py",
    "`scaled_dot_product_attention`",
    "causal",
)
def sdpa(self, q, k, v, tokens):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
