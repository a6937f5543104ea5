"""Requests as a server holds them: queries packed, keys and values in shuffled pages, everything unused is NaN."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from tests.conftest import Case, bounds, distance, exact_attention

HEADS, KV_HEADS = 4, 2


@dataclass
class Served:
    """Some requests as (queries, keys): their last queries align with their last keys."""

    lengths: list
    head_dim: int = 32
    block: int = 16
    dtype: str = "fp32"
    device: str = "cpu"
    terms: dict = field(default_factory=dict)
    spare: int = 3

    @cached_property
    def inputs(self):
        """One request's tensors each, as the operator's tests make them."""
        sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": self.head_dim, "dtype": self.dtype, **self.terms}
        cases = [Case(queries=queries, keys=keys, **sizes) for queries, keys in self.lengths]
        inputs = [case.inputs(self.device, seed=seed) for seed, case in enumerate(cases)]
        return [replace(x, sinks=inputs[0].sinks) for x in inputs]  # sinks are a layer's

    @property
    def starts(self):
        starts = [0]
        for queries, _ in self.lengths:
            starts.append(starts[-1] + queries)
        return starts

    @property
    def seq_lens(self):
        return [keys for _, keys in self.lengths]

    @cached_property
    def query(self):
        """[T, Hq, D]."""
        return torch.cat([x.query[0].transpose(0, 1) for x in self.inputs])

    @property
    def new(self):
        """Keys and values of the queries' own tokens [T, Hkv, D], which vLLM passes beside the cache."""
        own = [(x.key[0, :, -n:], x.value[0, :, -n:]) for x, (n, _) in zip(self.inputs, self.lengths, strict=True)]
        return [torch.cat([pair[at].transpose(0, 1) for pair in own]) for at in (0, 1)]

    @cached_property
    def block_table(self):
        """int32 [S, most blocks]; entries behind a request's own point anywhere."""
        counts = [-(-keys // self.block) for keys in self.seq_lens]
        order = torch.randperm(sum(counts) + self.spare, generator=torch.Generator().manual_seed(7))
        table = torch.randint(len(order), (len(counts), max(counts)), generator=torch.Generator().manual_seed(8))
        for at, count in enumerate(counts):
            table[at, :count] = order[sum(counts[:at]) :][:count]
        return table.int().to(self.device)

    @cached_property
    def pages(self):
        """Keys and values, each [blocks, block, Hkv, D]."""
        n_blocks = sum(-(-keys // self.block) for keys in self.seq_lens) + self.spare
        shape = (n_blocks, self.block, KV_HEADS, self.head_dim)
        both = [torch.full(shape, torch.nan, dtype=self.query.dtype, device=self.device) for _ in range(2)]
        for x, table in zip(self.inputs, self.block_table.tolist(), strict=True):
            for pages, rows in zip(both, (x.key[0], x.value[0]), strict=True):
                for at, piece in enumerate(rows.transpose(0, 1).split(self.block)):
                    pages[table[at], : len(piece)] = piece
        return both

    @property
    def flash_cache(self):
        """vLLM's cache of FLASH_ATTN: [blocks, Hkv, block, 2 D]."""
        return torch.cat(self.pages, dim=-1).transpose(1, 2).contiguous()

    def assert_close(self, output):
        """[T, Hq, D] is every request's attention, judged by float64."""
        for x, first, (queries, _) in zip(self.inputs, self.starts, self.lengths, strict=False):
            expected = exact_attention(x)[0][0].transpose(0, 1)
            assert distance(output[first : first + queries], expected) <= bounds(x)[0]
