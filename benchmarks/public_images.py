"""Attention of public files for images and video: the expression alone, each form written anew."""

# ruff: noqa: ANN001, ANN201, D103 (every function is a form: benchmarks/public_form.py says what it takes)

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from benchmarks.public_form import (
    BATCH,
    DIM,
    HEADS,
    LENGTH,
    RELATIVE,
    channels,
    flat,
    form,
    length_first,
)


@form(
    "CompVis/latent-diffusion ldm/modules/diffusionmodules/model.py (Stable Diffusion's first VAE); "
    "CompVis/taming-transformers taming/modules/diffusionmodules/model.py; deepseek-ai/Janus "
    "janus/models/vq_model.py",
    "`bmm(v, softmax(bmm(q, k)).permute(0, 2, 1))`",
    "bidirectional",
)
def vae(self, q, k, v, tokens):
    q, k, v = map(channels, (q, k, v))
    c = q.shape[1]
    w = torch.bmm(q.permute(0, 2, 1), k) * (int(c) ** (-0.5))
    w = F.softmax(w, dim=2).permute(0, 2, 1)
    return torch.bmm(v, w)


@form(
    "CompVis/latent-diffusion ldm/modules/attention.py (SpatialSelfAttention)",
    "the same by `einsum(bij,bjk->bik)`",
    "bidirectional",
)
def spatial(self, q, k, v, tokens):
    q, k, v = map(channels, (q, k, v))
    w = torch.einsum("bij,bjk->bik", q.permute(0, 2, 1), k) * (16 ** (-0.5))
    return torch.einsum("bij,bjk->bik", v, F.softmax(w, dim=2).permute(0, 2, 1))


@form(
    "CompVis/latent-diffusion ldm/modules/attention.py (CrossAttention); "
    "lucidrains/perceiver-pytorch perceiver_pytorch/perceiver_pytorch.py",
    "`einsum(b i d, b j d -> b i j)`, padding repeated for the heads, filled by -finfo.max",
    "bidirectional, key padding",
)
def cross(self, q, k, v, tokens):
    q, k, v = map(flat, (q, k, v))
    sim = torch.einsum("b i d, b j d -> b i j", q, k) * 0.25
    mask = tokens[:, None].expand(-1, HEADS, -1).reshape(BATCH * HEADS, -1)[:, None]
    sim.masked_fill_(~mask, -torch.finfo(sim.dtype).max)
    return torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)


@form(
    "openai/guided-diffusion guided_diffusion/unet.py; CompVis/latent-diffusion "
    "ldm/modules/diffusionmodules/openaimodel.py; neonbjb/tortoise-tts tortoise/models/arch_util.py",
    "`einsum(bct,bcs->bts)`, `einsum(bts,bcs->bct)`",
    "bidirectional",
)
def guided(self, q, k, v, tokens):
    q, k, v = (flat(x).transpose(1, 2) for x in (q, k, v))
    scale = 1 / math.sqrt(math.sqrt(16))
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(BATCH, -1, q.shape[-1])


@form(
    "labmlai/annotated_deep_learning_paper_implementations labml_nn/diffusion/stable_diffusion/model/autoencoder.py",
    "`einsum(bci,bcj->bij)`, `einsum(bij,bcj->bci)`",
    "bidirectional",
)
def labml_autoencoder(self, q, k, v, tokens):
    q, k, v = map(channels, (q, k, v))
    attention = F.softmax(torch.einsum("bci,bcj->bij", q, k) * 0.25, dim=2)
    return torch.einsum("bij,bcj->bci", attention, v)


@form(
    "labmlai/annotated_deep_learning_paper_implementations labml_nn/diffusion/ddpm/unet.py",
    "scores [B, queries, keys, H], the softmax over dimension 2",
    "bidirectional",
)
def labml_ddpm(self, q, k, v, tokens):
    q, k, v = map(length_first, (q, k, v))
    attention = (torch.einsum("bihd,bjhd->bijh", q, k) * 0.25).softmax(dim=2)
    return torch.einsum("bijh,bjhd->bihd", attention, v)


@form(
    "labmlai/annotated_deep_learning_paper_implementations "
    "labml_nn/diffusion/stable_diffusion/model/unet_attention.py (in place)",
    "each half of the batch is overwritten by its softmax",
    "dense: takes a part of the scores for its softmax",
)
def labml_halves(self, q, k, v, tokens):
    q, k, v = map(length_first, (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.25
    half = scores.shape[0] // 2
    scores[half:] = scores[half:].softmax(dim=-1)
    scores[:half] = scores[:half].softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", scores, v)


@form(
    "lucidrains/denoising-diffusion-pytorch denoising_diffusion_pytorch/attend.py; "
    "denoising_diffusion_pytorch/classifier_free_guidance.py",
    "`einsum(b h d i, b h d j -> b h i j)`",
    "bidirectional",
)
def ddpm(self, q, k, v, tokens):
    q, k, v = (x.transpose(-1, -2) for x in (q, k, v))
    sim = torch.einsum("b h d i, b h d j -> b h i j", q * 0.25, k)
    return torch.einsum("b h i j, b h d j -> b h i d", sim.softmax(dim=-1), v)


@form(
    "CompVis/latent-diffusion ldm/modules/attention.py (LinearAttention); "
    "lucidrains/video-diffusion-pytorch (SpatialLinearAttention)",
    "linear attention: a softmax of keys alone",
    "not found: no product of queries and keys",
)
def linear(self, q, k, v, tokens):
    k = k.transpose(-1, -2).softmax(dim=-1)
    context = torch.einsum("bhdn,bhen->bhde", k, v.transpose(-1, -2))
    return torch.einsum("bhde,bhdn->bhen", context, q.transpose(-1, -2))


@form(
    "facebookresearch/dino vision_transformer.py; salesforce/BLIP models/vit.py; "
    "facebookresearch/TimeSformer timesformer/models/vit.py; lucidrains/vit-pytorch "
    "vit_pytorch/vit.py; huggingface/pytorch-image-models timm/layers/attention.py; "
    "facebookresearch/segment-anything segment_anything/modeling/transformer.py",
    "`(q @ k.transpose(-2, -1)) * scale`, softmax, `@ v`",
    "bidirectional",
)
def vit(self, q, k, v, tokens):
    attention = ((q @ k.transpose(-2, -1)) * 0.25).softmax(dim=-1)
    return (F.dropout(attention, 0.1, training=False) @ v).transpose(1, 2).reshape(BATCH, -1, 64)


@form(
    "huggingface/pytorch-image-models timm/layers/attention2d.py",
    "`einsum(bnhk,bmk->bnhm)`: keys and values have one head",
    "bidirectional",
)
def attention_2d(self, q, k, v, tokens):
    q, k, v = q.transpose(1, 2), k[:, 0], v[:, 0]
    attention = (torch.einsum("bnhk,bmk->bnhm", q, k) * 0.25).softmax(dim=-1)
    return torch.einsum("bnhm,bmv->bnhv", attention, v)


@form(
    "huggingface/pytorch-image-models timm/layers/diff_attention.py",
    "the difference of two softmaxes meets the values",
    "dense: before they meet the values",
)
def diff(self, q, k, v, tokens):
    first, second = (q[..., :8] @ k[..., :8].mT).softmax(-1), (q[..., 8:] @ k[..., 8:].mT).softmax(-1)
    return (first - 0.3 * second) @ v


@form(
    "microsoft/Swin-Transformer models/swin_transformer.py; SwinTransformer/Video-Swin-Transformer "
    "mmaction/models/backbones/swin_transformer.py; lucidrains/vit-pytorch vit_pytorch/max_vit.py",
    "a learned table of relative positions is added",
    "dense: adds numbers to the scores",
    parameters={"bias": RELATIVE},
)
def swin(self, q, k, v, tokens):
    return ((q * 0.25) @ k.transpose(-2, -1) + self.bias.unsqueeze(0)).softmax(-1) @ v


@form(
    "microsoft/Swin-Transformer models/swin_transformer.py (shifted windows, without the table)",
    "scores viewed as [B / W, W, H, n, n] for masks of -100",
    "dense: adds numbers to the scores",
    buffers={"mask": torch.full((2, LENGTH, LENGTH), -100.0).triu(1)},
)
def swin_shifted(self, q, k, v, tokens):
    n = q.shape[2]
    attention = (q * 0.25) @ k.transpose(-2, -1)
    attention = attention.view(1, 2, HEADS, n, n) + self.mask.unsqueeze(1).unsqueeze(0)
    return attention.view(-1, HEADS, n, n).softmax(-1) @ v


@form(
    "microsoft/Swin-Transformer models/swin_transformer_v2.py (without its bias)",
    "cosines times a learned factor a head",
    "bidirectional",
    parameters={"logit_scale": torch.log(10 * torch.ones(HEADS, 1, 1))},
)
def swin_v2(self, q, k, v, tokens):
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scale = torch.clamp(self.logit_scale, max=torch.log(torch.tensor(1.0 / 0.01))).exp()
    return (scores * scale).softmax(-1) @ v


@form(
    "facebookresearch/segment-anything segment_anything/modeling/image_encoder.py",
    "decomposed relative positions are added",
    "dense: adds numbers to the scores",
    parameters={"rel": torch.linspace(-1, 1, LENGTH * LENGTH * DIM).view(LENGTH, LENGTH, DIM)},
)
def sam(self, q, k, v, tokens):
    q, k, v = map(flat, (q, k, v))
    scores = (q * 0.25) @ k.transpose(-2, -1) + torch.einsum("bnd,nmd->bnm", q, self.rel)
    return scores.softmax(dim=-1) @ v


@form(
    "facebookresearch/TimeSformer timesformer/models/nonlocal_helper.py",
    "`einsum(nct,ncp->ntp)`, `einsum(ntg,ncg->nct)`",
    "bidirectional",
)
def nonlocal_block(self, q, k, v, tokens):
    q, k, v = map(channels, (q, k, v))
    weights = F.softmax(torch.einsum("nct,ncp->ntp", q, k) * (16**-0.5), dim=2)
    return torch.einsum("ntg,ncg->nct", weights, v)


@form(
    "lucidrains/video-diffusion-pytorch video_diffusion_pytorch/video_diffusion_pytorch.py",
    "`where(focus, eye, ones)` by batch entry, minus `amax(...).detach()`",
    "read at run time",
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
    "lucidrains/DALLE-pytorch dalle_pytorch/attention.py; neonbjb/tortoise-tts tortoise/models/transformer.py",
    "two fills in place by -finfo.max, softmax of `(x / a - amax(x / a)) * a`",
    "causal, key padding",
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


@form(
    "lucidrains/vit-pytorch vit_pytorch/na_vit.py",
    "images packed into one row: equal ids see one another",
    "packed bidirectional, key padding",
)
def na_vit(self, q, k, v, tokens):
    ids = tokens.long().cumsum(-1) // 20
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) & tokens[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
