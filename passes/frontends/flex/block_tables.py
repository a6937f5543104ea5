"""Proves the tables of a BlockMask, which list the blocks of scores that flex_attention computes.

``create_block_mask`` makes them from the mask_mod, evaluated for all scores under ``vmap``:

    dense mask  ->  pad to whole blocks  ->  count the True of every block  ->  some / all are True  ->  counts, order

Traced into a graph, these steps prove that the tables list exactly the blocks that the mask_mod leaves visible. The
function under ``vmap`` must be the mask_mod step by step, over the positions of the attention. Tables that enter the
graph prove nothing. The user can promise their contents (``assume_block_masks``), which a run can check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import Size, choice, known, same_sizes, value_of
from s2o_compile.passes.graph.rejected import Refused, attempt
from s2o_compile.passes.masks.prover import MaskProver

WHOLE = 1 << 30
"""Block size of the table that torch makes where no block mask is given."""
_FACTORIES = frozenset({"new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like"})
_SAME_NAMES = {"index": "getitem", "mod": "remainder", "floordiv": "floor_divide"}  # under vmap, and outside
_LAYOUTS = (13, 17)  # entries of BlockMask.as_tuple(): torch 2.11, torch 2.13


@dataclass(frozen=True, eq=False)
class BlockTables:
    """The part of a call's ``block_mask`` that decides its output; the rest serves gradients.

    Attributes:
        partial: int32 [B, H, Nq blocks] and [.., Nk blocks]: how many and which key blocks mask_mod is called for.
        full: The same for key blocks that are visible as a whole; (None, None) if there is no such table.
        sizes: Queries and keys of a block; integers, or nodes where they are symbolic.
        mask_mod: The get_attr node of the function.
    """

    partial: tuple[object, object]
    full: tuple[object, object]
    sizes: tuple[Any, Any]
    mask_mod: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The tables."""
        return tuple(table for table in (*self.partial, *self.full) if isinstance(table, fx.Node))


def read(block_mask: object) -> BlockTables:
    """The tables in a call's ``block_mask`` operand."""
    if not isinstance(block_mask, tuple | list) or len(block_mask) not in _LAYOUTS:
        raise Refused("its block mask is laid out as no torch version does that this pass knows")
    _, _, counts, order, full_counts, full_order, *_, query_block, key_block, mask_mod = block_mask
    tables = BlockTables((counts, order), (full_counts, full_order), (query_block, key_block), mask_mod)
    kinds = all(isinstance(value_of(size), int | torch.SymInt) for size in tables.sizes) and _is_get_attr(mask_mod)
    typed = all(_is_table(table) for table in tables.partial) and (
        all(_is_table(table) for table in tables.full) or tables.full == (None, None)
    )
    if not kinds or not typed:
        raise Refused("its block mask is laid out as no torch version does that this pass knows")
    return tables


def is_whole(tables: BlockTables) -> bool:
    """Whether they are the one block over everything that stands for no block mask."""
    counts = tables.partial[0]
    return tables.sizes == (WHOLE, WHOLE) and isinstance(counts, fx.Node) and function_name(counts) == "ones"


def enter(tables: BlockTables, prover: MaskProver) -> bool:
    """Whether all tables enter the graph from outside, and nobody writes to them."""
    return all(
        node.op in ("placeholder", "get_attr") and prover.mutations.writer(node) is None for node in tables.nodes
    )


def check_follow(
    tables: BlockTables, body: fx.Graph, captured: Sequence[object], lengths: Sequence[Size], prover: MaskProver
) -> None:
    """Raises `Refused` unless the tables follow from the mask_mod.

    Args:
        tables: Of one call.
        body: The mask_mod's graph.
        captured: Its captured tensors, behind the four positions.
        lengths: [B, Hq, Nq, Nk] of the scores.
        prover: Of the graph.
    """
    if not all(isinstance(size, int) for size in tables.sizes):
        raise Refused("its block size %s is no constant", tables.sizes)
    partial, full = _blocks(tables.partial, prover), _blocks(tables.full, prover)
    sums = None if partial is None else _partial_sums(partial, tables.sizes, separate=full is not None)
    if sums is None or (tables.full[0] is not None and (full is None or _full_sums(full, tables.sizes) is not sums)):
        raise Refused("its block tables are made in the graph, but not by create_block_mask")
    mask = _dense(sums, tables.sizes)
    if mask is None:
        raise Refused("its block tables count something else than the blocks of a mask")
    root, axes = _under_vmap(mask)
    written = next((node for node in _ancestors(sums, root) if prover.mutations.writer(node) is not None), None)
    if root is None or written is not None:
        raise Refused("its block tables count a mask that is not a mask_mod's (%s)", written or mask)
    _Comparison(axes, body, captured, lengths, prover).check(root)


def _is_get_attr(argument: object) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _is_table(argument: object) -> bool:
    return isinstance(value_of(argument), torch.Tensor) and value_of(argument).dtype is torch.int32


def _argument(node: object, *names: str) -> fx.Node | None:
    """The first argument of a call of one of the functions."""
    if isinstance(node, fx.Node) and function_name(node) in names and node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def _cast(node: object, dtype: torch.dtype) -> fx.Node | None:
    source = _argument(node, "to")
    return source if source is not None and value_of(node).dtype is dtype else None


def _blocks(pair: tuple[object, object], prover: MaskProver) -> fx.Node | None:
    """The bool tensor [B, H, Nq blocks, Nk blocks] that a table lists row by row."""
    counts, order = (_cast(table, torch.int32) for table in pair)
    listed, sorted_ = _argument(counts, "sum"), _argument(order, "argsort")
    if counts is None or order is None or listed is None or listed is not sorted_:
        return None
    if counts.args[1:] or counts.kwargs != {"dim": -1}:
        return None
    if order.args[1:] or order.kwargs != {"dim": -1, "descending": True, "stable": True}:
        return None
    chain = (*pair, counts, order, listed)
    if any(isinstance(node, fx.Node) and prover.mutations.writer(node) is not None for node in chain):
        return None
    return _cast(_cast(listed, torch.int32), torch.int8)


def _compared(node: object, name: str, number: int) -> fx.Node | None:
    source = _argument(node, name)
    return source if source is not None and node.args[1:] == (number,) and not node.kwargs else None  # pyright: ignore


def _partial_sums(blocks: fx.Node, sizes: tuple[int, int], *, separate: bool) -> fx.Node | None:
    """The sums of ``(sums > 0) & (sums < all)``, or of ``sums > 0`` where full blocks are not listed separately."""
    if not separate:
        return _compared(blocks, "gt", 0)
    if function_name(blocks) != "and" or len(blocks.args) != 2:
        return None
    some, not_all = _compared(blocks.args[0], "gt", 0), _compared(blocks.args[1], "lt", sizes[0] * sizes[1])
    return some if some is not_all else None


def _full_sums(blocks: fx.Node, sizes: tuple[int, int]) -> fx.Node | None:
    return _compared(blocks, "eq", sizes[0] * sizes[1])


def _dense(sums: fx.Node, sizes: tuple[int, int]) -> fx.Node | None:
    """The mask [B, H, Nq, Nk] whose blocks are counted."""
    blocks = _argument(sums, "sum")
    split = _argument(blocks, "permute")
    padded = _argument(split, "view")
    mask = _argument(padded, "pad")
    if blocks is None or split is None or padded is None or mask is None:
        return None
    if sums.args[1:] or {name: list(dims) for name, dims in sums.kwargs.items()} != {"dim": [-2, -1]}:
        return None
    if blocks.args[1:] not in ((0, 1, 2, 4, 3, 5), ((0, 1, 2, 4, 3, 5),)) or blocks.kwargs:
        return None
    shape, whole = value_of(split).shape, value_of(padded).shape
    if len(shape) != 6 or len(whole) != 4 or value_of(mask).dtype is not torch.bool:
        return None
    regular = (shape[0], shape[1], shape[2] * sizes[0], shape[4] * sizes[1])
    same = all(known(a == b) for a, b in zip(whole, regular, strict=True))
    if not same or not same_sizes((shape[3], shape[5]), sizes) or not _pads_behind(padded):
        return None
    return mask


def _pads_behind(node: fx.Node) -> bool:
    """Whether a ``pad`` adds False behind the last two dimensions alone."""
    names = ("input", "pad", "mode", "value")
    options = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    amounts = options.get("pad", ())
    return (
        len(amounts) == 4  # pyright: ignore[reportArgumentType]
        and amounts[0] == amounts[2] == 0  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        and options.get("mode", "constant") == "constant"
        and options.get("value") in (None, 0, False)
    )


def _under_vmap(mask: fx.Node) -> tuple[fx.Node | None, list[object]]:
    """The 0-dimensional node that four nested vmaps stack to a mask, and their levels, outermost dimension first."""
    levels: list[object] = []
    node: fx.Node | None = mask
    for _ in range(4):
        if node is None or function_name(node) != "remove_batch_dim" or len(node.args) != 4 or node.args[3] != 0:
            return None, []
        levels.append(node.args[1])
        node = _argument(node, "remove_batch_dim")
    return (node, levels) if len(set(levels)) == 4 else (None, [])


def _ancestors(node: fx.Node, root: fx.Node | None) -> list[fx.Node]:
    """The chain of first arguments from a node to another."""
    chain = [node]
    while chain[-1] is not root and chain[-1].args and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    return chain


class _Comparison:
    """Compares a graph under vmap with a function's own graph, step by step."""

    def __init__(
        self, levels: Sequence[object], body: fx.Graph, captured: Sequence[object], lengths: Sequence[Size],
        prover: MaskProver,
    ) -> None:  # fmt: skip
        self._levels, self._lengths, self._prover = levels, lengths, prover
        self._result = body.output_node().args[0]
        self._captured = {node: at for at, node in enumerate(body.find_nodes(op="placeholder"))}
        self._arguments = captured
        self._same: dict[tuple[fx.Node, fx.Node], bool] = {}

    def check(self, root: fx.Node) -> None:
        """Raises `Refused` unless they are the same function of the same positions."""
        (result,) = self._result if isinstance(self._result, tuple | list) else (self._result,)
        if not self._equal(root, result):
            raise Refused(
                "its block tables are not proven to be made of its own mask_mod for its own scores; call "
                "create_block_mask with the mask_mod, Q_LEN and KV_LEN of the call, and with B and H where the "
                "mask_mod looks at b and h"
            )

    def _equal(self, left: object, right: object) -> bool:
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            if isinstance(left, fx.Node) and isinstance(right, int):  # under vmap x[0] becomes x[tensor(0)]
                left = self._prover.indices.fill(left)
            return type(left) is type(right) and left == right
        if (left, right) not in self._same:
            self._same[left, right] = self._equal_nodes(left, right)
        return self._same[left, right]

    def _equal_nodes(self, left: fx.Node, right: fx.Node) -> bool:
        if right.op == "placeholder":
            at = self._captured[right]
            if at >= 4:
                untouched = self._prover.mutations.writer(left) is None
                return untouched and left is self._arguments[at - 4]
            return self._is_position(left, at)
        name, other = (_SAME_NAMES.get(function_name(node), function_name(node)) for node in (left, right))
        if self._prover.mutations.writer(left) is not None:
            return False
        if name == other == "getitem":
            return self._equal_parts((left.args[0], *_items(left)), (right.args[0], *_items(right)))
        if not name or name != other:
            return False
        if name in _FACTORIES:  # they take a shape, a device and a dtype from their first argument, and no value
            alike = value_of(left).dtype is value_of(right).dtype
            return alike and self._equal_parts(left.args[1:], right.args[1:]) and self._equal_options(left, right)
        if name == "where":
            return choice(left) is not None and self._equal_parts(choice(left), choice(right))
        return self._equal_parts(left.args, right.args) and self._equal_options(left, right)

    def _equal_options(self, left: fx.Node, right: fx.Node) -> bool:
        if left.kwargs.keys() != right.kwargs.keys():
            return False
        return all(self._equal(left.kwargs[name], right.kwargs[name]) for name in left.kwargs)

    def _equal_parts(self, left: Any, right: Any) -> bool:  # noqa: ANN401 (sequences of fx arguments)
        if left is None or right is None or len(left) != len(right):
            return False
        return all(
            self._equal_parts(a, b)
            if isinstance(a, tuple | list) and isinstance(b, tuple | list)
            else self._equal(a, b)
            for a, b in zip(left, right, strict=True)
        )

    def _is_position(self, node: fx.Node, dim: int) -> bool:
        """Whether a node is the position along one dimension: 0, 1, ... up to its length."""
        source = _argument(node, "add_batch_dim")
        if source is None or node.args[1:] != (0, self._levels[dim]):
            return False
        index = attempt(self._prover.indices.evaluate, source)
        if not index or index.steps != (1,):
            return False
        return known(index.const == 0) and known(index.shape[0] == self._lengths[dim])


def _items(node: fx.Node) -> tuple[object, ...]:
    index = node.args[1]
    return tuple(index) if isinstance(index, tuple | list) else (index,)
