"""A long prompt and an answer, densely and through S2O: generate() of an optimized transformers model.

python examples/transformers_generate.py                    # a small Llama with random weights
python examples/transformers_generate.py --model DIR --tokens 16384
"""

import argparse
import time
from collections.abc import Sequence

import torch
import transformers

import s2o_compile
from s2o_compile import S2OConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Prefill and generate twice, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory or name of a causal model; without it a random Llama")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the prompt")
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--inner-backend", default="inductor", help='"eager" compiles nothing behind the rewrite')
    options = parser.parse_args(arguments)

    if not options.model:
        print("Random weights: shows that generate() runs through S2O, not a gain. Give --model DIR --tokens 16384.")
    model = load(options.model).eval()
    ids = torch.randint(1, model.config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    # 2048 tokens would run dense for being short.
    config = S2OConfig(tau=options.tau, min_seq_len=0, inner_backend=options.inner_backend)
    fast = s2o_compile.optimize(model, config)
    with s2o_compile.record() as recording:
        fast.generate(ids, max_new_tokens=8, do_sample=False)  # compiles
    print(recording.report)

    answers = {}
    for name, which in (("dense", model), ("S2O", fast)):
        start = time.perf_counter()
        answers[name] = which.generate(ids, max_new_tokens=8, do_sample=False)[0, options.tokens :]
        print(f"{name}: {time.perf_counter() - start:.1f} s, {answers[name].tolist()}")
    if options.model:  # random weights have no next token that is much better than the others
        print(f"{(answers['dense'] == answers['S2O']).sum()} of 8 new tokens are the same")


def load(path: str | None) -> transformers.PreTrainedModel:
    """The model asked for, or a small one."""
    if path:
        return transformers.AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 32768}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, eos_token_id=None, pad_token_id=0))


if __name__ == "__main__":
    main()
