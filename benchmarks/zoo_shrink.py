"""Shrink any configuration of transformers to a tiny model, by the names of its fields.

Rules are regular expressions on names, tried in order; what none of them knows stays as it is. A list with one entry a
layer keeps the layers that differ, so that sliding and full attention are both in the tiny model.
"""

from __future__ import annotations

import re
from typing import Any

VOCABULARY, HIDDEN, HEADS, HEAD_DIM, FEED_FORWARD, LAYERS = 256, 64, 4, 16, 96, 2
WINDOW, POSITIONS, PATCHES = 48, 512, 12  # 12 x 12 patches: 144 tokens, more than a tile of the operator

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
    (r"^index_top_?k$", 32),  # fewer keys than there are, or what is chosen by data would look causal
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
    (r"(upsample_groups|intra_bottleneck_size|neck_hidden_size|fusion_hidden_size|bottleneck_features)$", HIDDEN),
    (r"num_kv_shared_layers$", 0),
    (r"num_(object_)?queries$", 20),
    (r"attn_layer_period$", 2),
    (r"attn_layer_offset$", 1),
    (r"(mamba_d_state|ssm_state_size|state_size|mamba_state_dim)$", 8),
)  # fmt: skip
_OPEN = 1 << 20  # stands for a number that a configuration leaves open
_LISTS = ((r"(conv_dim|tdnn_dim)$", 32), (r"^decoder_in_channels$", HIDDEN))


def shrink(defaults: dict[str, Any], special: dict[str, Any] | None = None, *, fill: bool = False) -> dict[str, Any]:
    """Keyword arguments for a configuration class.

    Args:
        defaults: The default configuration's ``to_dict()``.
        special: What overrides the rules; a dict for the sub-configuration of that name.
        fill: Whether the rules also answer for fields that the default configuration leaves open.
    """
    special = special or {}
    small = {
        name: _shrunk(name, value, defaults, special, fill) for name, value in defaults.items() if name not in _DROPPED
    }
    small.update({name: value for name, value in special.items() if not _is_configuration(defaults.get(name))})
    _shrink_layers(defaults, small, special)
    _shrink_stages(defaults, small)
    _shrink_vocabulary(small)
    patch = small.get("patch_size")
    pyramid = isinstance(defaults.get("depths"), list)  # its windows fit the size that it has
    if (
        isinstance(patch, int)
        and isinstance(small.get("image_size"), int)
        and not pyramid
        and "image_size" not in special
    ):
        small["image_size"] = PATCHES * patch if patch > 2 else 128
    if "use_pretrained_backbone" in small:
        small["use_pretrained_backbone"] = False
    return {name: value for name, value in small.items() if value is not None or defaults.get(name) is not None}


# What a configuration derives itself, or what names layers that are gone.
_DROPPED = frozenset(
    (
        "model_type", "transformers_version", "architectures", "id2label", "label2id", "_name_or_path", "dtype",
        "out_features", "out_indices", "stage_names", "per_layer_config",
    )
)  # fmt: skip


def _is_configuration(value: object) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _shrunk(name: str, value: Any, siblings: dict[str, Any], special: dict[str, Any], fill: bool) -> Any:  # noqa: ANN401
    if _is_configuration(value):
        return {"model_type": value["model_type"], **shrink(value, special.get(name), fill=fill)}
    if isinstance(value, dict):
        return _rope(value) if name.startswith("rope") else value
    if name == "head_dim" and (value is None or value == siblings.get("qk_rope_head_dim")):
        return HEAD_DIM if value is None else 8
    if name == "depths" and isinstance(value, list):
        return [1] * len(value)
    stages = siblings.get("depths") or siblings.get("blocks_per_stage")
    if isinstance(stages, list) and name in ("embed_dim", "hidden_size", "num_layers"):
        return value  # a pyramid: its heads are a list that fits this width
    if isinstance(value, list | tuple):
        return next(([small] * len(value) for pattern, small in _LISTS if re.search(pattern, name)), value)
    if value is None and fill:
        value = _OPEN
    if isinstance(value, bool) or not isinstance(value, int) or value == 0:
        return value
    for pattern, small in _RULES:
        if re.search(pattern, name):
            if small == "kv_heads":
                heads = next((siblings[n] for n in ("num_attention_heads", "n_head", "num_heads") if n in siblings), 0)
                return 1 if value == 1 else HEADS if value == heads else HEADS // 2
            return min(value, small) if small is WINDOW else small
    return None if value is _OPEN else value


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
    if count is None or not isinstance(defaults[count], int) or isinstance(defaults.get("depths"), list):
        return  # stages have depths, and stay as many
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


def _shrink_stages(defaults: dict[str, Any], small: dict[str, Any]) -> None:
    """A backbone with several outputs: as many layers as outputs, where stages are layers."""
    outputs = defaults.get("out_indices")
    if not isinstance(outputs, list | tuple) or len(outputs) < 2:
        return
    layered = isinstance(defaults.get("num_hidden_layers"), int) and not isinstance(defaults.get("depths"), list)
    if layered:
        small["num_hidden_layers"] = len(outputs)
    small["out_indices"] = list(range(1, len(outputs) + 1)) if layered else list(outputs)


def _shrink_vocabulary(small: dict[str, Any]) -> None:
    """Token ids below the vocabulary: different ones, near its end, so that random text can avoid them."""
    if "vocab_size" in small or any(name.endswith("_token_id") for name in small):
        names = [n for n in small if n.endswith(("token_id", "token_index")) and isinstance(small[n], int)]
        for place, name in enumerate(names):
            if not 0 <= small[name] < VOCABULARY:
                small[name] = VOCABULARY - 1 - place
