"""Random masks in many spellings and their mutants: whatever the prover accepts is the mask, at every length.

A mutant is the captured graph with one thing changed: a comparison flipped, a term dropped, a constant moved by one,
operands swapped, a negation lost. Most mutants are other masks; a prover that overlooks the change states a wrong one.
"""

import operator
import random

import pytest
import torch
from torch import fx

from s2o_compile.passes.graph.calls import function_name, written_nodes
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.rejected import Rejected
from s2o_compile.passes.masks.prover import MaskProver
from tests.helpers.masks import visible

INF, MIN = float("-inf"), torch.finfo(torch.float32).min
LENGTHS = ((6, 11), (7, 7), (12, 5))  # (queries, keys); the capture sees (5, 9)
BATCHES, MASKS, MUTANTS = 14, 15, 4

INDEX = (
    lambda n: torch.arange(n),
    lambda n: torch.arange(n, dtype=torch.int32),
    lambda n: torch.ones(n, dtype=torch.long).cumsum(0) - 1,
    lambda n: torch.arange(1, n + 1) - 1,
    lambda n: torch.arange(n + 3)[3:] - 3,
    lambda n: -(0 - torch.arange(n)),
    lambda n: torch.arange(n)[torch.arange(n)],
)
COLUMN = (lambda x: x[:, None], lambda x: x.unsqueeze(1), lambda x: x.view(-1, 1), lambda x: x[None].transpose(0, 1))
ROW = (lambda x: x[None], lambda x: x.unsqueeze(0), lambda x: x.reshape(1, -1), lambda x: x[None, :])

# j <= i + c, and j >= i + c
AT_MOST = (
    lambda i, j, c: j <= i + c,
    lambda i, j, c: i + c >= j,
    lambda i, j, c: j < i + (c + 1),
    lambda i, j, c: torch.gt(i + 1 + c, j),
    lambda i, j, c: j - i <= c,
    lambda i, j, c: (i - j).ge(-c),
    lambda i, j, c: ~(j > i + c),
    lambda i, j, c: torch.logical_not(i + c < j),
    lambda i, j, c: torch.where(j - c <= i, True, False),
    lambda i, j, c: (j > i + c) == False,  # noqa: E712
    lambda i, j, c: torch.ones(i.shape[0], j.shape[1], dtype=torch.bool).tril(c),
    lambda i, j, c: ~torch.ones(i.shape[0], j.shape[1], dtype=torch.bool).triu(c + 1),
    lambda i, j, c: torch.triu(torch.ones(i.shape[0], j.shape[1]), diagonal=c + 1) == 0,
    lambda i, j, c: torch.ones(i.shape[0], j.shape[1]).tril(c).type(torch.uint8) > 0,
    lambda i, j, c: torch.triu(torch.ones(i.shape[0], j.shape[1]), diagonal=c + 1) < 1,
    lambda i, j, c: torch.ones(i.shape[0], j.shape[1], dtype=torch.bool).tril(c + 1).tril(c) == 1,
    lambda i, j, c: torch.hstack([torch.ones(i.shape[0], 0), torch.ones(i.shape[0], j.shape[1]).tril(c)]) != 0,
    lambda i, j, c: torch.ones(i.shape[0], j.shape[1]).tril(c).index_select(0, torch.arange(i.shape[0])).bool(),
)
AT_LEAST = (
    lambda i, j, c: j >= i + c,
    lambda i, j, c: i + c <= j,
    lambda i, j, c: j > i + (c - 1),
    lambda i, j, c: torch.lt(i - 1 + c, j),
    lambda i, j, c: i - j <= -c,
    lambda i, j, c: ~(j < i + c),
    lambda i, j, c: torch.ones(i.shape[0], j.shape[1]).triu(c) != 0,
    lambda i, j, c: ~torch.tril(torch.ones(i.shape[0], j.shape[1], dtype=torch.bool), c - 1),
    lambda i, j, c: torch.triu(torch.ones(i.shape[0], j.shape[1]), c).eq(1),
    lambda i, j, c: (
        torch.concat([torch.triu(torch.ones(i.shape[0], j.shape[1]), c), torch.ones(i.shape[0], 0)], 1) > 0.5
    ),
)
AROUND = (
    lambda i, j, w: abs(i - j) <= w,
    lambda i, j, w: (j - i).abs() < w + 1,
    lambda i, j, w: w >= torch.abs(j - i),
    lambda i, j, w: ~(torch.abs(i - j) > w),
)

SAME_CHUNK = (
    lambda i, j, n: j // n == i // n,
    lambda i, j, n: torch.eq(torch.div(i, n, rounding_mode="floor"), torch.floor_divide(j, n)),
    lambda i, j, n: ~((i // n).expand(i.shape[0], 1) != (j // n)),
    lambda i, j, n: (0 + j) // n == (1 + i - 1) // n,
)


def in_place(a, b):
    mask = torch.ones_like(a & b)
    mask &= a
    mask.masked_fill_(~b, False)
    return mask


JOIN = (
    lambda a, b: a & b,
    torch.logical_and,
    torch.mul,
    lambda a, b: ~(~a | ~b),
    lambda a, b: torch.where(a, b, False),
    lambda a, b: torch.where(~b, False, a),
    lambda a, b: (b & a).masked_fill(~a, False),
    lambda a, b: (a.float() * b.float()).bool(),
    in_place,
)


def fill_in_place(m):
    mask = torch.zeros(m.shape)
    mask.masked_fill_(~m, INF)
    return mask


FORM = (
    lambda m: m,
    lambda m: m.expand(2, 1, m.shape[-2], m.shape[-1]) if m.ndim < 4 else m,
    lambda m: ~~m,
    lambda m: torch.where(m, 0.0, INF),
    lambda m: torch.where(m, torch.tensor(0.0), MIN),
    lambda m: torch.zeros(m.shape).masked_fill(~m, MIN),
    lambda m: (1.0 - m.float()) * MIN,
    lambda m: -MIN * (m.float() - 1),
    lambda m: torch.cat([torch.where(m, 0.0, MIN), torch.zeros(*m.shape[:-1], 0)], -1),
    lambda m: torch.zeros(m.shape).masked_fill(m == 0, INF),
    fill_in_place,
)
PADDING = (
    lambda pad: pad[:, None, None],
    lambda pad: pad[:, None, None, :].bool(),
    lambda pad: (pad != False)[:, None, None],  # noqa: E712
    lambda pad: ~(~pad)[:, None, None],
)


def random_mask(rng):
    """A causal, windowed, chunked, two-sided or bidirectional mask, with or without padding, in a random form."""
    kind = rng.choice(("causal", "window", "band", "chunk", "around", "none"))
    aligned, shift, width = rng.random() < 0.5, rng.choice((0, 0, 0, -1, 2)), rng.choice((1, 2, 4))
    index, column, row = (rng.choice(ways) for ways in (INDEX, COLUMN, ROW))
    most, least, around, join, form = (rng.choice(ways) for ways in (AT_MOST, AT_LEAST, AROUND, JOIN, FORM))
    same_chunk = rng.choice(SAME_CHUNK)
    padding, join_padding = rng.choice(PADDING), rng.choice(JOIN[:5])
    padded, swapped = rng.random() < 0.35 or kind == "none", rng.random() < 0.5

    def mask_of(q, k, pad):
        i, j = column(index(q)), row(index(k))
        c = shift + (k - q if aligned else 0)
        if kind == "none":
            return form(padding(pad).expand(2, 1, q, k))
        mask = around(i, j, width) if kind == "around" else most(i, j, c)
        if kind in ("window", "band"):
            far = least(i, j, c - width + 1)
            mask = join(far, mask) if swapped else join(mask, far)
        if kind == "chunk":
            near = same_chunk(i + c, j, width + 1)
            mask = join(near, mask) if swapped else join(mask, near)
        return form(join_padding(mask[None, None], padding(pad)) if padded else mask)

    return mask_of


def capture(makers):
    """One Dynamo graph of many masks; the placeholders' lengths are symbols."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm.graph)
        return gm.forward

    def masks(q, k, pad):
        # All inputs are used, so that Dynamo keeps them.
        return *(make(q.shape[0], k.shape[0], pad) for make in makers), q + 1, k + 1, ~pad

    q, k, pad = torch.empty(5, 1, 1), torch.empty(9, 1, 1), torch.ones(2, 9, dtype=torch.bool)
    torch._dynamo.reset()
    for tensor, dim in ((q, 0), (k, 0), (pad, 1)):
        torch._dynamo.mark_dynamic(tensor, dim)
    torch.compile(masks, backend=backend, fullgraph=True)(q, k, pad)
    (graph,) = graphs
    return graph, graph.output_node().args[0][: len(makers)]


def extract(graph, mask):
    """A copy of what one mask is computed from: its ancestors and whatever writes into them."""
    needed, pending = set(), [mask]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
        if not pending:
            pending = [n for n in graph.nodes if n not in needed and needed.intersection(written_nodes(n))]
    copy, copies = fx.Graph(), {}
    for node in graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = copy.node_copy(node, copies.__getitem__)
    copy.output(copies[mask])
    return copy


def result(graph):
    return graph.output_node().args[0]


COMPARISONS = {"eq": operator.eq, "le": operator.le, "lt": operator.lt, "ge": operator.ge, "gt": operator.gt}


def mutations(graph):
    """All single changes, as functions that apply them to a copy, given the node's place."""
    changes = []
    for place, node in enumerate(graph.nodes):
        name = function_name(node)
        if name in COMPARISONS:
            changes += [(place, ("call", other)) for key, other in COMPARISONS.items() if key != name]
        if name in (*COMPARISONS, "sub", "rsub"):
            changes.append((place, ("args", node.args[::-1])))
        if name == "where":
            changes.append((place, ("args", (node.args[0], *node.args[:0:-1]))))
        if name == "invert":
            changes.append((place, ("call", torch.clone)))
        if name in ("tril", "triu"):
            changes.append((place, ("call", torch.triu if name == "tril" else torch.tril)))
        if name in ("and", "or", "mul", "masked_fill") and isinstance(value_of(node), torch.Tensor):
            changes += [(place, ("drop", at)) for at in (0, 1) if isinstance(node.args[at], fx.Node)]
        for at, argument in enumerate(node.args):
            if isinstance(argument, int) and not isinstance(argument, bool) and name in _SHIFTABLE:
                changes += [(place, ("args", (*node.args[:at], argument + d, *node.args[at + 1 :]))) for d in (1, -1)]
    return changes


_SHIFTABLE = (
    *COMPARISONS,
    "add",
    "radd",
    "sub",
    "rsub",
    "tril",
    "triu",
    "arange",
    "ne",
    "floordiv",
    "floor_divide",
    "div",
    "index_select",
    "cat",
)


def mutant(graph, place, change):
    """A copy of a graph with one change, its fake values computed anew."""
    copy, copies = fx.Graph(), {}
    for node in graph.nodes:
        copies[node] = copy.node_copy(node, copies.__getitem__)
    node = list(copy.nodes)[place]
    kind, what = change
    if kind == "call":
        node.op, node.target = "call_function", what
    elif kind == "args":
        node.args = fx.map_arg(what, copies.__getitem__)
    else:
        neutral_is_false = function_name(node) == "or" or (function_name(node) == "masked_fill" and what == 1)
        with copy.inserting_before(node):
            full = torch.zeros_like if neutral_is_false else torch.ones_like
            neutral = copy.call_function(full, (node.args[what],))
        node.args = tuple(neutral if at == what else argument for at, argument in enumerate(node.args))
    return copy


def evaluate(graph, inputs):
    """Runs a graph on real inputs, one a placeholder."""
    values, given = {}, iter(inputs)
    for node in graph.nodes:
        values[node] = next(given) if node.op == "placeholder" else call(node, values)
    return values[result(graph)]


def call(node, values):
    """The value of a node, given those of its arguments."""
    if node.op == "output":
        return None
    args, kwargs = (fx.map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
    function = getattr(type(args[0]), node.target) if node.op == "call_method" else node.target
    return function(*args, **kwargs)


def refresh(graph):
    """Fake values of a changed graph; False if it cannot run at every length."""
    fakes = [value_of(node) for node in graph.find_nodes(op="placeholder")]
    mode = next(value for value in fakes if isinstance(value, torch.Tensor)).fake_mode
    values = {}
    try:
        with mode, mode.shape_env.error_on_new_guards():
            for node in graph.nodes:
                if node.op in ("call_function", "call_method"):
                    node.meta["example_value"] = call(node, values)
                values[node] = value_of(node)
    except Exception:
        return False
    return True


def symbols_of(graph):
    """The symbols of both lengths."""
    tensors = [value_of(node) for node in graph.find_nodes(op="placeholder")]
    q, k = (tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.ndim == 3)
    return q.shape[0], k.shape[0]


def concrete(graph, symbols, lengths, pad):
    """Real inputs of a graph at two lengths."""
    values = {symbol.node.expr: length for symbol, length in zip(symbols, lengths, strict=True)}

    def number(size):
        return int(size.node.expr.subs(values)) if isinstance(size, torch.SymInt) else size

    fakes = [value_of(node) for node in graph.find_nodes(op="placeholder")]
    sizes = [number(fake) if isinstance(fake, int | torch.SymInt) else map(number, fake.shape) for fake in fakes]
    bools = [isinstance(fake, torch.Tensor) and fake.dtype is torch.bool for fake in fakes]
    return [
        size if isinstance(size, int) else pad if is_bool else torch.empty(*size)
        for size, is_bool in zip(sizes, bools, strict=True)
    ]


def check(graph, proof, symbols):
    """The mask is what the proof states, at lengths that the capture did not see."""
    for lengths in LENGTHS:
        pad = torch.rand(2, lengths[1]) < 0.6
        pad[1] = False
        mask = evaluate(graph, concrete(graph, symbols, lengths, pad)).expand(2, 1, *lengths)
        seen = mask if mask.dtype is torch.bool else mask == 0
        keys = None
        for key_mask in proof.key_masks:
            part = evaluate(upto(graph, key_mask.node), concrete(graph, symbols, lengths, pad))
            for dim, position in sorted(key_mask.selected, reverse=True):
                part = part.select(dim, position)
            part = part[None] if key_mask.batch_dim is None else part
            assert key_mask.start == 0
            assert key_mask.batch_dim is None or key_mask.batch_dim < key_mask.dim
            part = ~part if key_mask.negated else part
            keys = part if keys is None else keys & part
        assert torch.equal(visible(proof, symbols, lengths, keys).expand_as(seen), seen), (str(proof), lengths, graph)
        fully_masked = ~seen.any(-1)
        if mask.dtype is not torch.bool and fully_masked.any():
            hidden = mask[fully_masked].unique()
            assert hidden.tolist() == ([INF] if proof.fully_masked == "zeros" else [MIN]), (str(proof), lengths, graph)


def upto(graph, last):
    """The part of a graph that computes one node."""
    copy, copies = fx.Graph(), {}
    for node in graph.nodes:
        if node.op != "output":
            copies[node] = copy.node_copy(node, copies.__getitem__)
    copy.output(copies[last])
    return copy


@pytest.mark.slow
def test_no_wrong_mask_is_ever_proven():
    rng = random.Random(0)
    torch.manual_seed(0)
    proven = accepted = rejected = 0
    for _ in range(BATCHES):
        whole, masks = capture([random_mask(rng) for _ in range(MASKS)])
        for mask in masks:
            graph = extract(whole, mask)
            symbols = symbols_of(graph)
            proof = MaskProver(graph).prove(result(graph), *symbols)
            if not isinstance(proof, Rejected):
                proven += 1
                check(graph, proof, symbols)
            changes = mutations(graph)
            for place, change in rng.sample(changes, min(MUTANTS, len(changes))):
                other = mutant(graph, place, change)
                if not refresh(other):
                    continue
                proof = MaskProver(other).prove(result(other), *symbols)
                if isinstance(proof, Rejected):
                    assert proof.reason
                    rejected += 1
                else:
                    accepted += 1
                    check(other, proof, symbols)
    total = BATCHES * MASKS
    print(f"{proven} of {total} masks proven; {accepted} mutants proven, {rejected} rejected")
    assert total >= 200
    assert proven >= 0.9 * total  # a prover that rejects everything would pass the rest
    assert accepted >= 200
    assert rejected >= 200
