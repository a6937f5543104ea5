"""The frontend for ``flex_attention``, a higher-order operator whose mask and scores are functions in sub-graphs.

What a query sees is decided twice: by the functions, and by the block tables that say where they are called. Tables are
data. They are proven only where there is no block mask, and torch fills in one block that covers everything.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from s2o_compile.passes import repeat_kv
from s2o_compile.passes.checks import check_tensors
from s2o_compile.passes.graph_values import function_name
from s2o_compile.passes.mask_proof import MaskProof
from s2o_compile.passes.mask_prover import MaskProver
from s2o_compile.passes.operand import Operand
from s2o_compile.passes.site import AttentionSite, Rejected, module_path

_WHOLE = 1 << 30
"""Block size of the table that torch makes where no block mask is given."""
_NAMES = ("query", "key", "value", "score_mod", "block_mask", "scale")


def is_attention(node: fx.Node) -> bool:
    """Whether a node calls flex_attention."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "flex_attention"


def operands(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}


def match(node: fx.Node, prover: MaskProver) -> AttentionSite | Rejected:
    """The attention of a flex_attention call, or why it must stay as it is.

    Args:
        node: A node for which `is_attention` holds.
        prover: The mask prover of the graph.
    """
    call = operands(node)
    if set(call) < set(_NAMES) or not isinstance(call["block_mask"], tuple):
        return Rejected("%s has an unexpected signature", node)
    outputs = [user for user in node.users if user.args[1:] == (0,)]
    if len(outputs) != 1 or any(user.users for user in node.users if user not in outputs):
        return Rejected("more than the output of flex_attention is read")
    *tables, query_block, key_block, mask_mod = call["block_mask"]
    if not _returns_argument(node, call["score_mod"]):
        return Rejected("its score_mod changes the scores; only a flex_attention without one is rewritten")
    whole = query_block == _WHOLE and key_block == _WHOLE and any(function_name(t) == "ones" for t in tables if _is(t))
    if not whole or not _allows_all(node, mask_mod):
        return Rejected(
            "its block mask's tables are data, which prove nothing; use scaled_dot_product_attention with a mask (in "
            'transformers attn_implementation="sdpa")'
        )
    query, key, value = (Operand(call[name]) for name in _NAMES[:3])
    rejected = check_tensors(query.value, key.value, value.value, outputs[0])
    if rejected is not None:
        return rejected
    keys, values = (Operand(repeat_kv.unwrap(operand.node, node, prover)) for operand in (key, value))
    if keys.value.shape[1] == values.value.shape[1]:
        key, value = keys, values
    return AttentionSite(
        name=module_path(node),
        node=outputs[0],
        query=query,
        key=key,
        value=value,
        mask=MaskProof(),
        scale=call["scale"],
        interior=(node,),
    )


def _is(argument: object) -> bool:
    return isinstance(argument, fx.Node)


def _body(node: fx.Node, function: object) -> fx.Graph | None:
    """The sub-graph that a get_attr node names."""
    if not isinstance(function, fx.Node) or function.op != "get_attr" or node.graph.owning_module is None:
        return None
    body = getattr(node.graph.owning_module, str(function.target), None)
    return body.graph if isinstance(body, fx.GraphModule) else None


def _result(body: fx.Graph) -> object:
    result = body.output_node().args[0]
    return result[0] if isinstance(result, tuple) and len(result) == 1 else result


def _returns_argument(node: fx.Node, score_mod: object) -> bool:
    """Whether a score_mod hands the score on as it is."""
    body = _body(node, score_mod)
    return body is not None and _result(body) is body.find_nodes(op="placeholder")[0]


def _allows_all(node: fx.Node, mask_mod: object) -> bool:
    """Whether a mask_mod is constantly true."""
    body = _body(node, mask_mod)
    result = None if body is None else _result(body)
    return result is True or (isinstance(result, fx.Node) and function_name(result) in ("new_ones", "ones"))
