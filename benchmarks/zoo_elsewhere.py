"""Models that are not transformers': torch's own, diffusers', timm's, torchvision's, and attention written by hand."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo_measure import Subject, stir
from benchmarks.zoo_transformers import CannotBuildError

BATCH, LENGTH, DIM, HEADS, LAYERS = 2, 160, 64, 4, 2


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) / q.shape[-1] ** 0.5
    scores = scores + torch.zeros(q.shape[-2], q.shape[-2]).masked_fill(~_causal(q.shape[-2]), float("-inf"))
    return torch.matmul(F.softmax(scores, dim=-1), v)


def _einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~_causal(q.shape[-2]), torch.finfo(q.dtype).min)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


def _baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q, k, v = (x.reshape(batch * heads, length, dim) for x in (q, k, v))
    mask = torch.zeros(length, length).masked_fill(~_causal(length), -1e9).expand(batch * heads, -1, -1)
    weights = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1.0, alpha=dim**-0.5).softmax(-1)
    return torch.bmm(weights, v).view(batch, heads, length, dim)


def _tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tril = torch.tril(torch.ones(q.shape[-2], q.shape[-2]))
    scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(tril == 0, float("-inf"))
    return F.softmax(scores, dim=-1) @ v


class HandWritten(nn.Module):
    """A GPT of two layers around one form of attention."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.embedding = nn.Embedding(256, DIM)
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states [B, N, D] of token ids [B, N]."""
        x = self.embedding(ids)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            split = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in qkv(x).chunk(3, dim=-1))
            x = x + out(self.attend(*split).transpose(1, 2).flatten(-2))
        return x


def _hand_written(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Subject:
    ids = torch.randint(0, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return Subject(HandWritten(attend), args=(ids,))


def _encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:  # noqa: ANN401 (torch's own options)
    return nn.TransformerEncoderLayer(DIM, HEADS, 96, batch_first=True, **options)


def _torch_models() -> dict[str, Callable[[], Subject]]:
    x = _random(BATCH, LENGTH, DIM)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, -23:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)

    def decoder() -> nn.Module:
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS, 96, batch_first=True), LAYERS)

    def attention() -> nn.Module:
        return nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    return {
        "TransformerEncoder": lambda: Subject(nn.TransformerEncoder(_encoder_layer(), LAYERS), args=(x,)),
        "TransformerEncoder-norm-first": lambda: Subject(
            nn.TransformerEncoder(_encoder_layer(norm_first=True), LAYERS, enable_nested_tensor=False), args=(x,)
        ),
        "TransformerEncoder-causal": lambda: Subject(
            nn.TransformerEncoder(_encoder_layer(), LAYERS), {"mask": causal, "is_causal": True}, (x,)
        ),
        "TransformerEncoder-padded": lambda: Subject(
            nn.TransformerEncoder(_encoder_layer(), LAYERS, enable_nested_tensor=False),
            {"src_key_padding_mask": padding},
            (x,),
            keep=~padding,
        ),
        "TransformerDecoder": lambda: Subject(decoder(), {"tgt_mask": causal, "tgt_is_causal": True}, (x, x.flip(1))),
        "Transformer": lambda: Subject(
            nn.Transformer(DIM, HEADS, LAYERS, LAYERS, 96, batch_first=True), {"tgt_mask": causal}, (x, x.flip(1))
        ),
        "MultiheadAttention": lambda: Subject(attention(), args=(x, x, x)),
        "MultiheadAttention-no-weights": lambda: Subject(attention(), {"need_weights": False}, (x, x, x)),
        "MultiheadAttention-cross": lambda: Subject(attention(), {"need_weights": False}, (x, x.flip(1), x.flip(1))),
    }


def _diffusers(name: str, config: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> Callable[[], Subject]:
    def make() -> Subject:
        return Subject(getattr(_module("diffusers"), name)(**config), inputs())

    return make


def _diffusion_models() -> dict[str, Callable[[], Subject]]:
    text, time = _random(1, 24, 32), torch.tensor([1.0])
    image = _random(1, 4, 28, 28)  # 14 x 14 patches
    heads = {"num_layers": LAYERS, "attention_head_dim": 16, "num_attention_heads": 2}
    flux = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 4, 8],
    }
    sd3 = {"sample_size": 28, "patch_size": 2, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 32}
    sd3 |= {**heads, "joint_attention_dim": 32, "pooled_projection_dim": 64}
    wan = {**heads, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16}
    wan |= {"ffn_dim": 32, "attention_head_dim": 12}
    pixart = {**heads, "sample_size": 28, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 32}
    pixart |= {"caption_channels": 32, "use_additional_conditions": False, "norm_type": "ada_norm_single"}
    dit = {**heads, "sample_size": 28, "in_channels": 4, "patch_size": 2, "num_embeds_ada_norm": 8}
    pixels = {"hidden_states": image, "encoder_hidden_states": text}
    return {
        "Flux": _diffusers(
            "FluxTransformer2DModel",
            flux,
            lambda: {
                "hidden_states": _random(1, 196, 4),
                "encoder_hidden_states": text,
                "pooled_projections": _random(1, 32),
                "timestep": time,
                "img_ids": _random(196, 3),
                "txt_ids": torch.zeros(24, 3),
            },
        ),
        "SD3": _diffusers(
            "SD3Transformer2DModel", sd3, lambda: {**pixels, "pooled_projections": _random(1, 64), "timestep": time}
        ),
        "Wan": _diffusers(
            "WanTransformer3DModel",
            wan,
            lambda: {"hidden_states": _random(1, 4, 2, 24, 24), "encoder_hidden_states": text, "timestep": time},
        ),
        "PixArt": _diffusers(
            "PixArtTransformer2DModel",
            pixart,
            lambda: {
                **pixels,
                "timestep": time,
                "encoder_attention_mask": torch.ones(1, 24),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
        ),
        "DiT": _diffusers(
            "DiTTransformer2DModel",
            dit,
            lambda: {"hidden_states": image, "timestep": torch.tensor([1]), "class_labels": torch.tensor([1])},
        ),
        "UNet2DCondition": _diffusers(
            "UNet2DConditionModel",
            {
                "sample_size": 16,
                "block_out_channels": (32, 64),
                "layers_per_block": 1,
                "cross_attention_dim": 32,
                "attention_head_dim": 8,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            },
            lambda: {"sample": _random(1, 4, 16, 16), "timestep": 1, "encoder_hidden_states": text},
        ),
    }


def _timm(name: str, size: int = 224, **options: Any) -> Callable[[], Subject]:  # noqa: ANN401 (timm's own options)
    def make() -> Subject:
        return Subject(_module("timm").create_model(name, **options), args=(_random(1, 3, size, size),))

    return make


def _timm_models() -> dict[str, Callable[[], Subject]]:
    few, narrow, stages = {"depth": LAYERS}, {"embed_dim": DIM, "num_heads": HEADS}, {"depths": (1, 1, 1, 1)}
    return {
        "ViT": _timm("vit_tiny_patch16_224", **few),
        "ViT-rotary": _timm("vit_base_patch16_rope_224", **few),
        "ViT-relative-positions": _timm("vit_relpos_small_patch16_224", **few),
        "DeiT3": _timm("deit3_small_patch16_224", **few),
        "DINOv2-registers": _timm("vit_small_patch14_reg4_dinov2", img_size=224, **few),
        "SigLIP": _timm("vit_base_patch16_siglip_224", **few, **narrow),
        "EVA-02": _timm("eva02_tiny_patch14_224", **few),
        "BEiT": _timm("beit_base_patch16_224", **few, **narrow),
        "CaiT": _timm("cait_xxs24_224", **few),
        "ConViT": _timm("convit_tiny", **few),
        "XCiT": _timm("xcit_nano_12_p16_224", **few),
        "CrossViT": _timm("crossvit_tiny_240", size=240),
        "Hiera": _timm("hiera_tiny_224"),
        "PVTv2": _timm("pvt_v2_b0", **stages),
        "Twins": _timm("twins_svt_small", **stages),
        "Swin": _timm("swin_tiny_patch4_window7_224", **stages),
        "SwinV2": _timm("swinv2_tiny_window8_256", size=256, **stages),
    }


def _torchvision(make: Callable[[Any], nn.Module]) -> Callable[[], Subject]:
    return lambda: Subject(make(_module("torchvision").models), args=(_random(1, 3, 224, 224),))


def _swin(models: Any) -> nn.Module:  # noqa: ANN401 (a module)
    return models.SwinTransformer([4, 4], 32, [1, 1], [2, HEADS], [7, 7])


def _swin_v2(models: Any) -> nn.Module:  # noqa: ANN401 (a module)
    parts = models.swin_transformer
    blocks = {"block": parts.SwinTransformerBlockV2, "downsample_layer": parts.PatchMergingV2}
    return models.SwinTransformer([4, 4], 32, [1, 1], [2, HEADS], [8, 8], **blocks)


_TORCHVISION: dict[str, Callable[[Any], nn.Module]] = {
    "ViT": lambda models: models.VisionTransformer(224, 16, LAYERS, HEADS, DIM, 96),
    "Swin": _swin,
    "SwinV2": _swin_v2,
    "MaxViT": lambda models: models.maxvit.MaxVit((224, 224), 32, 7, [32, 64], [1, 1], 16, 0.0),
}


def _module(name: str) -> Any:  # noqa: ANN401 (a module)
    try:
        return importlib.import_module(name)
    except Exception as error:  # builds for another torch fail in many ways
        raise CannotBuildError(f"{name} cannot be imported: {type(error).__name__}: {str(error)[:120]}") from error


MODELS: dict[str, Callable[[], Subject]] = {
    "hand-written: scaled_dot_product_attention": lambda: _hand_written(_sdpa),
    "hand-written: matmul chain": lambda: _hand_written(_matmul),
    "hand-written: einsum": lambda: _hand_written(_einsum),
    "hand-written: bmm, view, baddbmm": lambda: _hand_written(_baddbmm),
    "hand-written: @, masked_fill of tril": lambda: _hand_written(_tril),
    **{f"torch.nn: {name}": make for name, make in _torch_models().items()},
    **{f"diffusers: {name}": make for name, make in _diffusion_models().items()},
    **{f"timm: {name}": make for name, make in _timm_models().items()},
    **{f"torchvision: {name}": _torchvision(make) for name, make in _TORCHVISION.items()},
}


def build(name: str) -> Subject:
    """One of ``MODELS``, in eval mode.

    Raises:
        CannotBuildError: With the reason.
    """
    torch.manual_seed(0)
    try:
        subject = MODELS[name]()
    except CannotBuildError:
        raise
    except Exception as error:  # another release of the library may want other arguments
        raise CannotBuildError(f"{type(error).__name__}: {str(error)[:160]}") from error
    stir(subject.model.eval())
    return subject
