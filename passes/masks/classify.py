"""Turns a conjunction of terms into a proof about queries and keys: a band, chunks, documents, and key masks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from s2o_compile.passes.graph.nodes import Size, known, simplified
from s2o_compile.passes.graph.rejected import Refused
from s2o_compile.passes.masks.index_tensor import IndexTensor
from s2o_compile.passes.masks.proof import KeyMask, MaskProof, PackedDocuments, TokenTable
from s2o_compile.passes.masks.term import Comparison, LookUp, SameChunk, SameDocument, Terms

BATCH, HEAD, QUERY, KEY = range(4)
_AXES = ("batch entries", "heads", "queries", "keys")


def classify(terms: Terms, shape: Sequence[Size], query_len: Size, key_len: Size) -> MaskProof:
    """The proof that a conjunction of terms over a mask's shape [.., Nq, Nk] is; raises `Refused`."""
    lead = 4 - len(shape)
    singleton = [True] * lead + [known(size == 1) for size in shape]
    offsets: list[Size] = []  # j <= i + offset
    reaches: list[Size] = []  # j >= i - reach
    chunks: list[SameChunk] = []
    key_masks: list[KeyMask] = []
    documents: list[tuple[SameDocument, PackedDocuments]] = []
    for term in terms:
        if isinstance(term, SameDocument):
            found = _documents(term, singleton)
            if found is not None:
                documents.append((term, found))
                continue
            if not term.settled:
                raise Refused.because(term.why)
            term = term.plain
        if isinstance(term, SameChunk):
            chunks.append(term)
            continue
        if isinstance(term, LookUp):
            key_masks.append(_key_mask(term, singleton))
            continue
        assert isinstance(term, Comparison)
        (index,) = term.indices
        steps = _steps(index, singleton)
        if steps == (0, 0, 1, -1):
            offsets.append(index.const)
        elif steps == (0, 0, -1, 1):
            reaches.append(index.const)
        else:
            axes = " and ".join(axis for axis, step in zip(_AXES, steps, strict=True) if step)
            varies = f": it varies along {axes}" if axes else ""
            raise Refused("%s is neither a causal bound nor a sliding window%s", term.node, varies)
    offset, reach = _least(offsets), _least(reaches)
    if reach is not None and offset is None:
        raise Refused("it hides keys before a sliding window but no keys after the query")
    window = None if offset is None or reach is None else simplified(offset + reach + 1)
    if window is not None and not known(window >= 1):
        raise Refused("its sliding window of %s tokens may be empty", window)
    chunk = _chunk(chunks, singleton, offset)
    packed = None
    for term, found in documents:
        if packed is not None and found.identity != packed.identity:
            raise Refused("%s and %s number documents differently", documents[0][0].node, term.node)
        packed = found
    if packed is not None and chunk is not None:
        raise Refused(
            "%s cuts documents, and %s chunks that are counted across them", documents[0][0].node, chunks[0].node
        )
    if offset is None:
        return MaskProof(documents=packed, key_masks=tuple(key_masks))
    ahead = simplified(offset - (key_len - query_len))
    return MaskProof(
        causal=True,
        offset=None if known(offset == key_len - query_len) else simplified(offset),
        window=window,
        chunk=chunk,
        documents=packed,
        key_masks=tuple(key_masks),
        ahead=ahead if known(ahead > 0) else 0,
    )


def _steps(index: IndexTensor, singleton: Sequence[bool]) -> tuple[int, ...]:
    """Steps along batch, head, query and key; 0 along dimensions of one element."""
    steps = (0,) * (4 - len(index.steps)) + index.steps
    return tuple(0 if single else step for step, single in zip(steps, singleton, strict=True))


def _least(bounds: Sequence[Size]) -> Size | None:
    """The tightest of several bounds that all hold."""
    if not bounds:
        return None
    for bound in bounds:
        if all(known(bound <= other) for other in bounds):
            return bound
    raise Refused("which of its bounds %s is the tightest depends on the lengths", ", ".join(map(str, bounds)))


def _chunk(terms: Sequence[SameChunk], singleton: Sequence[bool], offset: Size | None) -> int | None:
    """The length of the chunks, provided that key j is compared with the query's own position i + offset."""
    for term in terms:
        sides = {_steps(side, singleton): side for side in term.indices}
        key, query = sides.get((0, 0, 0, 1)), sides.get((0, 0, 1, 0))
        if key is None or query is None:
            raise Refused("%s compares chunks of other things than queries and keys", term.node)
        if not known(key.const == 0):
            raise Refused("%s counts its chunks from position %s, expected the first key", term.node, key.const)
        if offset is None or not known(query.const == offset):
            raise Refused("%s cuts chunks (%s) without a causal mask of the same offset", term.node, term.size)
        if term.size != terms[0].size:
            raise Refused("%s and %s cut chunks of different lengths", terms[0].node, term.node)
    return terms[0].size if terms else None


def _key_mask(term: LookUp, singleton: Sequence[bool]) -> KeyMask:
    """A look-up as a key mask, provided that it varies along nothing but batch and keys."""
    for index in term.indices:
        steps = _steps(index, singleton)
        if steps[QUERY] and term.node.op == "placeholder":
            raise Refused(
                "%s varies along queries, and %s: let the model make its mask of a 2-D attention_mask, inside the "
                "compiled region, or promise that it is causal (assume_causal_mask=True)",
                term.node,
                term.why,
            )
        if steps[QUERY] or steps[HEAD]:
            raise Refused("%s varies along %s, and %s", term.node, _AXES[QUERY if steps[QUERY] else HEAD], term.why)
    table = _table(term.node, term.indices, KEY, singleton)
    if table is None and not any(_steps(index, singleton)[KEY] for index in term.indices):
        raise Refused("%s does not vary along the keys, and %s", term.node, term.why)
    if table is None:
        raise Refused("%s is read at positions that are no plain batch and key positions", term.node)
    return KeyMask(**vars(table), negated=term.negated)


def _documents(term: SameDocument, singleton: Sequence[bool]) -> PackedDocuments | None:
    """Documents, provided that numbers of queries are compared with numbers of keys."""
    for query, key in ((0, 1), (1, 0)):
        queries = _table(term.tables[query], term.sides[query], QUERY, singleton)
        keys = _table(term.tables[key], term.sides[key], KEY, singleton)
        if queries is not None and keys is not None:
            return PackedDocuments(queries, keys)
    return None


def _table(node: fx.Node, indices: Sequence[IndexTensor], axis: int, singleton: Sequence[bool]) -> TokenTable | None:
    """A tensor read at plain positions of batch entries and of queries, or of keys; None if it is not."""
    along = tuple(int(other == axis) for other in range(4))
    batch_dim, dim, start = None, None, 0
    selected: list[tuple[int, int]] = []
    for at, index in enumerate(indices):
        steps = _steps(index, singleton)
        if steps == (1, 0, 0, 0) and batch_dim is None and known(index.const == 0):
            batch_dim = at
        elif steps == along and dim is None:
            dim, start = at, simplified(index.const)
        elif not any(steps) and isinstance(simplified(index.const), int):
            selected.append((at, int(index.const)))
        else:
            return None
    if dim is None:
        return None
    return TokenTable(node=node, batch_dim=batch_dim, dim=dim, start=start, selected=tuple(selected))
