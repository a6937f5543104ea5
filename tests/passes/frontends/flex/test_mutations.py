"""Random mask functions of flex_attention and their mutants: whatever is proven is the mask, at every length."""

import random

import pytest
import torch
from torch import fx
from torch.nn.attention.flex_attention import flex_attention

from s2o_compile.passes.frontends.flex import match as flex
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.rejected import Rejected, attempt
from s2o_compile.passes.masks.prover import MaskProver
from tests.helpers.masks import visible
from tests.passes.masks.test_mutations import mutant, mutations

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
INF = float("-inf")
LENGTHS = ((6, 11), (7, 7), (12, 5))  # (queries, keys); the capture sees (5, 9)
BATCHES, CALLS, MUTANTS = 3, 12, 5

AT_MOST = (
    lambda i, j, c: j <= i + c,
    lambda i, j, c: i + c >= j,
    lambda i, j, c: j - i < c + 1,
    lambda i, j, c: ~(j > i + c),
    lambda i, j, c: torch.where(j - c <= i, True, False),
    lambda i, j, c: torch.logical_not(i < j - c),
)
AT_LEAST = (
    lambda i, j, c: j >= i + c,
    lambda i, j, c: i - j <= -c,
    lambda i, j, c: ~(j < i + c),
    lambda i, j, c: j > i + (c - 1),
)
JOIN = (
    lambda a, b: a & b,
    lambda a, b: ~(~a | ~b),
    torch.logical_and,
    lambda a, b: torch.where(a, b, False),
    lambda a, b: torch.where(~b, False, a),
)
PADDING = (lambda p, b, j: p[b, j], lambda p, b, j: p[b][j], lambda p, b, j: ~(~p[b, j]))
HIDE = (
    lambda m, s: torch.where(m, s, INF),
    lambda m, s: torch.where(~m, INF, s),
    lambda m, s: s.masked_fill(~m, INF),
    lambda m, s: s + torch.where(m, 0.0, INF),
)


def random_score_mod(rng):
    """A causal or windowed mask, with or without padding, in a random form."""
    most, least, join, hide = (rng.choice(ways) for ways in (AT_MOST, AT_LEAST, JOIN, HIDE))
    join_padding, padding = rng.choice(JOIN), rng.choice(PADDING)
    windowed, padded, shift, width = (
        rng.random() < 0.5,
        rng.random() < 0.4,
        rng.choice((0, 0, -1, 2)),
        rng.choice((1, 3)),
    )

    def score_mod(pad, score, b, h, i, j):
        mask = most(i, j, shift)
        if windowed:
            mask = join(mask, least(i, j, shift - width + 1))
        return hide(join_padding(mask, padding(pad, b, j)) if padded else mask, score)

    return score_mod


def capture(rng):
    """The Dynamo graph of many calls, the symbols of both lengths, and the name of the padding's placeholder."""
    graphs, score_mods = [], [random_score_mod(rng) for _ in range(CALLS)]

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    def attend(q, k, pad):
        return [flex_attention(q, k, k, score_mod=lambda *at, mod=mod: mod(pad, *at)) for mod in score_mods], ~pad

    q, k, pad = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    torch._dynamo.reset()
    for tensor, dim in ((q, 2), (k, 2), (pad, 1)):
        torch._dynamo.mark_dynamic(tensor, dim)
    with torch.no_grad():
        torch.compile(attend, backend=backend, fullgraph=True)(q, k, pad)
    (gm,) = graphs
    return gm


def proven(gm, node):
    """The proof of one call, or why there is none; the graph is left as it was."""
    nodes = []
    output = attempt(flex.write, node, nodes)
    if isinstance(output, Rejected):
        proof = output
    else:
        (softmax,) = [inner for inner in nodes if flex.is_attention(inner)]
        site = flex.match(softmax, MaskProver(gm.graph))
        proof = site if isinstance(site, Rejected) else site.mask
        if not isinstance(proof, Rejected):
            assert all(mask.node.op == "placeholder" for mask in proof.key_masks)
    for inner in reversed(nodes):
        gm.graph.erase_node(inner)
    return proof


def judge(body, lengths, pad):
    """The scores that a function leaves visible, [2, 1, Nq, Nk]: it is called for every score alone."""
    function = fx.GraphModule({}, body)
    captured = [pad for _ in body.find_nodes(op="placeholder")[5:]]

    def one(b, i, j):
        score = function(torch.tensor(0.5), b, torch.tensor(0), i, j, *captured)
        return score == 0.5

    ranges = [torch.arange(n, dtype=torch.int32) for n in (2, *lengths)]
    return torch.stack([one(b, i, j) for b in ranges[0] for i in ranges[1] for j in ranges[2]]).view(2, 1, *lengths)


def check(body, proof, symbols):
    """The mask is what the proof states, at lengths that the capture did not see."""
    for lengths in LENGTHS:
        pad = torch.rand(2, lengths[1]) < 0.6
        keys = None
        for key_mask in proof.key_masks:
            assert (key_mask.batch_dim, key_mask.dim, key_mask.start) == (0, 1, 0)
            part = ~pad if key_mask.negated else pad
            keys = part if keys is None else keys & part
        stated = visible(proof, symbols, lengths, keys).expand(2, 1, *lengths)
        assert torch.equal(stated, judge(body, lengths, pad)), (str(proof), lengths, body)


@pytest.mark.slow
def test_no_wrong_mask_function_is_ever_proven():
    rng = random.Random(0)
    torch.manual_seed(0)
    total = accepted = rejected = 0
    for _ in range(BATCHES):
        gm = capture(rng)
        for node in [node for node in gm.graph.nodes if flex.is_call(node)]:
            call = flex.operands(node)
            symbols = value_of(call["query"]).shape[2], value_of(call["key"]).shape[2]
            name = str(call["score_mod"].target)
            body = getattr(gm, name).graph
            proof = proven(gm, node)
            assert not isinstance(proof, Rejected), (str(proof), body)
            check(body, proof, symbols)
            total += 1
            changes = mutations(body)
            for place, change in rng.sample(changes, min(MUTANTS, len(changes))):
                other = mutant(body, place, change)
                setattr(gm, name, fx.GraphModule({}, other))
                proof = proven(gm, node)
                if isinstance(proof, Rejected):
                    assert proof.reason
                    rejected += 1
                else:
                    accepted += 1
                    check(other, proof, symbols)
    print(f"{total} mask functions proven; {accepted} mutants proven, {rejected} rejected")
    assert accepted >= 60
    assert rejected >= 60
