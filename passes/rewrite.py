"""Replaces a matched attention by the sparse operator and removes the nodes that only the old one needed."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import Argument

import s2o_compile.kernels.ops  # noqa: F401  (defines torch.ops.s2o)
from s2o_compile.kernels import dtensors
from s2o_compile.kernels.core.documents import ids_of
from s2o_compile.kernels.core.head_shards import WHOLE
from s2o_compile.kernels.core.layout import empty_output
from s2o_compile.kernels.support.dtensors import is_dtensor
from s2o_compile.kernels.support.errors import InputError
from s2o_compile.kernels.support.torch_compat import is_erased
from s2o_compile.passes.frontends.checks import check_derivatives
from s2o_compile.passes.graph import sizes
from s2o_compile.passes.graph.dead_code import remove_dead
from s2o_compile.passes.graph.nodes import Size, inherit, known, same_sizes, value_of
from s2o_compile.passes.graph.operand import Operand, Step, computed
from s2o_compile.passes.graph.rejected import Refused, Rejected, attempt
from s2o_compile.passes.head_shards import head_shard
from s2o_compile.passes.masks.assumptions import check_blocks, check_causal
from s2o_compile.passes.masks.proof import DocumentBounds, KeyMask, MaskPart, PackedDocuments, TokenTable
from s2o_compile.passes.site import AttentionSite

logger = logging.getLogger(__name__)

_OPERATORS = {
    "proven": (torch.ops.s2o.attention.default, dtensors.attention),
    "read": (torch.ops.s2o.masked_attention.default, dtensors.masked_attention),
    "packed": (torch.ops.s2o.packed_attention.default, dtensors.packed_attention),
}
"""By the kind of the mask: on plain tensors, and on DTensors."""


class Rewriter:
    """Rewrites the attentions of one graph, in graph order; layers under one mask share its key mask.

    Args:
        graph: The graph, changed in place.
        options: Keyword arguments for every call of the operator, such as ``tau``.
        check_assumptions: Whether masks are compared at run time with what was promised of them.
    """

    def __init__(self, graph: fx.Graph, options: Mapping[str, object], *, check_assumptions: bool) -> None:
        self._graph = graph
        # Only values other than the default: each run of the graph reads every argument that a call names.
        schema = torch.ops.s2o.attention.default._schema
        defaults = {argument.name: argument.default_value for argument in schema.arguments}
        self._options = {name: value for name, value in options.items() if value != defaults[name]}
        self._check_assumptions = check_assumptions
        self._checked: set[tuple[object, ...]] = set()
        self._masks: dict[tuple[object, ...], fx.Node] = {}  # key masks, and masks that the operator reads
        self._inserted: list[fx.Node] = []  # for the attention that is being rewritten

    def rewrite(self, site: AttentionSite) -> Rejected | None:
        """Replaces one attention; leaves the graph's meaning alone and says why if it cannot."""
        self._inserted = []
        try:
            return attempt(self._replace, site)
        except Exception as error:  # a failure of the pass itself must not fail the user's compilation
            logger.exception("%s: the pass failed", site.node)
            for node in reversed(self._inserted):
                if not node.users:
                    self._graph.erase_node(node)
            self._masks = {memo: node for memo, node in self._masks.items() if not is_erased(node)}
            return Rejected("the pass failed on it (%s: %s), please report that", type(error).__name__, error)

    def _replace(self, site: AttentionSite) -> None:
        node = site.node
        layout, restore = _restored(site)
        kind = "packed" if site.mask.documents is not None else "proven" if site.mask.read is None else "read"
        function = _OPERATORS[kind][is_dtensor(site.query.value)]
        output = value_of(node)
        check_derivatives(node)
        positional, keyword = self._arguments(site, layout)
        if self._check_assumptions:
            self._check(site)
        with self._graph.inserting_before(node):
            call = self._graph.call_function(function, positional, keyword)
        self._inserted.append(call)
        inherit(call, node, computed(output, function, positional, keyword))
        inputs = node.all_input_nodes
        # The node stays and becomes the last step: other sites, matched before this one changed, may refer to it.
        *steps, (last, args) = ((operator.getitem, (0,)), *restore)
        for step, step_args in steps:
            call = self._insert(node, step, call, *step_args)
        result = computed(output, last, (call, *args))
        node.op, node.target, node.args, node.kwargs = "call_function", last, (call, *args), {}
        if result is not None:
            inherit(node, node, result)
        for part in reversed(site.interior):  # in-place steps too: the frontend has proven that they serve it alone
            if not part.users:
                inputs += part.all_input_nodes
                self._graph.erase_node(part)
        remove_dead(self._graph, inputs)

    def _arguments(self, site: AttentionSite, layout: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keyword: dict[str, Any] = {**self._options, "scale": site.scale, "site": site.name, "layout": layout}
        if site.softcap is not None:
            keyword["softcap"] = site.softcap
        keyword |= self._by_head(site)
        mask = self._read_mask(site, keyword) if site.mask.read is not None else self._proven_mask(site, keyword)
        documents = () if site.mask.documents is None else self._documents(site.mask.documents, site, keyword)
        operands = [self._operand(operand, site.node) for operand in (site.query, site.key, site.value)]
        sinks = () if site.sinks is None else (site.sinks,)
        return (*operands, *documents, mask, *sinks), keyword

    def _by_head(self, site: AttentionSite) -> dict[str, Any]:
        """The arguments that speak of heads: of those that this rank has."""
        marked, taus = site.dense_heads, site.head_tau or self._options.get("head_tau")
        if not marked and not taus:
            return {}
        shard, heads = head_shard(site), (site.query.value.shape[1], site.key.value.shape[1])
        if shard == WHOLE:
            return {name: list(x) for name, x in (("dense_heads", marked), ("head_tau", taus)) if x}
        if not all(isinstance(size, int) for size in heads):
            raise Refused("its settings by head need numbers of heads that are known")
        try:
            own = shard.dense_heads(marked, heads[1]), shard.head_tau(taus or (), heads[0])
        except InputError as error:
            raise Refused("%s", error.reason) from error
        return {name: x for name, x in zip(("dense_heads", "head_tau"), own, strict=True) if x}

    def _proven_mask(self, site: AttentionSite, keyword: dict[str, Any]) -> fx.Node | None:
        """The key mask [B, Nk], if there is one; the rest of the mask becomes keyword arguments."""
        keyword["causal"] = site.mask.causal
        for name, size in (("causal_offset", site.mask.offset), ("window", site.mask.window)):
            if size is not None:
                keyword[name] = self._size(size, site.node)
        if site.mask.chunk is not None:
            keyword["attention_chunk"] = site.mask.chunk
        if site.mask.fully_masked == "mean":
            keyword["fully_masked"] = "mean"
        key_mask = None
        for part in site.mask.key_masks:
            operand = self._key_mask(part, site)
            key_mask = operand if key_mask is None else self._insert(site.node, operator.and_, key_mask, operand)
        return key_mask

    def _documents(
        self, documents: PackedDocuments, site: AttentionSite, keyword: dict[str, Any]
    ) -> tuple[fx.Node, fx.Node | None]:
        """The documents of the queries and of the keys, [B or 1, N], one operand where they are the same."""
        lengths = site.query.value.shape[-2], site.key.value.shape[-2]
        itself = documents.of_itself and known(lengths[0] == lengths[1])
        if documents.bottom_right and not itself:
            keyword["bottom_right"] = True
        query = self._ids(documents.query, lengths[0], site)
        return query, None if itself else self._ids(documents.key, lengths[1], site)

    def _ids(self, table: TokenTable | DocumentBounds, length: Size, site: AttentionSite) -> fx.Node:
        if isinstance(table, TokenTable):
            return self._tokens(table, length, site)
        memo = (*table.place, str(length))
        if memo not in self._masks:
            self._masks[memo] = self._insert(site.node, ids_of, table.node, self._size(length, site.node))
        return self._masks[memo]

    def _read_mask(self, site: AttentionSite, keyword: dict[str, Any]) -> fx.Node:
        """A mask that the operator reads: the only one as it is, several as the scores that they make of zeros."""
        reading, query = site.mask.read, site.query.value
        assert reading is not None
        for part in reading.parts:
            leading = value_of(part.node).shape[:-2][::-1]
            if not all(known(a == 1) or known(a == b) for a, b in zip(leading, query.shape[1::-1], strict=False)):
                raise Refused("%s (read at run time) is broadcast over more than the query's batch", part.node)
        at, first = site.node, reading.parts[0]
        memo = query.dtype, reading.fill, *((part.node, part.hidden, part.negated) for part in reading.parts)
        if len(reading.parts) == 1 and first.hidden is not None and reading.fully_masked == "mean":
            keyword["fully_masked"] = "mean"
        if reading.fill is not None:
            keyword["fill"] = reading.fill
        if memo not in self._masks:
            masked = first.node if len(reading.parts) == 1 else None
            if masked is None and reading.fill is not None:
                for part in reading.parts:
                    seen = part.node if part.negated else self._insert(at, torch.logical_not, part.node)
                    masked = seen if masked is None else self._insert(at, operator.and_, masked, seen)
            elif masked is None:
                for part in reading.parts:
                    masked = self._added(part, masked, query, at)
            elif first.hidden is not None and not first.negated:  # the fill is where the condition holds
                masked = self._insert(at, torch.logical_not, masked)
            self._masks[memo] = masked
        return self._masks[memo]

    def _added(self, part: MaskPart, masked: fx.Node | None, query: torch.Tensor, at: fx.Node) -> fx.Node:
        """The scores after the next of several masks, if they were zero before the first."""
        if part.hidden is None:
            return part.node if masked is None else self._insert(at, torch.add, masked, part.node)
        filled = self._insert(at, torch.logical_not, part.node) if part.negated else part.node
        if masked is None:  # 0 wherever it is not filled
            masked = self._insert(at, torch.Tensor.to, filled, query.dtype)
        return self._insert(at, torch.masked_fill, masked, filled, part.hidden)

    def _operand(self, operand: Operand, before: fx.Node) -> fx.Node:
        node = operand.node
        for function, args in operand.steps:
            emitted = [self._size(arg, before) if isinstance(arg, torch.SymInt) else arg for arg in args]
            node = self._insert(before, function, node, *emitted)
        return node

    def _check(self, site: AttentionSite) -> None:
        """Inserts the check of a promise about a mask, once for all layers that share it."""
        promised, blocks = site.mask.promised, site.mask.blocks
        if promised is None and blocks is None:
            return
        lengths = site.query.value.shape[-2], site.key.value.shape[-2]
        watched = (promised,) if blocks is None else (*blocks[1].partial, *blocks[1].full)
        # The same tables may be promised of two masks: each is compared.
        packed = None if site.mask.documents is None else site.mask.documents.identity
        memo = watched, str(site.mask), packed, *(part.identity for part in site.mask.key_masks), *map(str, lengths)
        if memo in self._checked:
            return
        query_len, key_len = (self._size(length, site.node) for length in lengths)
        if promised is not None:
            self._insert(site.node, check_causal, promised, query_len, key_len)
        if blocks is not None:
            self._insert(site.node, check_blocks, blocks[0], query_len, key_len, *blocks[1].sizes, *watched)
        self._checked.add(memo)

    def _key_mask(self, mask: KeyMask, site: AttentionSite) -> fx.Node:
        """The mask as a [B, Nk] tensor, computed once for all layers."""
        batch, key_len = site.query.value.shape[0], site.key.value.shape[-2]
        memo = (*mask.identity, str(batch), str(key_len))
        if memo in self._masks:
            return self._masks[memo]
        at = site.node
        node = self._tokens(mask, key_len, site)
        if mask.negated:
            node = self._insert(at, torch.logical_not, node)
        if not known(value_of(node).shape[0] == batch):
            rows = self._size(batch, at)
            node = self._insert(at, torch.Tensor.expand, node, rows, -1)
        self._masks[memo] = node
        return node

    def _tokens(self, table: TokenTable, length: Size, site: AttentionSite) -> fx.Node:
        """The numbers of a row's tokens as a [B or 1, N] tensor, read once for all layers."""
        query, at, node = site.query.value, site.node, table.node
        batch = query.shape[0]
        memo = "tokens", *table.place, str(batch), str(length), query.device
        if memo in self._masks:
            return self._masks[memo]
        for function, numbers in table.steps(batch, length):
            node = self._insert(at, function, node, *[self._size(number, at) for number in numbers])
        if value_of(node).device != query.device:  # the mask was made of a copy there
            node = self._insert(at, torch.Tensor.to, node, query.device)
        self._masks[memo] = node
        return node

    def _size(self, size: Size, before: fx.Node) -> fx.Node | int:
        return sizes.emit(size, before)

    def _insert(self, before: fx.Node, function: Callable[..., Any], *args: Argument) -> fx.Node:
        with self._graph.inserting_before(before):
            node = self._graph.call_function(function, args)
        self._inserted.append(node)
        inherit(node, before, computed(value_of(before), function, args))
        return node


def _restored(site: AttentionSite) -> tuple[str, tuple[Step, ...]]:
    """The operator's layout, and the steps behind it, that reproduce the replaced value's strides; raises `Refused`.

    SDPA's kernels lay their output out differently, and legal code behind them may rely on it. For example, a query
    stored as [N, B, H, D] gives an output that ``permute(2, 0, 1, 3).view(N * B, H * D)`` takes.
    """
    wanted = value_of(site.node)
    misfit = Refused("the operator cannot reproduce the shape and strides of its output")
    if not isinstance(wanted, torch.Tensor):
        if site.restore:
            raise misfit
        return "auto", ()
    strides = wanted.stride()
    # The dimensions from the outermost in memory to the innermost.
    memory = sorted(range(wanted.ndim), key=lambda dim: sum(known(strides[dim] < other) for other in strides))
    # Strides of dimensions of one element mean nothing, but are kept where they can be.
    for order, exact in (((), True), (memory, True), ((), False), (memory, False)):
        # No layout of the operator's is the wanted one: a copy is.
        inverse = [order.index(dim) for dim in range(len(order))]
        copied = (
            ((torch.permute, (order,)), (torch.Tensor.contiguous, ()), (torch.permute, (inverse,))) if order else ()
        )
        for layout in ("BHND", "BNHD"):
            query, restore = site.query.value, (*site.restore, *copied)
            output = computed(query, empty_output, (query, site.value.value.shape[-1], layout))
            for function, args in restore:
                output = computed(query, function, (output, *args))
            if output is not None and output.ndim == wanted.ndim and _equal(output, wanted, exact=exact):
                return layout, restore
    raise misfit


def _equal(output: torch.Tensor, wanted: torch.Tensor, *, exact: bool) -> bool:
    """Whether two values have the same shape and strides; if not exact, but for dimensions of one element."""
    pairs = zip(output.stride(), wanted.stride(), wanted.shape, strict=True)
    return same_sizes(output.shape, wanted.shape) and all(
        known(a == b) or (not exact and known(size == 1)) for a, b, size in pairs
    )
