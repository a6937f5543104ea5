"""Export a model with sparse attention and compile it into a package that runs without Python and without s2o_compile.

python examples/cpp/make_package.py model.pt2, then run_package (main.cpp) runs it.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import s2o_compile


class LastLogits(torch.nn.Module):
    """Token ids in, the logits of the last token out: a prefill, as a C++ program wants to call it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, N] -> [B, 1, vocabulary]."""
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def random_llama() -> LlamaForCausalLM:
    """A small one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape, **heads))


def main(
    path: str = "model.pt2",
    max_len: int = 2048,
    model: torch.nn.Module | None = None,
    config: s2o_compile.S2OConfig | None = None,
) -> s2o_compile.Package:
    """Package a causal language model of transformers, or a random one, for any length up to ``max_len``."""
    lengths = {1: torch.export.Dim("length", min=1, max=max_len)}
    program = s2o_compile.export(
        LastLogits(model or random_llama()).eval(),
        (torch.randint(64, (1, 1000)),),
        config=config or s2o_compile.S2OConfig(min_seq_len=512),
        dynamic_shapes=(lengths,),
    )
    packaged = s2o_compile.package(program, path)
    print(packaged)
    return packaged


if __name__ == "__main__":
    main(*sys.argv[1:])
