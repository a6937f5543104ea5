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
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type -> configuration fields that override the rules; a dict for a sub-configuration."""

UNBUILT: dict[str, str] = {}
"""Model type -> why it is not tried."""
