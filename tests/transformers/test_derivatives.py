"""``attn_implementation="s2o"`` under derivatives that ``requires_grad`` does not show: those of dense attention."""

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from transformers import GptOssConfig, GptOssModel, LlamaConfig, LlamaModel

import s2o_compile.transformers
from s2o_compile import S2OConfig

pytestmark = pytest.mark.filterwarnings("ignore::s2o_compile.DenseGradientWarning")
LENGTH = 640
SIZES = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
X, T = (torch.randn(1, LENGTH, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
PADDING = torch.ones(1, LENGTH, dtype=torch.long)
PADDING[:, :5] = 0


@functools.cache
def model(name):
    torch.manual_seed(0)
    if name == "llama":
        return LlamaModel(LlamaConfig(**SIZES)).eval()
    return GptOssModel(GptOssConfig(**SIZES, num_local_experts=1, num_experts_per_tok=1)).eval()


def function(name, implementation, padding):
    made = model(name)
    made.set_attn_implementation(implementation)
    if implementation == "s2o":
        s2o_compile.transformers.configure(made, S2OConfig(tau=4.0, min_seq_len=0, segment_len=128))
    return lambda x: made(inputs_embeds=x, attention_mask=padding, use_cache=False).last_hidden_state


def by_duals(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, T))).tangent


def reentrant(f):
    x = X.clone().requires_grad_()
    with torch.enable_grad():
        output = checkpoint(f, x, use_reentrant=True)
        (output * T).sum().backward()
    return torch.cat([output.detach(), x.grad])


TRANSFORMS = {
    "jvp": lambda f: jvp(f, (X,), (T,))[1],
    "duals": by_duals,
    "grad_vmap": lambda f: grad(lambda both: (vmap(f)(both) * T).sum())(torch.stack([X, T])),
    "jvp_grad": lambda f: jvp(grad(lambda x: (f(x) * T).sum()), (X,), (T,))[1],
    "reentrant": reentrant,
}


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize(("name", "transform"), [*(("llama", name) for name in TRANSFORMS), ("gpt_oss", "reentrant")])
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:None of the inputs have requires_grad")
def test_transforms(name, transform, padding):
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH):
            expected = TRANSFORMS[transform](function(name, "sdpa" if name == "llama" else "eager", padding))
        found = TRANSFORMS[transform](function(name, "s2o", padding))
    if padding is not None:  # rows of padding hold anything
        found, expected = (x.narrow(-2, 5, LENGTH - 5) for x in (found, expected))
    assert expected.abs().max() > 0
    assert (found - expected).norm() <= 1e-4 * expected.norm()
