"""Proves the tables of a BlockMask, which list the blocks of scores that flex_attention computes.

``create_block_mask`` makes them from the mask_mod, evaluated for all scores under ``vmap``:

    dense mask  ->  pad to whole blocks  ->  count the True of every block  ->  some / all are True  ->  counts, order

Traced into a graph, these steps prove that the tables list exactly the blocks that the mask_mod leaves visible. The
function under ``vmap`` must be the mask_mod step by step, over the positions of the attention. Tables that enter the
graph prove nothing. The user can promise their contents (``assume_block_masks``), which a run can check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import Size, arguments, choice, items_of, known, same_sizes, value_of
from s2o_compile.passes.graph.rejected import Refused, attempt
from s2o_compile.passes.masks.proof import BlockTables
from s2o_compile.passes.masks.prover import MaskProver

WHOLE = 1 << 30
"""Block size of the table that torch makes where no block mask is given."""
_FACTORIES = frozenset({"new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like"})
_SAME_NAMES = {"index": "getitem", "mod": "remainder", "floordiv": "floor_divide"}  # under vmap, and outside
_LAYOUTS = (13, 17)  # entries of BlockMask.as_tuple(): torch 2.11, torch 2.13


def read(block_mask: object) -> BlockTables:
    """The tables in a call's ``block_mask`` operand."""
    unknown = Refused("its block mask is laid out as no torch version does that this pass knows")
    if not isinstance(block_mask, tuple | list) or len(block_mask) not in _LAYOUTS:
        raise unknown
    _, _, counts, order, full_counts, full_order, *_, query_block, key_block, mask_mod = block_mask
    tables = BlockTables((counts, order), (full_counts, full_order), (query_block, key_block), mask_mod)
    sized = all(isinstance(value_of(size), int | torch.SymInt) for size in tables.sizes)
    full = tables.full == (None, None) or all(map(_is_table, tables.full))
    named = isinstance(mask_mod, fx.Node) and mask_mod.op == "get_attr"
    if not (sized and named and full and all(map(_is_table, tables.partial))):
        raise unknown
    return tables


def is_whole(tables: BlockTables) -> bool:
    """Whether they are the one block over everything that stands for no block mask."""
    counts = tables.partial[0]
    return tables.sizes == (WHOLE, WHOLE) and isinstance(counts, fx.Node) and function_name(counts) == "ones"


def enter(tables: BlockTables, prover: MaskProver) -> bool:
    """Whether all tables enter the graph from outside, and nobody writes to them."""
    nodes = [table for table in (*tables.partial, *tables.full) if isinstance(table, fx.Node)]
    return all(node.op in ("placeholder", "get_attr") and prover.mutations.writer(node) is None for node in nodes)


def check_follow(
    tables: BlockTables, body: fx.Graph, captured: Sequence[object], lengths: Sequence[Size], prover: MaskProver
) -> None:
    """Raises `Refused` unless the tables follow from the mask_mod, a graph over four positions and captured tensors.

    The lengths [B, Hq, Nq, Nk] are those of the scores.
    """
    if not all(isinstance(size, int) for size in tables.sizes):
        raise Refused("its block size %s is no constant", tables.sizes)
    partial, full = _blocks(tables.partial, prover), _blocks(tables.full, prover)
    sums = _sums(partial, full, tables.sizes[0] * tables.sizes[1])
    if sums is None or (tables.full[0] is not None and full is None):
        raise Refused("its block tables are made in the graph, but not by create_block_mask")
    mask = _dense(sums, tables.sizes)
    if mask is None:
        raise Refused("its block tables count something else than the blocks of a mask")
    root, axes = _under_vmap(mask)
    written = next((node for node in _ancestors(sums, root) if prover.mutations.writer(node) is not None), None)
    if root is None or written is not None:
        raise Refused("its block tables count a mask that is not a mask_mod's (%s)", written or mask)
    positions = {node: at for at, node in enumerate(body.find_nodes(op="placeholder"))}
    (result,) = items_of(body.output_node().args[0])
    if not _Comparison(axes, positions, captured, lengths, prover).equal(root, result):
        raise Refused(
            "its block tables are not proven to be made of its own mask_mod for its own scores; call "
            "create_block_mask with the mask_mod, Q_LEN and KV_LEN of the call, and with B and H where the "
            "mask_mod looks at b and h"
        )


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


def _sums(partial: fx.Node | None, full: fx.Node | None, whole: int) -> fx.Node | None:
    """The sums of a mask's blocks: partial blocks are ``(sums > 0) & (sums < whole)``, full ones ``sums == whole``.

    Where full blocks are not listed separately, all are ``sums > 0``.
    """
    if partial is None or full is None:
        return _compared(partial, "gt", 0)
    if function_name(partial) != "and" or len(partial.args) != 2:
        return None
    some, not_all = partial.args
    found = {_compared(some, "gt", 0), _compared(not_all, "lt", whole), _compared(full, "eq", whole)}
    return found.pop() if len(found) == 1 else None


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
    _, amounts, mode, value = arguments(padded, "input", "pad", "mode", "value")
    behind = amounts is not None and len(amounts) == 4 and amounts[0] == amounts[2] == 0  # the last two dimensions
    if not behind or mode not in (None, "constant") or value not in (None, 0):
        return None
    return mask if same_sizes(whole, regular) and same_sizes((shape[3], shape[5]), sizes) else None


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


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Compares a graph under vmap with a function's own graph, step by step."""

    levels: Sequence[object]  # of the four vmaps
    placeholders: Mapping[fx.Node, int]  # the function's, numbered: four positions, then captured tensors
    captured: Sequence[object]
    lengths: Sequence[Size]
    prover: MaskProver
    _same: dict[tuple[fx.Node, fx.Node], bool] = field(default_factory=dict)

    def equal(self, left: object, right: object) -> bool:
        """Whether an argument under vmap is an argument of the function."""
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            if isinstance(left, fx.Node) and isinstance(right, int):  # under vmap x[0] becomes x[tensor(0)]
                left = self.prover.indices.fill(left)
            return type(left) is type(right) and left == right
        if (left, right) not in self._same:
            self._same[left, right] = self._equal_nodes(left, right)
        return self._same[left, right]

    def _equal_nodes(self, left: fx.Node, right: fx.Node) -> bool:
        if right.op == "placeholder" and self.placeholders[right] < 4:
            return self._is_position(left, self.placeholders[right])
        if self.prover.mutations.writer(left) is not None:
            return False
        if right.op == "placeholder":
            return left is self.captured[self.placeholders[right] - 4]
        name, other = (_SAME_NAMES.get(function_name(node), function_name(node)) for node in (left, right))
        if not name or name != other:
            return False
        if name == "getitem":
            return self._equal_parts(*((node.args[0], *items_of(node.args[1])) for node in (left, right)))
        if name == "where":
            return choice(left) is not None and self._equal_parts(choice(left), choice(right))
        shaped = name in _FACTORIES  # they take a shape, a device and a dtype from their first argument, and no value
        if shaped and value_of(left).dtype is not value_of(right).dtype:
            return False
        return (
            self._equal_parts(left.args[shaped:], right.args[shaped:])
            and left.kwargs.keys() == right.kwargs.keys()
            and all(self.equal(left.kwargs[name], right.kwargs[name]) for name in left.kwargs)
        )

    def _equal_parts(self, left: Any, right: Any) -> bool:  # noqa: ANN401 (sequences of fx arguments)
        if left is None or right is None or len(left) != len(right):
            return False
        return all(
            self._equal_parts(a, b) if isinstance(a, tuple | list) and isinstance(b, tuple | list) else self.equal(a, b)
            for a, b in zip(left, right, strict=True)
        )

    def _is_position(self, node: fx.Node, dim: int) -> bool:
        """Whether a node is the position along one dimension: 0, 1, ... up to its length."""
        source = _argument(node, "add_batch_dim")
        if source is None or node.args[1:] != (0, self.levels[dim]):
            return False
        index = attempt(self.prover.indices.evaluate, source)
        if not index:
            return False
        return index.steps == (1,) and known(index.const == 0) and known(index.shape[0] == self.lengths[dim])
