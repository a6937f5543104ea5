"""The frontend for ``flex_attention``, a higher-order operator whose mask and scores are functions in sub-graphs.

    softmax(where(mask_mod, score_mod(scale * q @ k^T), -inf)) @ v        a row without any key gives zeros

The call is written out in this form ahead of itself, and the frontend for hand-written attention reads that. The block
tables decide a second time which keys a query sees, because the functions are called only in listed blocks. So the
tables must follow from the mask_mod, or be promised to (``assume_block_masks``).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from s2o_compile.kernels.support.torch_compat import flex_attention_operator
from s2o_compile.passes.frontends.eager import match as eager
from s2o_compile.passes.frontends.eager.scores import leads_to_product
from s2o_compile.passes.frontends.flex import block_tables
from s2o_compile.passes.frontends.flex.scalar_functions import Inserter, positions, write_out
from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import Size, inherit, value_of
from s2o_compile.passes.graph.rejected import Refused, Rejected, attempt
from s2o_compile.passes.masks.proof import BlockTables, MaskProof
from s2o_compile.passes.masks.prover import MaskProver
from s2o_compile.passes.site import AttentionSite

_NAMES = (
    "query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "score_mod_other_buffers",
    "mask_mod_other_buffers",
)  # fmt: skip
_OPENED = "s2o_flex"
_LARGE = -1e4


@dataclasses.dataclass(frozen=True, eq=False)
class _Opened:
    """The call of flex_attention that a written-out softmax belongs to."""

    call: fx.Node
    tables: BlockTables
    mask: fx.Node  # the mask_mod for all scores, bool
    scores: tuple[fx.Node, ...]  # the nodes of the score_mod


def is_call(node: fx.Node) -> bool:
    """Whether a node calls flex_attention."""
    return node.op == "call_function" and node.target is flex_attention_operator


def is_attention(node: fx.Node) -> bool:
    """Whether a node calls flex_attention, or is the softmax of an opened call."""
    return is_call(node) or _OPENED in node.meta


def operands(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name."""
    call = node.meta[_OPENED].call if _OPENED in node.meta else node
    return {**dict(zip(_NAMES, call.args, strict=False)), **call.kwargs}


def write(node: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    """Writes a call out ahead of it, and returns the node that computes the attention; raises `Refused`.

    ``nodes`` gets the inserted nodes, also if the call is refused.
    """
    call = operands(node)
    if call.keys() != set(_NAMES):
        raise Refused("%s has an unexpected signature", node)
    read = output_of(node)
    query, key, value = (value_of(call[name]) for name in _NAMES[:3])
    tables = block_tables.read(call["block_mask"])
    score_mod, mask_mod = body(node, call["score_mod"]), body(node, tables.mask_mod)
    if score_mod is None or mask_mod is None or any(x is None or x.ndim != 4 for x in (query, key, value)):
        raise Refused("its score_mod or mask_mod is not recorded in the graph")
    insert = Inserter(node, query, nodes)
    groups = query.shape[1] // key.shape[1]
    repeated = [
        insert.call(torch.repeat_interleave, call[name], groups, dim=1) if groups != 1 else call[name]
        for name in ("key", "value")
    ]
    scores = insert.call(torch.matmul, call["query"], insert.call(torch.transpose, repeated[0], -2, -1))
    scores = insert.call(torch.mul, insert.call("to", scores, torch.float32), call["scale"])
    lengths = _lengths(call)
    where = positions(insert, lengths, _used(score_mod.graph, mask_mod.graph), query.device)
    first = len(nodes)
    scores = _written("score_mod", score_mod.graph, [scores, *where], call["score_mod_other_buffers"], insert)
    modified = tuple(nodes[first:])
    mask = _written("mask_mod", mask_mod.graph, where, call["mask_mod_other_buffers"], insert)
    if not isinstance(scores, fx.Node) or not isinstance(mask, fx.Node):
        raise Refused("its score_mod or mask_mod returns a constant")
    if value_of(mask).dtype is not torch.bool:
        raise Refused("its mask_mod returns %s, expected bool", value_of(mask).dtype)
    if function_name(mask) not in ("ones", "new_ones"):
        scores = insert.call(torch.where, mask, scores, float("-inf"))
    softmax = insert.call(torch.softmax, scores, -1)
    softmax.meta[_OPENED] = _Opened(node, tables, mask, modified)
    output = insert.call(torch.matmul, insert.call("to", softmax, value.dtype), repeated[1])
    inherit(output, node, value_of(read))  # as flex_attention lays it out
    return output


def match(node: fx.Node, prover: MaskProver) -> AttentionSite | Rejected:
    """The attention of an opened call, given its softmax, or why the call must stay as it is."""
    return attempt(_site, node, prover)


def _site(node: fx.Node, prover: MaskProver) -> AttentionSite:
    opened: _Opened = node.meta[_OPENED]
    _check_fills(opened, prover)
    try:
        site = eager.site_around(node, prover)
    except Refused as error:
        raise _with_bias(opened, error.why) from None
    if site.mask.read is not None:  # written out, its mask would be there as a whole, which flex_attention avoids
        raise _with_bias(opened, site.mask.read.why)
    if block_tables.is_whole(opened.tables):
        return site
    return dataclasses.replace(site, mask=_with_tables(opened, site.mask, prover))


def _with_tables(opened: _Opened, mask: MaskProof, prover: MaskProver) -> MaskProof:
    """The proof of an attention whose block tables are proven, or promised, to be those of its mask_mod."""
    call, tables = operands(opened.call), opened.tables
    if block_tables.enter(tables, prover):
        if prover.assume_block_masks:
            return dataclasses.replace(mask, blocks=(opened.mask, tables))
        raise Refused(
            "its BlockMask enters the graph, and tables of blocks are data, which prove nothing (its mask_mod is "
            "proven: %s); promise S2OConfig(assume_block_masks=True) if create_block_mask made it, or call "
            "create_block_mask inside the compiled function",
            mask,
        )
    mask_mod = body(opened.call, tables.mask_mod)
    assert mask_mod is not None
    block_tables.check_follow(tables, mask_mod.graph, call["mask_mod_other_buffers"], _lengths(call), prover)
    return mask


def _lengths(call: dict[str, Any]) -> tuple[Size, ...]:
    """[B, Hq, Nq, Nk] of the scores."""
    return (*value_of(call["query"]).shape[:3], value_of(call["key"]).shape[2])


def body(node: fx.Node, function: object) -> fx.GraphModule | None:
    """The sub-graph that a get_attr node names, an argument of a call."""
    if not isinstance(function, fx.Node) or function.op != "get_attr" or node.graph.owning_module is None:
        return None
    found = getattr(node.graph.owning_module, str(function.target), None)
    return found if isinstance(found, fx.GraphModule) else None


def output_of(node: fx.Node) -> fx.Node:
    """The node that takes the output of a call from its results; raises `Refused` if others are read, too."""
    outputs = [user for user in node.users if user.args[1:] == (0,)]
    if len(outputs) != 1 or any(user.users for user in node.users if user not in outputs):
        raise Refused("more than the output of flex_attention is read")
    return outputs[0]


def _used(score_mod: fx.Graph, mask_mod: fx.Graph) -> list[bool]:
    """For each dimension, whether one of the two functions uses the position."""
    looks = score_mod.find_nodes(op="placeholder")[1:5], mask_mod.find_nodes(op="placeholder")[:4]
    return [any(bool(node.users) for node in nodes) for nodes in zip(*looks, strict=True)]


def _written(name: str, function: fx.Graph, scalars: list[Any], captured: object, insert: Inserter) -> object:
    """A function for all scores; ``name`` is its parameter's."""
    arguments = [*scalars, *(captured if isinstance(captured, tuple | list) else ())]
    if len(function.find_nodes(op="placeholder")) != len(arguments):
        raise Refused("its %s is not understood: it has an unexpected signature", name)
    try:
        return write_out(function, arguments, len(scalars), insert)
    except Refused as error:
        raise Refused("its %s is not understood: %s", name, error.why) from None


def _check_fills(opened: _Opened, prover: MaskProver) -> None:
    """Refuses finite fills of float16 scores: these are float32 here, where float16's lowest number hides nothing."""
    if value_of(operands(opened.call)["query"]).dtype is not torch.float16:
        return
    arguments = (argument for node in opened.scores for argument in (*node.args, *node.kwargs.values()))
    fills = [prover.indices.fill(argument) for argument in arguments]
    if any(fill is not None and -math.inf < fill < _LARGE for fill in fills):
        raise Refused("its score_mod hides float16 scores by a finite number; use -inf")


def _with_bias(opened: _Opened, why: Rejected) -> Refused:
    """A refusal that names the bias that a score_mod adds to the scores, if it adds one."""
    for node in opened.scores:
        if function_name(node) in ("add", "radd", "sub", "rsub") and leads_to_product(node):
            return Refused(
                "its score_mod adds a bias to the scores (%s), as ALiBi and relative positions do; only masks and a "
                "softcap are known to the sparse operator (%s)",
                node,
                why,
            )
    return Refused.because(why)
