"""The golden set: outputs of the operator, and the reports of models, to be held against those of another commit.

``python -m tests.helpers.golden FILE`` writes it. Outputs are hashed bit for bit, so that two files are of one machine
and one torch. Run it on two checkouts and compare the files.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig

HEADS, KV_HEADS, LENGTH, DIM = 4, 2, 640, 32


def tensors(queries=LENGTH, keys=LENGTH, dim=DIM, value_dim=DIM, batch=1, dtype=torch.float32):
    """Query, key and value; keys lie on a walk, so that neighbours are alike and rankings matter."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((HEADS, queries, dim), (KV_HEADS, keys, dim), (KV_HEADS, keys, value_dim))
    query, key, value = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    topics = torch.randn(batch, KV_HEADS, keys // 16 + 1, dim, generator=generator).repeat_interleave(16, 2)
    return tuple(x.to(dtype) for x in (query * 2, key + 2 * topics[:, :, :keys], value))


def operator_calls():
    """Name and arguments of every call."""
    keep = torch.arange(LENGTH)[None] >= 37
    sinks = torch.linspace(-1.0, 2.0, HEADS)
    sparse = {"min_seq_len": 1, "tau": 0.6}
    rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    masks = {
        "causal": {"causal": True},
        "bidirectional": {},
        "offset": {"causal": True, "causal_offset": -50},
        "window": {"causal": True, "window": 100},
        "chunked": {"causal": True, "attention_chunk": 256},
        "padded": {"causal": True, "key_mask": keep},
        "padded-mean": {"causal": True, "key_mask": keep, "fully_masked": "mean"},
        "softcap": {"causal": True, "softcap": 5.0},
        "sinks": {"causal": True, "sinks": sinks},
        "lse": {"causal": True, "return_lse": True},
        "dense-heads": {"causal": True, "dense_heads": (1,)},
        "attn_mask-causal": {"attn_mask": columns <= rows},
        "attn_mask-other": {"attn_mask": (columns + rows) % 3 > 0},
        "attn_mask-added": {"attn_mask": torch.where(columns <= rows, 0.0, torch.finfo(torch.float32).min)},
    }
    for name, keywords in masks.items():
        yield name, keywords, sparse
        yield name + "-dense", keywords, {}
    options = {"segment_len": 128, "ranking_per": "head", "ranking": "mean_query", "tau": (0.0, 0.2, 0.5, 1.0)}
    for name, option in options.items():
        yield f"causal-{name}", {"causal": True}, {**sparse, name: option}
    yield "causal-flex", {"causal": True}, {**sparse, "implementation": "flex"}


def outputs(implementation="auto"):
    """Hash and mean size of the output of every call."""
    found = {}
    for name, keywords, options in operator_calls():
        if implementation != "auto" and ("implementation" in options or not options):
            continue
        config = S2OConfig(**{"implementation": implementation, **options})
        result = s2o_compile.attention(*tensors(), **keywords, config=config)
        found[name] = [_text(x) for x in (result if isinstance(result, tuple) else (result,))]
    return found


def _text(x):
    x = x.contiguous()
    digest = hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return f"{digest} {tuple(x.shape)} {x.nan_to_num(neginf=0.0).abs().mean().item():.6g}"


class Attentions(nn.Module):
    """One attention a way to write it."""

    def forward(self, q, k, v, padding):
        n = q.shape[2]
        rows, columns = torch.arange(n)[:, None], torch.arange(n)
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        written = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        causal = torch.where(columns <= rows, 0.0, torch.finfo(q.dtype).min)
        return [
            scaled_dot_product_attention(q, k, v, is_causal=True),
            scaled_dot_product_attention(q, k, v, attn_mask=columns <= rows),
            scaled_dot_product_attention(q, k, v, attn_mask=(columns <= rows) & (columns > rows - 64)),
            scaled_dot_product_attention(q, k, v, attn_mask=padding[:, None, None, :]),
            scaled_dot_product_attention(q, k, v, attn_mask=(columns + rows) % 3 > 0),
            scaled_dot_product_attention(q, k, v, attn_mask=padding[:, None, None, :] * 0.5),
            (written + causal).softmax(-1) @ v,
            (20.0 * torch.tanh(written / 20.0) + causal).softmax(-1) @ v,
            (written * 2 + rows - columns).softmax(-1) @ v,
            written.relu().softmax(-1) @ v,
            flex_attention(
                q, k, v, block_mask=create_block_mask(lambda b, h, i, j: j <= i, None, None, n, n, device="cpu")
            ),
            flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (j - i) * 0.1),
        ]


def transformers_models():
    """Small models of transformers, by name, and their inputs."""
    import transformers as hf

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    small = {**sizes, "intermediate_size": 128, "max_position_embeddings": 1024}
    ids = torch.randint(3, 128, (1, 600), generator=torch.Generator().manual_seed(5))
    configs = {
        "gpt2": hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128),
        "llama": hf.LlamaConfig(**small, num_key_value_heads=2),
        "gemma3": hf.Gemma3TextConfig(**small, num_key_value_heads=1, head_dim=32, sliding_window=64),
        "bert": hf.BertConfig(**small),
    }
    for name, config in configs.items():
        for implementation in ("sdpa", "eager"):
            torch.manual_seed(0)
            config._attn_implementation = implementation
            yield f"{name}-{implementation}", hf.AutoModel.from_config(config).eval(), (ids,)


def reports():
    """What `explain` says of every model, as values, and as text without times."""
    config = S2OConfig(min_seq_len=1)
    padding = torch.arange(256)[None] < 200
    models = [("attentions", Attentions(), (*tensors(256, 256), padding)), *transformers_models()]
    found = {}
    for name, model, inputs in models:
        with torch.no_grad():
            report = s2o_compile.explain(model, *inputs, config=config)
        text = [line for line in str(report).splitlines() if not line.startswith("passes:")]
        found[name] = {"sites": [dataclasses.asdict(site) for site in report.sites], "text": text}
    return found


def main():
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        found = {"triton": outputs("triton")}
    else:
        found = {"outputs": outputs(), "reports": reports()}
    with open(sys.argv[1], "w") as file:
        json.dump(found, file, indent=1, default=str)


if __name__ == "__main__":
    main()
