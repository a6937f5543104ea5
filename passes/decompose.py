"""Decomposes opaque nodes around SDPA so that the frontends see the attention; undoes it where nothing is rewritten.

    F.multi_head_attention_forward            nn.MultiheadAttention, nn.TransformerDecoderLayer
    torch._transformer_encoder_layer_fwd      nn.TransformerEncoderLayer in eval mode ("fast path")
    flex_attention                            written out by its own frontend

A node's function is written in terms of SDPA, traced, and inlined ahead of the node. If the attention is rewritten,
the inlined nodes replace the node. Else they are erased and the node runs as before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from s2o_compile.kernels.support.torch_compat import FakeTensor, MissingTorchNameError, encoder_layer
from s2o_compile.passes.frontends.checks import check_derivatives
from s2o_compile.passes.frontends.flex import match as flex
from s2o_compile.passes.graph.dead_code import remove_dead
from s2o_compile.passes.graph.inlining import inline
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.rejected import Refused, Rejected, attempt


def _multi_head(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, in_weight: Tensor | None,
    in_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
    out_weight: Tensor, out_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None, static_v: Tensor | None = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    """``F.multi_head_attention_forward``, [N, B, E], with masks that do not repeat along the heads."""
    if any(x is not None for x in (bias_k, bias_v, static_k, static_v)) or add_zero_attn:
        raise Refused("it adds keys of its own (bias_k, bias_v, add_zero_attn or static_k)")
    if query.ndim != 3:
        raise Refused("its query has no batch dimension: add one with unsqueeze")
    own = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    if own is None and query is key is value:
        projected = F.linear(query, in_weight, in_bias).chunk(3, -1)  # pyright: ignore[reportArgumentType]
    else:
        biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
        projected = map(F.linear, (query, key, value), own or in_weight.chunk(3), biases)  # pyright: ignore
    q, k, v = (x.unflatten(-1, (num_heads, embed_dim // num_heads)).permute(1, 2, 0, 3) for x in projected)
    # As in torch: the hint replaces the mask, unless something else needs the mask.
    hinted = is_causal and key_padding_mask is None and not need_weights
    mask = None if hinted else _joined_masks(attn_mask, key_padding_mask, num_heads, q.dtype)
    dropout_p = dropout_p if training else 0.0
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=hinted)
    return F.linear(output.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None


def _joined_masks(pairs: Tensor | None, padding: Tensor | None, num_heads: int, dtype: torch.dtype) -> Tensor | None:
    """``attn_mask`` [N, N], [B * H, N, N] or [B, H, N, N] and ``key_padding_mask`` [B, N] as SDPA's mask, or None."""
    masks = []
    if pairs is not None:
        masks.append(pairs.unflatten(0, (-1, num_heads)) if pairs.ndim == 3 else pairs)
    if padding is not None:
        masks.append(padding[:, None, None, :])
    if any(mask.is_floating_point() for mask in masks):
        hidden = torch.full((), float("-inf"), dtype=dtype)
        masks = [mask if mask.is_floating_point() else torch.where(mask, hidden, 0.0) for mask in masks]
        return reduce(operator.add, masks)
    return reduce(operator.and_, [~mask for mask in masks]) if masks else None


def _encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor,
    out_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor,
    mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """``nn.TransformerEncoderLayer``, batch first, in eval mode; see its ``forward``."""
    if src.is_nested:
        raise Refused("its input is a nested tensor: build nn.TransformerEncoder(enable_nested_tensor=False)")

    def attend(x: Tensor) -> Tensor:
        rows = x.transpose(0, 1)
        padding, pairs = (mask, None) if mask_type == 1 else (None, mask)
        return _multi_head(
            rows, rows, rows, embed_dim, num_heads, in_weight, in_bias, None, None, False, 0.0, out_weight, out_bias,
            training=False, key_padding_mask=padding, need_weights=False, attn_mask=pairs,
        )[0].transpose(0, 1)  # fmt: skip

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, weight_1, bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), weight_2, bias_2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    if norm_first:
        src = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return src + feed_forward(norm(src, norm_weight_2, norm_bias_2))
    src = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(src + feed_forward(src), norm_weight_2, norm_bias_2)


OPENED: dict[object, Callable[..., Any]] = {
    F.multi_head_attention_forward: _multi_head,
    **({} if encoder_layer is None else {encoder_layer: _encoder_layer}),
}


@dataclass(eq=False)
class Expansion:
    """An opaque node, still in place, and the nodes that were inlined for it."""

    node: fx.Node
    nodes: list[fx.Node]
    outputs: Any  # the node, or the structure of nodes, with the opaque node's value

    def keep(self) -> None:
        """Replaces the opaque node by the inlined ones."""
        if isinstance(self.outputs, tuple):
            for user in list(self.node.users):
                if user.users:
                    user.replace_all_uses_with(self.outputs[user.args[1]])  # pyright: ignore (expand: a getitem)
                self.node.graph.erase_node(user)
        else:
            self.node.replace_all_uses_with(self.outputs)
        inputs = self.node.all_input_nodes
        self.node.graph.erase_node(self.node)
        remove_dead(self.node.graph, inputs)

    def erase(self) -> None:
        """Removes the inlined nodes; the opaque node stays as it was."""
        inlined = set(self.nodes)
        for node in reversed([node for node in self.node.graph.nodes if node in inlined]):
            self.node.graph.erase_node(node)


def is_opaque(node: fx.Node) -> bool:
    """Whether a node is one that can be opened."""
    return node.op == "call_function" and (node.target in OPENED or flex.is_call(node))


def attending_part(node: fx.Node) -> str:
    """The path of the module that attends inside an opaque node's own, as it is on the layer's slow path."""
    return "self_attn" if encoder_layer is not None and node.target is encoder_layer else ""


def expand(node: fx.Node) -> Expansion | Rejected:
    """Inlines the decomposition of an opaque node ahead of it, or says why not."""
    return attempt(_expand, node)


def _expand(node: fx.Node) -> Expansion:
    check_derivatives(node)
    if isinstance(value_of(node), tuple):
        for user in node.users:
            if user.target is not operator.getitem:
                raise Refused("its result is passed on whole to %s", user)
            if user.args[1] == 1 and user.users and not flex.is_call(node):
                raise Refused("its attention weights are read: pass need_weights=False")
    if flex.is_call(node):
        return _flex(node)
    values = [value_of(leaf) for leaf in node.all_input_nodes]
    fakes = [value for value in values if isinstance(value, FakeTensor)]
    if not fakes or not all(isinstance(value, FakeTensor) for value in values if isinstance(value, Tensor)):
        raise Refused("the shapes of its operands are not recorded in the graph")
    try:
        return Expansion(node, *inline(node, OPENED[node.target]))
    except MissingTorchNameError as error:
        raise Refused(str(error)) from error


def _flex(node: fx.Node) -> Expansion:
    expansion = Expansion(node, [], None)
    try:
        expansion.outputs = (flex.write(node, expansion.nodes), None, None)
    except Exception as error:  # whatever a user's functions ask of fake tensors
        expansion.erase()
        if isinstance(error, Refused):
            raise
        kind = type(error).__name__
        raise Refused("its score_mod or mask_mod could not be written out (%s: %s)", kind, error) from error
    return expansion
