"""What the zoo's generic rules cannot know: fields of single configurations, and architectures that it leaves out."""

from __future__ import annotations

from typing import Any

_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"text_config": _SECTIONS} for name in ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga")},
    **{name: {"text_config": _SECTIONS} for name in ("paddleocr_vl", "qwen2_5_omni_thinker", "glm_image")},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "glm_image_text"), _SECTIONS),
    "glm4v_moe": {"text_config": {"rope_parameters": _HALF}},
    "glm4v_moe_text": {"rope_parameters": _HALF},
    "mamba2": {"num_heads": 8},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32), "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    **{name: {"prediction_length": 24} for name in ("autoformer", "informer", "time_series_transformer")},
    **{name: {"flow_head_config": {"condition_dim": 64}} for name in ("gradium_phonon_tts", "pocket_tts")},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "bros": {"dim_bbox_projection": 16},
    "esm": {"vocab_size": 256, "pad_token_id": 1, "mask_token_id": 250},
    "lilt": {"hidden_size": 96},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type -> configuration fields that override the rules; a dict for a sub-configuration."""

UNBUILT: dict[str, str] = {}
"""Model type -> why it is not tried."""
