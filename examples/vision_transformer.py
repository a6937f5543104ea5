"""A vision transformer on a large image: attention without a causal mask, made sparse the same way.

python examples/vision_transformer.py                       # a small ViT with random weights
python examples/vision_transformer.py --image 2048          # 16384 patches
"""

import argparse
from collections.abc import Sequence

import torch
import transformers

import s2o_compile
from s2o_compile import S2OConfig


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Show the report of a ViT, run it densely and through S2O, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=int, default=512, help="height and width in pixels; a patch has 16")
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--inner-backend", default="inductor", help='"eager" compiles nothing behind the rewrite')
    options = parser.parse_args(arguments)

    print("Random weights: shows that attention without a causal mask is rewritten, not a gain.")
    torch.manual_seed(0)
    sizes = {"image_size": options.image, "patch_size": 16, "hidden_size": 64, "intermediate_size": 128}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    model, image = transformers.ViTModel(config).eval(), torch.rand(1, 3, options.image, options.image)

    # A thousand patches would run dense for being few.
    sparse = S2OConfig(tau=options.tau, min_seq_len=0, inner_backend=options.inner_backend)
    print(s2o_compile.explain(model, image, config=sparse))
    fast = s2o_compile.optimize(model, sparse)
    expected, output = model(image).last_hidden_state, fast(image).last_hidden_state
    print(f"relative difference to dense: {((output - expected).norm() / expected.norm()).item():.4f}")


if __name__ == "__main__":
    main()
