"""Third-party attention kernels: found by name and left as they are, with a reason.

Their masks are options of the kernel, and their layouts differ from package to package. Models that call them can call
SDPA instead, which the `sdpa` frontend rewrites.
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from s2o_compile.kernels.support.torch_compat import OpOverload, OpOverloadPacket
from s2o_compile.passes.graph.rejected import Rejected
from s2o_compile.passes.masks.prover import MaskProver
from s2o_compile.passes.site import is_named_attention

_NAME = re.compile(
    r"flash_?attn|flash_?attention|memory_efficient_attention|xformers|sage_?attn|sageattention|paged_attention|"
    r"unified_attention|native_multi_head_attention"
)


def is_attention(node: fx.Node) -> bool:
    """Whether a node calls an attention kernel of a package other than torch."""
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        namespace, _, name = str(target).partition(".")
        return bool(_NAME.search(str(target).lower())) or is_named_attention(namespace, name.partition(".")[0])
    module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", "")
    if module == "torch.backends.cuda":  # asks which kernel SDPA may choose
        return False
    return bool(_NAME.search(f"{module}.{name}".lower())) and bool(re.search("attn|attention", name.lower()))


def operands(node: fx.Node) -> dict[str, Any]:
    """The arguments of a third-party kernel are unknown."""
    return {}


def match(node: fx.Node, prover: MaskProver) -> Rejected:
    """Always a rejection."""
    return Rejected(
        "%s is an attention kernel of its own, left as it is; choose scaled_dot_product_attention (in transformers "
        'attn_implementation="sdpa")',
        node.target,
    )
