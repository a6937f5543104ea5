"""Tiny models of transformers, their masks, and the masks that the implementation "s2o" describes."""

import torch
import transformers
from transformers import masking_utils

from s2o_compile import S2OConfig
from s2o_compile.transformers import configure, s2o_mask

EXACT = S2OConfig(tau=0.0, min_seq_len=0)
LENGTH = 200
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TURNS = {"head_dim": 8, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 40}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**TURNS, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", TURNS),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**TURNS, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "attention_chunk_size": 150,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
        },
    ),
    "bert": ("BertModel", "BertConfig", {}),
    "modernbert_decoder": (
        "ModernBertDecoderForCausalLM",
        "ModernBertDecoderConfig",
        {
            "local_attention": 80,
            "layer_types": TURNS["layer_types"],
            **{f"{name}_token_id": 1 for name in ("bos", "cls", "sep")},
        },
    ),
}
MASKS = {
    "llama": ["causal"] * 2,
    "mistral": ["causal, window 40"] * 2,
    "gemma2": ["causal, window 40", "causal"],
    "gemma3": ["causal, window 40", "causal"],
    "gpt_oss": ["causal, window 40", "causal"],
    "llama4": ["causal", "causal", "causal"],  # the first layer attends in two chunks
    "bert": ["bidirectional"] * 2,
    "modernbert_decoder": ["causal, window 40", "causal"],
}


def tiny(name, implementation="eager"):
    torch.manual_seed(0)
    model, config, sizes = MODELS[name]
    config = getattr(transformers, config)(**SIZES | sizes, attn_implementation=implementation)
    model = getattr(transformers, model)(config).eval()
    for parameter in model.parameters():  # sharper attention than at initialisation
        parameter.data.mul_(2)
    return model


def inputs(padding="none", length=LENGTH):
    ids = torch.randint(1, 97, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :30] = 0
    elif padding == "right":
        mask[0, -30:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output(model, **given):
    out = model(**given)
    return getattr(out, "logits", None) if hasattr(out, "logits") else out.last_hidden_state


def sparse(model, config=EXACT):
    model.set_attn_implementation("s2o")
    configure(model, config)
    return model


CAUSAL = masking_utils.causal_mask_function


def described(**arguments):
    given = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "mask_function": CAUSAL, "device": "cpu"}
    given["config"] = transformers.LlamaModel.config_class()
    return s2o_mask(**given | arguments)
