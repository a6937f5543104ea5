"""Attention as public files write it by hand, each form written anew, with what the pass makes of it.

`FORMS` is the source of the last table of docs/zoo.md, and its test runs every form through ``explain``. A form takes
query, key and value [B, H, N, D] and a padding mask [B, N], True for tokens. ``python -m benchmarks.zoo_public`` writes
the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH, DIM, HEADS, BATCH = 40, 16, 4, 2
NINF = float("-inf")
Function = Callable[..., Tensor]


class Holder(nn.Module):
    """A module that holds buffers and parameters, around a function of them."""

    def __init__(self, function: Function, buffers: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        for name, parameter in parameters.items():
            self.register_parameter(name, nn.Parameter(parameter))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        """The attention of a form."""
        return self.function(self, q, k, v, tokens)


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        files: Repositories and files that have it.
        text: The form in words.
        function: Of the module that holds the buffers, query, key, value and padding mask.
        mask: As the report has it, if the attention is rewritten.
        reason: A part of the reason, if it stays dense.
        buffers: Of the module, by name.
        parameters: Of the module, by name.
    """

    files: str
    text: str
    function: Function
    mask: str = ""
    reason: str = ""
    buffers: dict[str, Tensor] | None = None
    parameters: dict[str, Tensor] | None = None

    def module(self) -> nn.Module:
        """A module of this form."""
        return Holder(self.function, self.buffers or {}, self.parameters or {}).eval()


FORMS: list[Form] = []


def form(files: str, text: str, **options: Any) -> Callable[[Function], Function]:  # noqa: ANN401 (fields of `Form`)
    """Enters a function into `FORMS`."""

    def enter(function: Function) -> Function:
        FORMS.append(Form(files, text, function, **options))
        return function

    return enter


def _channels(x: Tensor) -> Tensor:
    """One head as an image network has it: [B, C, N]."""
    return x[:, 0].transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _length_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _above(x: Tensor) -> Tensor:
    return torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)


TRIL = torch.ones(1, 1, 64, 64).tril()
RELATIVE = torch.linspace(-1, 1, HEADS * LENGTH * LENGTH).view(HEADS, LENGTH, LENGTH)


# Text: GPT, LLaMA and their kin.


@form(
    "karpathy/minGPT mingpt/model.py; karpathy/nanoGPT model.py; CompVis/taming-transformers mingpt.py; suno-ai/bark bark/model.py",
    "scores times 1/sqrt(d), `masked_fill(bias[:, :, :T, :T] == 0, -inf)` with a stored triangle",
    mask="read at run time",
    buffers={"bias": TRIL},
)
def mingpt(self, q, k, v, tokens):
    n = q.shape[2]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    return F.softmax(scores.masked_fill(self.bias[:, :, :n, :n] == 0, NINF), dim=-1) @ v


@form(
    "rasbt/LLMs-from-scratch ch04/gpt.py",
    "stored triangle `mask.bool()` filled in place, scaled behind the mask",
    mask="read at run time",
    buffers={"mask": torch.ones(64, 64).triu(1)},
)
def rasbt(self, q, k, v, tokens):
    n = q.shape[2]
    scores = q @ k.transpose(2, 3)
    scores.masked_fill_(self.mask.bool()[:n, :n], -torch.inf)
    return torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1) @ v


@form(
    "huggingface/pytorch-openai-transformer-lm model_pytorch.py",
    "`w * b + -1e9 * (1 - b)` with a stored triangle b",
    buffers={"b": TRIL},
)
def gpt1(self, q, k, v, tokens):
    w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(v.size(-1))
    b = self.b[:, :, : w.size(-2), : w.size(-1)]
    return torch.matmul(nn.Softmax(dim=-1)(w * b + -1e9 * (1 - b)), v)


@form("(GPT-1 with the triangle made in the model)", "`w * b + -1e9 * (1 - b)` with b = tril(ones)")
def gpt1_made(self, q, k, v, tokens):
    w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(v.size(-1))
    b = torch.tril(torch.ones(q.shape[2], q.shape[2]))
    return torch.matmul(nn.Softmax(dim=-1)(w * b + -1e9 * (1 - b)), v)


@form(
    "meta-llama/llama llama/model.py",
    "mask made by `triu(full(-inf))` and `hstack` with zeros for the cache",
    mask="causal",
)
def llama(self, q, k, v, tokens):
    n = q.shape[2]
    mask = torch.triu(torch.full((n, n), NINF), diagonal=1)
    mask = torch.hstack([torch.zeros((n, 0)), mask]).type_as(q)
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1]) + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form("meta-llama/llama llama/model.py (prefill on a cache)", "the same with keys before the queries", mask="causal")
def llama_cached(self, q, k, v, tokens):
    q = q[:, :, 9:]
    n = q.shape[2]
    mask = torch.triu(torch.full((n, n), NINF), diagonal=1)
    mask = torch.hstack([torch.zeros((n, 9)), mask]).type_as(q)
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1]) + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form("tloen/llama-int8 llama/model.py", "mask [1, 1, N, N] by `triu(full(-inf), start + 1)`", mask="causal")
def llama_int8(self, q, k, v, tokens):
    n = q.shape[2]
    mask = torch.triu(torch.full((1, 1, n, n), NINF), diagonal=0 + 1).type_as(q)
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1]) + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form(
    "mistralai/mistral-src one_file_ref.py",
    "mask = log(triu(tril(ones), -window)), added in place",
    mask="causal, window 13",
)
def mistral(self, q, k, v, tokens):
    n = q.shape[2]
    mask = torch.log(torch.triu(torch.tril(torch.full((n, n), 1.0, dtype=q.dtype), diagonal=0), diagonal=-12))
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores += mask[None, None, ...]
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form("google/gemma_pytorch gemma/model.py", "capped scores, mask of -2.38e38 by triu, rows chosen by `index_select`")
def gemma(self, q, k, v, tokens):
    n = q.shape[2]
    mask = torch.triu(torch.full((1, 1, n, n), -2.3819763e38), diagonal=1).index_select(2, torch.arange(n))
    scores = torch.tanh(torch.matmul(q * 0.25, k.transpose(2, 3)) / 50.0) * 50.0 + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form(
    "google/gemma_pytorch gemma/model.py (local layers)",
    "sum of two masks of -2.38e38, by triu and by tril",
    mask="causal, window 12",
)
def gemma_local(self, q, k, v, tokens):
    n = q.shape[2]
    mask = torch.triu(torch.full((1, 1, n, n), -2.3819763e38), diagonal=1)
    mask = mask + torch.tril(torch.full((1, 1, n, n), -2.3819763e38), diagonal=-12)
    scores = torch.matmul(q * 0.25, k.transpose(2, 3)) + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


@form(
    "deepseek-ai/DeepSeek-V3 inference/model.py (naive)",
    "`einsum(bshd,bthd->bsht)`, mask unsqueezed at 1",
    mask="causal",
)
def deepseek(self, q, k, v, tokens):
    q, k, v = map(_length_first, (q, k, v))
    n = q.shape[1]
    mask = torch.full((n, n), NINF).triu_(1)
    scores = torch.einsum("bshd,bthd->bsht", q, k) * 0.25
    scores += mask.unsqueeze(1)
    scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(q)
    return torch.einsum("bsht,bthd->bshd", scores, v).flatten(2)


@form("deepseek-ai/DeepSeek-V3 inference/model.py (absorbed)", "the sum of two products, without and with positions")
def deepseek_absorbed(self, q, k, v, tokens):
    q, k = map(_length_first, (q, k))
    c, n = k[:, :, 0], q.shape[1]
    scores = (torch.einsum("bshc,btc->bsht", q, c) + torch.einsum("bshr,btr->bsht", q[..., :8], c[..., :8])) * 0.25
    scores += torch.full((n, n), NINF).triu_(1).unsqueeze(1)
    scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(q)
    return torch.einsum("bsht,btc->bshc", scores, c)


@form(
    "mosaicml/llm-foundry attention.py",
    "padding, causal and window fills by finfo.min, one after the other",
    mask="causal, window 13, key padding",
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
    "ofirpress/attention_with_linear_biases fairseq (ALiBi)",
    "slopes times distances added to a causal mask",
    reason="ALiBi",
)
def alibi(self, q, k, v, tokens):
    n = q.shape[2]
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(HEADS)])
    bias = slopes[:, None, None] * torch.arange(n)[None, None] + torch.full((n, n), NINF).triu(1)
    return torch.softmax(q @ k.mT * 0.25 + bias, -1) @ v


@form(
    "NVIDIA/Megatron-LM dot_product_attention.py; EleutherAI/gpt-neox transformer.py",
    "`baddbmm` into an empty tensor with beta 0, heads behind the batch, mask filled by -10000",
    mask="",
)
def megatron(self, q, k, v, tokens):
    scores = torch.baddbmm(
        torch.empty(BATCH * HEADS, q.shape[2], q.shape[2]), _flat(q), _flat(k).mT, beta=0.0, alpha=0.25
    )
    scores = scores.view(BATCH, HEADS, q.shape[2], q.shape[2]).masked_fill(_above(q), -10000.0)
    return torch.bmm(_flat(scores.softmax(-1)), _flat(v)).view_as(v)


@form(
    "RWKV-LM RWKV-v1/src/model.py",
    "a stored triangle without heads",
    mask="read at run time",
    buffers={"mask": TRIL[0, 0]},
)
def rwkv(self, q, k, v, tokens):
    n = q.shape[2]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(16))
    return F.softmax(scores.masked_fill(self.mask[:n, :n] == 0, NINF), dim=-1) @ v


@form("deepseek-ai/DeepSeek-LLM-like, math on tensors", "`scores / torch.sqrt(torch.tensor(d))`", mask="causal")
def over_tensor_sqrt(self, q, k, v, tokens):
    scores = q @ k.mT / torch.sqrt(torch.tensor(q.shape[-1], dtype=q.dtype))
    return scores.masked_fill(_above(q), NINF).softmax(-1) @ v


@form("sqrt of an integer tensor", "`scores / torch.sqrt(torch.tensor(d))`", mask="causal")
def over_integer_sqrt(self, q, k, v, tokens):
    scores = q @ k.mT / torch.sqrt(torch.tensor(q.shape[-1]))
    return scores.masked_fill(_above(q), NINF).softmax(-1) @ v


@form("scale as a buffer", "`scores / self.scale`", mask="causal", buffers={"scale": torch.tensor(4.0)})
def over_buffer(self, q, k, v, tokens):
    return (q @ k.mT / self.scale).masked_fill(_above(q), NINF).softmax(-1) @ v


@form(
    "aladdinpersson-like: scale as a FloatTensor([d])",
    "`scores / torch.sqrt(FloatTensor([d]))`",
    mask="causal",
    buffers={"scale": torch.sqrt(torch.tensor([16.0]))},
)
def over_vector(self, q, k, v, tokens):
    return (torch.matmul(q, k.permute(0, 1, 3, 2)) / self.scale).masked_fill(_above(q) == 1, -1e10).softmax(-1) @ v


# Text: encoders, translation.


@form(
    "harvardnlp/annotated-transformer; codertimo/BERT-pytorch single.py; hkproj/pytorch-transformer model.py",
    "`/ math.sqrt(d)`, `masked_fill(mask == 0, -1e9)` of a padding and a causal mask",
    mask="causal, key padding",
)
def annotated(self, q, k, v, tokens):
    subsequent = torch.triu(torch.ones((1, q.shape[2], q.shape[2])), diagonal=1).type(torch.uint8)
    mask = (tokens.unsqueeze(-2) & (subsequent == 0)).unsqueeze(1)
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    return torch.matmul(scores.masked_fill(mask == 0, -1e9).softmax(dim=-1), v)


@form(
    "jadore801120/attention-is-all-you-need-pytorch Modules.py",
    "the query is divided, `masked_fill(mask == 0, -1e9)`",
    mask="causal, key padding",
)
def jadore(self, q, k, v, tokens):
    n = q.shape[2]
    subsequent = (1 - torch.triu(torch.ones((1, n, n)), diagonal=1)).bool()
    mask = (tokens.unsqueeze(-2) & subsequent).unsqueeze(1)
    scores = torch.matmul(q / 4.0, k.transpose(2, 3)).masked_fill(mask == 0, -1e9)
    return torch.matmul(F.softmax(scores, dim=-1), v)


@form("hyunwoongko/transformer scale_dot_product_attention.py", "`masked_fill(mask == 0, -10000)`")
def hyunwoongko(self, q, k, v, tokens):
    scores = (q @ k.transpose(2, 3)) / math.sqrt(16)
    return nn.Softmax(dim=-1)(scores.masked_fill(_above(q), -10000)) @ v


@form(
    "graykode/nlp-tutorial Transformer.py, BERT.py",
    "`/ np.sqrt(d)`, a padding mask expanded to [B, N, N], filled in place by -1e9",
    mask="bidirectional, key padding",
)
def graykode(self, q, k, v, tokens):
    n = q.shape[2]
    mask = tokens.eq(0).unsqueeze(1).expand(BATCH, n, n).unsqueeze(1).repeat(1, HEADS, 1, 1)
    scores = torch.matmul(q, k.transpose(-1, -2)) / np.sqrt(16)
    scores.masked_fill_(mask, -1e9)
    return torch.matmul(nn.Softmax(dim=-1)(scores), v)


@form("labmlai transformers/mha.py", "scores [i, j, B, H], softmax over dimension 1")
def labml(self, q, k, v, tokens):
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    scores = torch.einsum("ibhd,jbhd->ijbh", q, k)
    scores *= 0.25
    mask = torch.tril(torch.ones(q.shape[0], q.shape[0])).bool()[:, :, None, None]
    attention = scores.masked_fill(mask == 0, NINF).softmax(1)
    return torch.einsum("ijbh,jbhd->ibhd", attention, v)


@form("labmlai diffusion/ddpm/unet.py", "scores [B, i, j, H], softmax over dimension 2")
def labml_ddpm(self, q, k, v, tokens):
    q, k, v = map(_length_first, (q, k, v))
    attention = (torch.einsum("bihd,bjhd->bijh", q, k) * 0.25).softmax(dim=2)
    return torch.einsum("bijh,bjhd->bihd", attention, v)


@form(
    "labmlai diffusion/stable_diffusion/model/autoencoder.py",
    "channels first, `einsum(bci,bcj->bij)` and `einsum(bij,bcj->bci)`",
    mask="bidirectional",
)
def labml_autoencoder(self, q, k, v, tokens):
    q, k, v = map(_channels, (q, k, v))
    attention = F.softmax(torch.einsum("bci,bcj->bij", q, k) * 0.25, dim=2)
    return torch.einsum("bij,bcj->bci", attention, v)


@form(
    "labmlai diffusion/stable_diffusion/model/unet_attention.py (is_inplace)",
    "softmax written in two halves of the batch",
)
def labml_halves(self, q, k, v, tokens):
    q, k, v = map(_length_first, (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.25
    half = scores.shape[0] // 2
    scores[half:] = scores[half:].softmax(dim=-1)
    scores[:half] = scores[:half].softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", scores, v)


@form(
    "pbloem/former modules.py",
    "query and key divided by d ** (1/4), `scores[..., rows, columns] = -inf` by triu_indices",
)
def former(self, q, k, v, tokens):
    q, k, v = map(_flat, (q / 16 ** (1 / 4), k / 16 ** (1 / 4), v))
    scores = torch.bmm(q, k.transpose(1, 2))
    rows = torch.triu_indices(q.shape[1], q.shape[1], offset=1)
    scores[..., rows[0], rows[1]] = NINF
    return torch.bmm(F.softmax(scores, dim=2), v)


@form(
    "facebookresearch/fairseq multihead_attention.py; facebookresearch/esm multihead_attention.py",
    "bmm of [B * H, N, D], additive mask, view to 4-D for the padding, float32 softmax cast back",
    mask="causal, key padding",
)
def fairseq(self, q, k, v, tokens):
    n = q.shape[2]
    q, k, v = map(_flat, (q * 0.25, k, v))
    weights = torch.bmm(q, k.transpose(1, 2))
    weights += torch.triu(torch.zeros(n, n).fill_(NINF), 1).unsqueeze(0)
    weights = weights.view(BATCH, HEADS, n, n)
    weights = weights.masked_fill((~tokens).unsqueeze(1).unsqueeze(2).to(torch.bool), NINF)
    weights = weights.view(BATCH * HEADS, n, n)
    probabilities = F.dropout(F.softmax(weights, dim=-1, dtype=torch.float32).type_as(weights), 0.1, training=False)
    return torch.bmm(probabilities, v)


@form(
    "facebookresearch/esm axial_attention.py (rows)",
    "one map for all rows: `einsum(rinhd,rjnhd->hnij)` sums over rows, too; filled by -10000",
)
def esm_rows(self, q, k, v, tokens):
    q, k, v = (torch.stack([x.permute(2, 0, 1, 3)] * 3) for x in (q, k, v))
    weights = torch.einsum("rinhd,rjnhd->hnij", q, k)
    weights = weights.masked_fill(~tokens[None, :, None], -10000)
    return torch.einsum("hnij,rjnhd->rinhd", weights.softmax(-1), v)


@form(
    "facebookresearch/esm axial_attention.py (columns)",
    "`einsum(icnhd,jcnhd->hcnij)`, five dimensions",
    mask="bidirectional",
)
def esm_columns(self, q, k, v, tokens):
    q, k, v = (torch.stack([x.permute(2, 0, 1, 3)] * 3, 1) for x in (q, k, v))
    weights = torch.einsum("icnhd,jcnhd->hcnij", q, k)
    return torch.einsum("hcnij,jcnhd->icnhd", weights.softmax(-1), v)


@form(
    "T5 (Megatron-LM, x-transformers rel_pos_bias)",
    "an embedding of bucketed distances is added",
    parameters={"table": torch.linspace(-1, 1, 32 * HEADS).view(32, HEADS)},
    reason="adds numbers to the scores",
)
def t5(self, q, k, v, tokens):
    at = torch.arange(q.shape[2])
    bias = F.embedding((at[None] - at[:, None]).clamp(-16, 15) + 16, self.table).permute(2, 0, 1).unsqueeze(0)
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += bias
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


# Images.


@form(
    "CompVis/latent-diffusion diffusionmodules/model.py (first Stable Diffusion VAE); deepseek-ai/Janus vq_model.py; taming-transformers",
    "`bmm(v, softmax(bmm(q, k) * c ** -0.5).permute(0, 2, 1))`",
    mask="bidirectional",
)
def vae(self, q, k, v, tokens):
    q, k, v = map(_channels, (q, k, v))
    c = q.shape[1]
    w = torch.bmm(q.permute(0, 2, 1), k) * (int(c) ** (-0.5))
    w = F.softmax(w, dim=2).permute(0, 2, 1)
    return torch.bmm(v, w)


@form(
    "CompVis/latent-diffusion ldm/modules/attention.py SpatialSelfAttention",
    "the same by `einsum(bij,bjk->bik)`",
    mask="bidirectional",
)
def spatial(self, q, k, v, tokens):
    q, k, v = map(_channels, (q, k, v))
    w = torch.einsum("bij,bjk->bik", q.permute(0, 2, 1), k) * (16 ** (-0.5))
    return torch.einsum("bij,bjk->bik", v, F.softmax(w, dim=2).permute(0, 2, 1))


@form(
    "CompVis/latent-diffusion ldm/modules/attention.py CrossAttention; k-diffusion",
    "`einsum(b i d, b j d -> b i j)`, padding repeated to [B * H, 1, N], filled in place by -finfo.max",
    mask="bidirectional, key padding",
)
def cross(self, q, k, v, tokens):
    q, k, v = map(_flat, (q, k, v))
    sim = torch.einsum("b i d, b j d -> b i j", q, k) * 0.25
    mask = tokens[:, None].expand(-1, HEADS, -1).reshape(BATCH * HEADS, -1)[:, None]
    sim.masked_fill_(~mask, -torch.finfo(sim.dtype).max)
    return torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)


@form(
    "openai/guided-diffusion unet.py; CompVis/latent-diffusion openaimodel.py; neonbjb/tortoise-tts arch_util.py",
    "query and key times d ** -1/4, `einsum(bct,bcs->bts)`, `einsum(bts,bcs->bct)`",
    mask="bidirectional",
)
def guided(self, q, k, v, tokens):
    q, k, v = (_flat(x).transpose(1, 2) for x in (q, k, v))
    scale = 1 / math.sqrt(math.sqrt(16))
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(BATCH, -1, q.shape[-1])


@form(
    "lucidrains/denoising-diffusion-pytorch (full attention)",
    "channels first, `einsum(b h d i, b h d j -> b h i j)`",
    mask="bidirectional",
)
def ddpm(self, q, k, v, tokens):
    q, k, v = (x.transpose(-1, -2) for x in (q, k, v))
    sim = torch.einsum("b h d i, b h d j -> b h i j", q * 0.25, k)
    return torch.einsum("b h i j, b h d j -> b h i d", sim.softmax(dim=-1), v)


@form(
    "CompVis/latent-diffusion LinearAttention; denoising-diffusion-pytorch; lucidrains/video-diffusion SpatialLinearAttention",
    "linear attention: softmax of the keys, no scores",
    reason="not found",
)
def linear(self, q, k, v, tokens):
    k = k.transpose(-1, -2).softmax(dim=-1)
    context = torch.einsum("bhdn,bhen->bhde", k, v.transpose(-1, -2))
    return torch.einsum("bhde,bhdn->bhen", context, q.transpose(-1, -2))


@form(
    "facebookresearch/dino; mae; salesforce/BLIP vit.py; TimeSformer vit.py; lucidrains/vit-pytorch vit.py; timm attention.py; segment-anything transformer.py",
    "`(q @ k.transpose(-2, -1)) * scale`, softmax, `@ v`",
    mask="bidirectional",
)
def vit(self, q, k, v, tokens):
    attention = ((q @ k.transpose(-2, -1)) * 0.25).softmax(dim=-1)
    return (F.dropout(attention, 0.1, training=False) @ v).transpose(1, 2).reshape(BATCH, -1, 64)


@form(
    "huggingface/pytorch-image-models attention2d.py",
    "`einsum(bnhk,bmk->bnhm)`: one head of keys and values",
    mask="bidirectional",
)
def attention_2d(self, q, k, v, tokens):
    q, k, v = q.transpose(1, 2), k[:, 0], v[:, 0]
    attention = (torch.einsum("bnhk,bmk->bnhm", q, k) * 0.25).softmax(dim=-1)
    return torch.einsum("bnhm,bmv->bnhv", attention, v)


@form(
    "huggingface/pytorch-image-models diff_attention.py",
    "the difference of two maps meets the values",
    reason="before they meet the values",
)
def diff(self, q, k, v, tokens):
    first, second = (q[..., :8] @ k[..., :8].mT).softmax(-1), (q[..., 8:] @ k[..., 8:].mT).softmax(-1)
    return (first - 0.3 * second) @ v


@form(
    "lucidrains/vit-pytorch deepvit.py; x-transformers (talking heads)",
    "heads are mixed behind the softmax",
    reason="before they meet the values",
    parameters={"mix": torch.eye(HEADS)},
)
def talking(self, q, k, v, tokens):
    attention = (torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.25).softmax(dim=-1)
    return torch.einsum("b h i j, b h j d -> b h i d", torch.einsum("b h i j, h g -> b g i j", attention, self.mix), v)


@form(
    "microsoft/Swin-Transformer swin_transformer.py; Video-Swin; max_vit.py",
    "a learned table by relative position is added",
    reason="adds numbers to the scores",
    parameters={"bias": RELATIVE},
)
def swin(self, q, k, v, tokens):
    return ((q * 0.25) @ k.transpose(-2, -1) + self.bias.unsqueeze(0)).softmax(-1) @ v


@form(
    "microsoft/Swin-Transformer swin_transformer.py (shifted windows, without the table)",
    "scores viewed as [B / W, W, H, N, N] for a mask of -100 for each window",
    reason="",
    buffers={"mask": torch.full((2, LENGTH, LENGTH), -100.0).triu(1)},
)
def swin_shifted(self, q, k, v, tokens):
    n = q.shape[2]
    attention = (q * 0.25) @ k.transpose(-2, -1)
    attention = attention.view(1, 2, HEADS, n, n) + self.mask.unsqueeze(1).unsqueeze(0)
    return attention.view(-1, HEADS, n, n).softmax(-1) @ v


@form(
    "microsoft/Swin-Transformer swin_transformer_v2.py (without its bias)",
    "cosine scores times a learned factor a head",
    mask="bidirectional",
    parameters={"logit_scale": torch.log(10 * torch.ones(HEADS, 1, 1))},
)
def swin_v2(self, q, k, v, tokens):
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scale = torch.clamp(self.logit_scale, max=torch.log(torch.tensor(1.0 / 0.01))).exp()
    return (scores * scale).softmax(-1) @ v


@form(
    "facebookresearch/segment-anything image_encoder.py",
    "decomposed relative positions are added",
    reason="adds numbers to the scores",
    parameters={"rel": torch.linspace(-1, 1, LENGTH * LENGTH * DIM).view(LENGTH, LENGTH, DIM)},
)
def sam(self, q, k, v, tokens):
    q, k, v = map(_flat, (q, k, v))
    scores = (q * 0.25) @ k.transpose(-2, -1) + torch.einsum("bnd,nmd->bnm", q, self.rel)
    return scores.softmax(dim=-1) @ v


@form("facebookresearch/detr segmentation.py", "the map over an image is the output", reason="not found")
def detr_map(self, q, k, v, tokens):
    return F.softmax(torch.einsum("bqnc,bmnc->bqnm", q.transpose(1, 2), k.transpose(1, 2)).flatten(2), dim=-1)


@form(
    "facebookresearch/TimeSformer nonlocal_helper.py",
    "non-local block: `einsum(nct,ncp->ntp)`, `einsum(ntg,ncg->nct)`",
    mask="bidirectional",
)
def nonlocal_block(self, q, k, v, tokens):
    q, k, v = map(_channels, (q, k, v))
    weights = F.softmax(torch.einsum("nct,ncp->ntp", q, k) * (16**-0.5), dim=2)
    return torch.einsum("ntg,ncg->nct", weights, v)


@form(
    "lucidrains/video-diffusion-pytorch",
    "`sim - amax(sim).detach()`, frames kept to themselves by `where(focus, eye, ones)`",
    reason="",
)
def video(self, q, k, v, tokens):
    n = q.shape[2]
    focus = tokens[:, 0]
    mask = torch.where(
        focus[:, None, None, None],
        torch.eye(n, dtype=torch.bool)[None, None],
        torch.ones(n, n, dtype=torch.bool)[None, None],
    )
    sim = torch.einsum("... h i d, ... h j d -> ... h i j", q * 0.25, k).masked_fill(~mask, -torch.finfo(q.dtype).max)
    sim = sim - sim.amax(dim=-1, keepdim=True).detach()
    return torch.einsum("... h i j, ... h j d -> ... h i d", sim.softmax(dim=-1), v)


@form(
    "lucidrains/DALLE-pytorch attention.py; tortoise-tts transformer.py",
    "fills in place by -finfo.max, softmax of (x / a - amax(x / a)) * a",
    mask="causal, key padding",
)
def dalle(self, q, k, v, tokens):
    dots = torch.einsum("b h i d, b h j d -> b h i j", q * 0.25, k)
    lowest = -torch.finfo(dots.dtype).max
    dots.masked_fill_(~tokens[:, None, None], lowest)
    i, j = dots.shape[-2:]
    dots.masked_fill_(torch.ones(i, j).triu_(j - i + 1).bool(), lowest)
    t = dots / 32**2
    t = t - torch.amax(t, dim=-1, keepdim=True).detach()
    return torch.einsum("b h i j, b h j d -> b h i d", (t * 32**2).softmax(dim=-1), v)


# Sound, series, proteins, tables.


@form(
    "openai/whisper whisper/model.py",
    "query and key times d ** -1/4, `mask[:n, :n]` stored, float32 softmax",
    mask="read at run time",
    buffers={"mask": torch.full((64, 64), NINF).triu_(1)},
)
def whisper(self, q, k, v, tokens):
    n, scale = q.shape[2], 16**-0.25
    qk = (q * scale) @ (k * scale).transpose(-1, -2) + self.mask[:n, :n]
    return (F.softmax(qk.float(), dim=-1).to(q.dtype) @ v).permute(0, 2, 1, 3).flatten(start_dim=2)


@form(
    "wenet-e2e/wenet attention.py; espnet (fairseq espnet_multihead_attention.py)",
    "padding filled by -inf before, by zero behind the softmax",
    mask="bidirectional, key padding",
)
def wenet(self, q, k, v, tokens):
    mask = tokens[:, None].unsqueeze(-3).eq(0)
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(16)
    attention = torch.softmax(scores.masked_fill(mask, -NINF * -1).float(), dim=-1).type_as(v).masked_fill(mask, 0.0)
    return torch.matmul(attention, v)


@form(
    "sooftware/conformer attention.py; wenet RelPosition; lucidrains/conformer",
    "scores of relative positions are added",
    reason="adds numbers to the scores",
    parameters={"p": torch.linspace(-1, 1, LENGTH * DIM).view(LENGTH, DIM)},
)
def conformer(self, q, k, v, tokens):
    score = (torch.matmul(q, k.transpose(2, 3)) + torch.matmul(q, self.p.T).flip(-1)) / math.sqrt(16)
    score.masked_fill_(~tokens[:, None, None], -1e9)
    return torch.matmul(F.softmax(score, -1), v)


@form(
    "ming024/FastSpeech2 Modules.py",
    "bmm of [H * B, N, D], `/ temperature`, `masked_fill(mask, -np.inf)` with the mask repeated over heads",
    mask="bidirectional, key padding",
)
def fastspeech(self, q, k, v, tokens):
    q, k, v = (x.permute(1, 0, 2, 3).reshape(HEADS * BATCH, -1, 16) for x in (q, k, v))
    n = q.shape[1]
    mask = (~tokens).unsqueeze(1).expand(-1, n, -1).repeat(HEADS, 1, 1)
    attention = torch.bmm(q, k.transpose(1, 2)) / np.power(16, 0.5)
    return torch.bmm(nn.Softmax(dim=2)(attention.masked_fill(mask, -np.inf)), v)


@form(
    "jaywalnut310/vits attentions.py",
    "`masked_fill(mask == 0, -1e4)` of rows and columns, relative keys and values",
    reason="",
)
def vits(self, q, k, v, tokens):
    mask = tokens[:, None, :, None] * tokens[:, None, None]
    scores = torch.matmul(q / math.sqrt(16), k.transpose(-2, -1)).masked_fill(mask == 0, -1e4)
    return torch.matmul(F.softmax(scores, dim=-1), v)


@form(
    "facebookresearch/audiocraft transformer.py",
    "`einsum(b t h d, b k h d -> b h t k)`, additive mask by `where`",
    mask="causal, window 12",
)
def audiocraft(self, q, k, v, tokens):
    q, k, v = map(_length_first, (q, k, v))
    at = torch.arange(q.shape[1])
    delta = at.view(-1, 1) - at.view(1, -1)
    mask = torch.where((delta >= 0) & (delta < 12), torch.zeros([]), torch.full([], NINF))
    weights = torch.softmax(torch.einsum("bthd,bkhd->bhtk", q / 16**0.5, k) + mask, dim=-1)
    return torch.einsum("bhtk,bkhd->bthd", weights, v).flatten(2)


@form(
    "facebookresearch/demucs demucs.py",
    "keys times queries, the softmax runs over the first of the two, the diagonal filled by -100",
    reason="",
)
def demucs(self, q, k, v, tokens):
    q, k, v = (x.transpose(-1, -2) for x in (q, k, v))
    dots = torch.einsum("bhct,bhcs->bhts", k, q)
    dots /= 4.0
    dots.masked_fill_(torch.eye(q.shape[-1], dtype=torch.bool), -100)
    return torch.einsum("bhts,bhct->bhcs", torch.softmax(dots, dim=2), v)


@form("(demucs without the diagonal)", "softmax over the first of two dimensions")
def keys_first(self, q, k, v, tokens):
    q, k, v = (x.transpose(-1, -2) for x in (q, k, v))
    dots = torch.einsum("bhct,bhcs->bhts", k, q) / 4.0
    return torch.einsum("bhts,bhct->bhcs", torch.softmax(dots, dim=2), v)


@form(
    "zhouhaoyi/Informer2020 attn.py; thuml/Time-Series-Library SelfAttention_Family.py",
    "`masked_fill_(triu(ones [B, 1, N, N]), -np.inf)`, `softmax(scale * scores)`",
    mask="causal",
)
def informer(self, q, k, v, tokens):
    q, k, v = map(_length_first, (q, k, v))
    n = q.shape[1]
    scores = torch.einsum("blhe,bshe->bhls", q, k)
    scores.masked_fill_(torch.triu(torch.ones([BATCH, 1, n, n], dtype=torch.bool), diagonal=1), -np.inf)
    return torch.einsum("bhls,bshd->blhd", torch.softmax(0.25 * scores, dim=-1), v).contiguous()


@form(
    "thuml/Time-Series-Library DSAttention",
    "`scores * tau + delta`, both learned from the series",
    reason="adds numbers to the scores",
)
def destationary(self, q, k, v, tokens):
    scores = (q @ k.mT) * v.mean((1, 2, 3))[:, None, None, None] + v.mean((1, 3))[:, None, None]
    return torch.softmax(scores, -1) @ v


@form(
    "yandex-research/tabular-dl-revisiting-models ft_transformer.py",
    "`softmax(q @ k.transpose(1, 2) / math.sqrt(d))` of [B * H, N, D]",
    mask="bidirectional",
)
def ft_transformer(self, q, k, v, tokens):
    q, k, v = map(_flat, (q, k, v))
    return F.softmax(q @ k.transpose(1, 2) / math.sqrt(16), dim=-1) @ v


@form(
    "aqlaboratory/openfold primitives.py (mask alone)",
    "a list of biases, one of them `inf * (mask - 1)` with inf = 1e9 and a float mask",
    reason="",
)
def openfold(self, q, k, v, tokens):
    a = torch.matmul(q, k.transpose(-1, -2))
    a += 1e9 * (tokens.to(q.dtype)[:, None, None] - 1)
    return torch.matmul(F.softmax(a, dim=-1), v)


@form(
    "aqlaboratory/openfold primitives.py (pair bias); lucidrains/alphafold2",
    "a bias of the pairs is added",
    reason="",
    parameters={"bias": RELATIVE},
)
def openfold_pairs(self, q, k, v, tokens):
    a = torch.matmul(q, k.transpose(-1, -2))
    for bias in (1e9 * (tokens.to(q.dtype)[:, None, None] - 1), self.bias):
        a += bias
    return torch.matmul(F.softmax(a, dim=-1), v)


@form(
    "lucidrains/alphafold2 alphafold2.py (mask alone); lucidrains/conformer",
    "fill by -finfo.max where query or key is padding",
    reason="",
)
def alphafold2(self, q, k, v, tokens):
    dots = torch.einsum("b h i d, b h j d -> b h i j", q * 0.25, k)
    mask = tokens[:, None, :, None] * tokens[:, None, None, :]
    return torch.einsum(
        "b h i j, b h j d -> b h i d", dots.masked_fill(~mask, -torch.finfo(dots.dtype).max).softmax(-1), v
    )


@form(
    "lucidrains/x-transformers attend.py",
    "`tanh(sim / c) * c`, two fills, sinks in front cut off again",
    mask="causal, key padding",
    parameters={"sink": torch.linspace(-1, 1, HEADS)},
)
def x_transformers(self, q, k, v, tokens):
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.25
    sim = (sim / 50.0).tanh() * 50.0
    lowest = -torch.finfo(sim.dtype).max
    sim = sim.masked_fill(~tokens[:, None, None], lowest).masked_fill(_above(q), lowest)
    sinks = self.sink.view(1, HEADS, 1, 1).expand(BATCH, HEADS, q.shape[2], 1)
    attention = torch.cat((sinks, sim), dim=-1).softmax(dim=-1, dtype=torch.float32)[..., 1:]
    return torch.einsum("b h i j, b h j d -> b h i d", attention, v)


@form("lucidrains/vit-pytorch na_vit.py", "images packed into one row: `ids[:, :, None] == ids[:, None]`", mask="")
def na_vit(self, q, k, v, tokens):
    ids = tokens.long().cumsum(-1) // 20
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) & tokens[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@form(
    "Lightning-AI/lit-gpt model.py; pytorch-labs/gpt-fast; hpcaitech/Open-Sora; openai/whisper with SDPA; crowsonkb/k-diffusion layers.py",
    "`scaled_dot_product_attention`",
    mask="causal",
)
def sdpa(self, q, k, v, tokens):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
