"""Packed sequences as tests call them: each a case of its own, joined, and laid out in pages."""

import dataclasses
import random
from dataclasses import dataclass

import torch

import s2o_compile
from tests.conftest import Case, assert_close, exact_attention

LAYOUTS = ("heads_first", "two", "pair")
ROWS = {"cpu": 128, "cuda": 1024}
"""Queries that are compared at a time: of 20,000 keys each."""

PIECES = 8
"""So many times ROWS queries of a sequence are compared on a CPU, where 20,000 by 20,000 take a minute."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Some sequences (queries, keys), and the ``Case`` that all share; ``kept`` are those with queries and keys."""

    lengths: tuple[tuple[int, int], ...]
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    value_dim: int | None = None
    dtype: str = "fp32"
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None

    @classmethod
    def random(cls, seed, count, longest, total=10**9, **fields):
        """Sequences of 1 to ``longest`` keys, short ones as likely as long ones, and of queries up to as many."""
        draw, lengths = random.Random(seed), []
        for left in range(count, 0, -1):
            keys = min(int(longest ** draw.random()), max(total // left, 1))
            lengths.append((draw.choice([1, keys, draw.randint(1, keys)]), keys))
            total -= keys
        return cls(lengths=tuple(lengths), **fields)

    def __str__(self):
        shape = f"S{len(self.lengths)}-H{self.heads}-Hkv{self.kv_heads}-D{self.head_dim}-{self.dtype}"
        names = ("causal", "window", "softcap", "sinks", "value_dim", "scale")
        return "-".join([shape, *(f"{name}{getattr(self, name)}" for name in names if getattr(self, name) is not None)])

    def inputs(self, device="cpu"):
        """``Inputs`` of every sequence; those without queries or keys are None."""
        fields = ("heads", "kv_heads", "head_dim", "value_dim", "dtype", "causal", "window", "softcap", "sinks")
        shared = {name: getattr(self, name) for name in fields}
        found, sinks = [], None
        for seed, (queries, keys) in enumerate(self.lengths):
            if not queries or not keys:
                found.append(None)
                continue
            made = Case(queries=queries, keys=keys, **shared).inputs(device, seed=seed)
            shared["sinks"] = False  # those of the first sequence are all others', too
            sinks = made.sinks if sinks is None else sinks
            scale = made.scale if self.scale is None else self.scale
            found.append(dataclasses.replace(made, sinks=sinks, scale=scale))
        return found

    def joined(self, inputs, device="cpu", hidden=()):
        """Query, key and value of all sequences, and cumulative lengths.

        Keys and values that nobody sees are NaN, and those of the ``hidden`` sequences.
        """
        tensors = ([], [], [])
        some = next(x for x in inputs if x is not None)
        for number, ((queries, keys), made) in enumerate(zip(self.lengths, inputs, strict=True)):
            for at, (parts, x) in enumerate(zip(tensors, some.tensors if made is None else made.tensors, strict=True)):
                rows = (queries, keys, keys)[at]
                empty = torch.full((rows, x.shape[1], x.shape[3]), float("nan"), dtype=x.dtype, device=device)
                parts.append(empty if made is None or (at and number in hidden) else x[0].transpose(0, 1))
        starts = [torch.tensor([0, *(pair[at] for pair in self.lengths)]).cumsum(0).int() for at in (0, 1)]
        return *(torch.cat(parts) for parts in tensors), *starts

    def options(self):
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.scale}


def sinks_of(inputs):
    return next(x.sinks for x in inputs if x is not None)


def in_pages(key, value, starts, page_len, layout, *, spare=5, seed=0):
    """A cache that holds these keys [Tk, Hkv, D] in pages of any order, and NaN elsewhere; the table of pages, lengths.

    ``layout`` is one of LAYOUTS.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = starts.diff().tolist()
    counts = [-(-length // page_len) for length in lengths]
    pages, heads = sum(counts) + spare, key.shape[1]
    order = torch.randperm(pages, generator=generator)
    table = torch.full((len(lengths), max([*counts, 1]) + 2), -7, dtype=torch.int32)
    if layout == "heads_first":
        cache = key.new_full((pages, heads, page_len, 2 * key.shape[2]), float("nan"))
        slots = cache.transpose(1, 2)
        views = slots[..., : key.shape[2]], slots[..., key.shape[2] :]
    elif layout == "two":
        cache = key.new_full((2, pages, page_len, heads, key.shape[2]), float("nan"))
        views = cache[0], cache[1]
    else:
        cache = tuple(x.new_full((pages, page_len, heads, x.shape[2]), float("nan")) for x in (key, value))
        views = cache
    taken = 0
    for at, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        table[at, :count] = order[taken : taken + count]
        position = torch.arange(length)
        page = table[at].long()[position // page_len].to(key.device)
        for view, x in zip(views, (key, value), strict=True):
            view[page, (position % page_len).to(key.device)] = x[starts[at] : starts[at + 1]]
        taken += count
    return cache, table, torch.tensor(lengths, dtype=torch.int32)


def assert_exact(packing, inputs, output, lse, hidden=()):
    """Every sequence's rows but those of the ``hidden`` are exact attention; queries without keys have zeros.

    Of long sequences on a CPU some tiles of queries are compared, in even steps from the first to the last.
    """
    first, size = 0, ROWS[output.device.type]
    for at, ((queries, _), made) in enumerate(zip(packing.lengths, inputs, strict=True)):
        rows = slice(first, first + queries)
        if made is None:
            assert not output[rows].any()
        elif at not in hidden:
            assert output[rows].isfinite().all()
            pieces = range(0, queries, size)
            if size == ROWS["cpu"] and len(pieces) > PIECES:
                pieces = [pieces[number * (len(pieces) - 1) // (PIECES - 1)] for number in range(PIECES)]
            for start in pieces:
                mask = dataclasses.replace(made.mask, offset=made.mask.offset + start * packing.causal)
                piece = dataclasses.replace(made, query=made.query[:, :, start : start + size], mask=mask)
                some = slice(first + start, first + min(start + size, queries))
                assert_close((output[some].transpose(0, 1)[None], lse[None, :, some]), exact_attention(piece), piece)
        first += queries


def config(**options):
    """Sparse at every length, and exact, unless told otherwise; segments are short."""
    exact = {} if "error" in options else {"tau": 0.0}
    return s2o_compile.S2OConfig(**{"min_seq_len": 0, "segment_len": 128, **exact, **options})
