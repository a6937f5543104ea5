"""Shrink any configuration of transformers to a tiny model, by the names of its fields.

Rules are regular expressions on names, tried in order; what none of them knows stays as it is. A list with one entry a
layer keeps the layers that differ, so that sliding and full attention are both in the tiny model.
"""

from __future__ import annotations

import re
from typing import Any

VOCABULARY, HIDDEN, HEADS, HEAD_DIM, FEED_FORWARD, LAYERS = 256, 64, 4, 16, 96, 2
WINDOW, POSITIONS, PATCHES = 48, 512, 13  # 13 x 13 patches: 169 tokens, more than a tile of the operator

_RULES: tuple[tuple[str, Any], ...] = (
    (r"(text_|d_|decoder_|encoder_)?vocab_size(_per_layer_input)?$|^(n_)?words$", VOCABULARY),
    (r"num_key_value_heads$|n_head_kv$|num_kv_heads$|multi_query_group_num$", "kv_heads"),
    (r"linear_num_(key|value)_heads$", 4),
    (r"(mamba_n_heads|mamba_num_heads|num_ssm_heads|n_mamba_heads)$", 8),
    (r"(num_|n_)?((en|de)coder_|cross_|hidden_)?(attention_)?heads$|^n_heads?$|^num_heads$|^attn_heads$", HEADS),
    (r"(qk_rope_head_dim|rope_head_dim|rotary_dim)$", 8),
    (r"(qk_nope_head_dim|v_head_dim|index_head_dim)$", HEAD_DIM),
    (r"qk_head_dim$", HEAD_DIM + 8),
    (r"(^|_)(head_dim|d_kv|kv_channels|attention_head_size|d_head|head_size)$", HEAD_DIM),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank)$", 32),
    (r"(^num_local_experts|^num_experts|^n_routed_experts|^moe_num_experts|^num_routed_experts)$", 4),
    (r"(num_experts_per_tok|top_k_experts|moe_k|moe_top_?k|num_selected_experts|^top_k$)", 2),
    (r"^(n_group|topk_group|num_expert_group)s?$", 1),
    (r"(intermediate_size(_mlp)?|ffn_dim|d_ff|n_inner|ffn_hidden_size|mlp_dim)$", FEED_FORWARD),
    (r"feed_forward_(proj_)?dim$", FEED_FORWARD),
    (r"(moe_)?(shared_)?(expert_)?intermediate_size$|dense_intermediate_size$|_ffn_size$", FEED_FORWARD),
    (r"num_(hidden_layers|layers|decoder_layers|encoder_layers|blocks)$|^n_layers?$|^((en|de)coder_)?layers$", LAYERS),
    (r"^((en|de)coder_(num_)?(hidden_)?layers|depth|num_hidden_groups)$", LAYERS),
    (r"first_k_dense_replace$|moe_layer_start_index$|num_dense_layers$", 1),
    (r"(sliding_window|attention_window|attention_chunk_size|local_attention|window_attn_size)$", WINDOW),
    (r"(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions)$", POSITIONS),
    (r"(max_seq_len|max_sequence_length)$", POSITIONS),
    (r"(^|_)(hidden_size|d_model|n_embd|embed_dim|emb_dim|width|model_dim|hidden_dim)$", HIDDEN),
    (r"(^|_)(embedding_size|embed_size)$", HIDDEN),
    (r"(hidden_size_per_layer_input|lru_width|word_embed_proj_dim|projection_dim|output_dim|out_hidden_size)$", HIDDEN),
    (r"(text_dim|mm_hidden_size|projector_hidden_size|conv_hidden_size)$", HIDDEN),
    (r"(output_hidden_size|pooler_output_size)$", HIDDEN),
    (r"(linear_(key|value)_head_dim|mamba_head_dim|mamba_d_head|mamba_headdim)$", HEAD_DIM),
    (r"(mamba_d_state|ssm_state_size|state_size|mamba_state_dim)$", 8),
)  # fmt: skip
_PER_CHANNEL = re.compile(r"(conv_dim|tdnn_dim)$")


def shrink(defaults: dict[str, Any], special: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments for a configuration class.

    Args:
        defaults: The default configuration's ``to_dict()``.
        special: What overrides the rules; a dict for the sub-configuration of that name.
    """
    special = special or {}
    small = {name: _shrunk(name, value, defaults, special) for name, value in defaults.items() if name not in _DROPPED}
    small.update(
        {name: value for name, value in special.items() if not isinstance(value, dict) or name not in defaults}
    )
    _shrink_layers(defaults, small, special)
    _shrink_vocabulary(small)
    patch = small.get("patch_size")
    if isinstance(patch, int) and isinstance(small.get("image_size"), int) and "image_size" not in special:
        small["image_size"] = PATCHES * patch
    return {name: value for name, value in small.items() if value is not None or defaults.get(name) is not None}


# What a configuration derives itself, or what names layers that are gone.
_DROPPED = frozenset(
    (
        "model_type", "transformers_version", "architectures", "id2label", "label2id", "_name_or_path", "dtype",
        "out_features", "out_indices", "stage_names", "per_layer_config",
    )
)  # fmt: skip


def _shrunk(name: str, value: Any, siblings: dict[str, Any], special: dict[str, Any]) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        if "model_type" in value:
            own = special.get(name, {})
            kept = {"model_type": value["model_type"]}
            return {**kept, **shrink(value, own if isinstance(own, dict) else {})}
        return _rope(value) if name.startswith("rope") else value
    if name == "head_dim" and (value is None or value == siblings.get("qk_rope_head_dim")):
        return HEAD_DIM if value is None else 8
    if name == "depths" and isinstance(value, list):
        return [1] * len(value)
    if isinstance(siblings.get("depths"), list) and name in ("embed_dim", "hidden_size"):
        return value  # a pyramid: its heads are a list that fits this width
    if isinstance(value, list) and _PER_CHANNEL.search(name):
        return [32] * len(value)
    if isinstance(value, bool) or not isinstance(value, int) or value == 0:
        return value
    for pattern, small in _RULES:
        if re.search(pattern, name):
            if small == "kv_heads":
                heads = next((siblings[n] for n in ("num_attention_heads", "n_head", "num_heads") if n in siblings), 0)
                return 1 if value == 1 else HEADS if value == heads else HEADS // 2
            return min(value, small) if small is WINDOW else small
    return value


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Sections and per-frequency factors, which have as many parts as the head's half."""
    half = HEAD_DIM // 2
    rope = {name: _rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
    if isinstance(sections := rope.get("mrope_section"), list):
        rope["mrope_section"] = [2, 3, 3] if len(sections) == 3 else [half // len(sections)] * len(sections)
    for name in ("long_factor", "short_factor"):
        if isinstance(rope.get(name), list):
            rope[name] = rope[name][:half]
    return rope


def _shrink_layers(defaults: dict[str, Any], small: dict[str, Any], special: dict[str, Any]) -> None:
    """Lists with an entry a layer: the first layer of each type, two at least."""
    count = next(
        (n for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth") if n in defaults), None
    )
    if count is None or not isinstance(defaults[count], int):
        return
    total = defaults[count]
    lists = [n for n, v in defaults.items() if isinstance(v, list) and len(v) == total and total > LAYERS]
    typed = [n for n in lists if all(isinstance(x, str) for x in defaults[n])]
    kept = list(range(min(LAYERS, total)))
    if typed:
        layers = list(zip(*(defaults[name] for name in typed), strict=True))
        kept = sorted({layers.index(layer) for layer in layers})[:4]
        kept = kept if len(kept) > 1 else [0, 1]
    for name in lists:
        if name not in special:
            small[name] = [defaults[name][index] for index in kept]
    if count not in special and lists:
        small[count] = len(kept)


def _shrink_vocabulary(small: dict[str, Any]) -> None:
    """Token ids below the vocabulary: different ones, near its end, so that random text can avoid them."""
    if "vocab_size" in small or any(name.endswith("_token_id") for name in small):
        names = [n for n in small if n.endswith(("token_id", "token_index")) and isinstance(small[n], int)]
        for place, name in enumerate(names):
            if not 0 <= small[name] < VOCABULARY:
                small[name] = VOCABULARY - 1 - place
