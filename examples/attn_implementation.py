"""S2O without compiling anything: one of transformers' attention implementations.

python examples/attn_implementation.py                      # a small Mistral with random weights
python examples/attn_implementation.py --model DIR --tokens 16384
"""

import argparse
from collections.abc import Sequence

import torch
import transformers

import s2o_compile
import s2o_compile.transformers  # makes the name "s2o" known
from s2o_compile import S2OConfig


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Read a prompt densely and through S2O, say what ran, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory or name of a causal model; without it a random Mistral")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the prompt")
    options = parser.parse_args(arguments)

    if not options.model:
        print("Random weights: shows what runs sparse, not how fast or how good. Give --model DIR --tokens 16384.")
    model = load(options.model).eval()
    ids = torch.randint(1, model.config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    dense = model(ids).logits

    model.set_attn_implementation("s2o")
    s2o_compile.transformers.configure(model, S2OConfig(min_seq_len=0))  # 2048 tokens would run dense for being short
    with s2o_compile.record() as recording:
        sparse = model(ids).logits
    for call in recording.calls:
        print(f"{call.site}: {call.path}, {call.mask}, density {call.density:.2f}")
    print(f"relative difference to dense: {((sparse - dense).norm() / dense.norm()).item():.4f}")


def load(path: str | None) -> transformers.PreTrainedModel:
    """The model asked for, or a small one."""
    if path:
        return transformers.AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "sliding_window": None}
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 32768}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, **heads))


if __name__ == "__main__":
    main()
