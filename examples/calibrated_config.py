"""An error budget instead of a tau: calibrate once, keep the configuration in a file, use it, and see that it holds.

python examples/calibrated_config.py                        # a small Llama with random weights
python examples/calibrated_config.py --model DIR --tokens 16384 --out s2o.json
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

import s2o_compile
from s2o_compile import S2OConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate on one text, evaluate on another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory or name of a causal model; without it a random Llama")
    parser.add_argument("--tokens", type=int, default=2048, help="length of a text")
    parser.add_argument("--error", type=float, default=0.2, help="the budget; a trained model keeps 0.02, that is 2 %%")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "s2o.json")
    options = parser.parse_args(arguments)

    if not options.model:
        print("Random weights: shows how a budget is calibrated, kept in a file and checked, not what it gains.")
    model = load(options.model).eval()
    generator = torch.Generator().manual_seed(0)  # your own text would stand here, as token ids
    known, unknown = torch.randint(model.config.vocab_size, (2, 1, options.tokens), generator=generator)

    short = S2OConfig(min_seq_len=min(options.tokens, 8192))
    config = s2o_compile.calibrate(model, known, options.error, config=short)
    options.out.write_text(config.to_json())

    config = S2OConfig.from_json(options.out.read_text())
    print(f"{config.quality}, in {options.out}")
    print(s2o_compile.evaluate(model, unknown, config, needles=False))
    fast = s2o_compile.optimize(model, config)  # what you would go on with
    print(f"{type(fast).__name__} is ready")


def load(path: str | None) -> transformers.PreTrainedModel:
    """The model asked for, or a small one."""
    if path:
        return transformers.AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 32768}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


if __name__ == "__main__":
    main()
