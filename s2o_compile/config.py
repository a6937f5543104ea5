"""The one configuration object."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from s2o_compile.errors import OptionError
from s2o_compile.kernels.options import OperatorOptions

_OPERATOR_FIELDS = tuple(field.name for field in dataclasses.fields(OperatorOptions))
_EXAMPLE = 'Give dense_heads={"model.layers.3.self_attn": (0, 2)}, with the names that s2o_compile.explain lists.'


class SiteHeads(Mapping[str, tuple[int, ...]]):
    """Key/value heads by site name: immutable, hashable, equal to any mapping of the same.

    Args:
        heads: Heads of every site, in any order; sites without any are dropped.

    Raises:
        OptionError: A name that is no text, or heads that are no integers >= 0.
    """

    def __init__(self, heads: Mapping[str, Sequence[int]]) -> None:
        if not isinstance(heads, Mapping):
            raise OptionError(f"dense_heads: expected site names and their key/value heads, got {heads!r}. {_EXAMPLE}")
        for site, given in heads.items():
            if not isinstance(site, str) or not site:
                raise OptionError(f"dense_heads: expected a site name, got {site!r}. {_EXAMPLE}")
            listed = isinstance(given, Sequence) and not isinstance(given, str)
            if not listed or any(isinstance(head, bool) or not isinstance(head, int) or head < 0 for head in given):
                raise OptionError(f"dense_heads[{site!r}]: expected key/value heads >= 0, got {given!r}. {_EXAMPLE}")
        self._heads = {site: tuple(sorted(set(heads[site]))) for site in sorted(heads) if heads[site]}

    def __getitem__(self, site: str) -> tuple[int, ...]:
        return self._heads[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __hash__(self) -> int:
        return hash(tuple(self._heads.items()))

    def __repr__(self) -> str:
        return repr(self._heads)


@dataclass(frozen=True, kw_only=True)
class S2OConfig(OperatorOptions):
    """How attention is made sparse. Frozen, keyword-only, checked on creation.

    Attributes:
        tau: Quality against speed, a number >= 0. A tile of 128 queries stops once the estimated unvisited softmax
            mass, relative to the mass visited, falls below it in every row. The worst row decides, so values near 1
            leave far less unvisited on average; ``tau=0.0`` never stops and is exact.
        min_seq_len: Key lengths below this run dense, in tokens. "auto" takes the measured crossover of the device:
            16384 on an H100 and on GPUs that were not measured, 8192 on a CPU, or what ``s2o tune`` found there.
        segment_len: Queries that share one ranking of the keys, a multiple of 128. None chooses by length: 512 up to
            32K queries, 1024 beyond.
        ranking: "per_query" scores every query in a few dimensions and keeps retrieval alive; "mean_query" is the
            paper's, cheapest, and loses what only a few queries look for; "sub_mean" lies between.
        query_order: "none", or "mean_query" to sort queries inside a segment (denser pass 1, more alike tiles).
        implementation: "auto" takes Triton on CUDA and torch elsewhere; "triton" and "torch" insist.
        dense_heads: Heads that run dense beside the sparse ones: site name, as ``explain`` lists it, to key/value heads
            (``{"model.layers.3.self_attn": (0, 2)}``). All query heads that share a marked key/value head run on SDPA;
            a group is what is ranked, so a group is the unit. A window is exact already, marks change nothing there.
            Reports list the marks, and names that no attention has. A head that a site does not have raises InputError
            when it runs.
        inner_backend: The torch.compile backend that compiles the rewritten graph: "inductor", or "eager" for no
            compilation at all, or any other that torch knows.
        assume_causal_mask: Your promise that every mask over queries and keys that *enters* a graph ([Nq, Nk] with up
            to two leading dimensions, bool or additive) is causal: query i sees exactly the keys j <= i + Nk - Nq.
            Such a mask cannot be proven, and its attention stays dense otherwise. If the promise is wrong, so is the
            result. Reports say "causal (promised)". A causal mask with padding in it is not causal.
        assume_block_masks: Your promise that every BlockMask that *enters* a graph lists exactly the blocks its
            mask_mod leaves visible, as ``create_block_mask`` makes them. The mask_mod of a ``flex_attention`` is
            proven, but its tables of blocks are data, and the attention stays as it is otherwise. If the promise is
            wrong, so is the result. Reports say "(promised)". Tables made inside the compiled function need none.
        read_masks: Whether the operator reads masks that could not be proven (they enter a graph behind a graph break,
            or are made of data) when it runs, from ``min_seq_len`` on: where every value agrees with a causal, sliding
            or padding mask it runs sparse, elsewhere SDPA runs under the mask. Reports say "(read at run time)". Costs
            one pass over the mask and one wait for the device a call. False leaves such attentions as they are.
        check_assumptions: Compare promised masks with what was promised of them at run time; where one differs, a
            RuntimeError says so. On CUDA nothing waits for the check: the error comes with the next synchronisation.
            Costs Nq x Nk flags of memory.

    Raises:
        ValueError: A value out of range; the message says expected, got, and what to do.
    """

    dense_heads: Mapping[str, Sequence[int]] = SiteHeads({})
    inner_backend: str = "inductor"
    assume_causal_mask: bool = False
    assume_block_masks: bool = False
    check_assumptions: bool = False
    read_masks: bool = True

    def __post_init__(self) -> None:
        if self.min_seq_len is None:  # as configurations were written before "auto" had its name
            object.__setattr__(self, "min_seq_len", "auto")
        super().__post_init__()
        object.__setattr__(self, "dense_heads", SiteHeads(self.dense_heads))
        for name in ("assume_causal_mask", "assume_block_masks", "check_assumptions", "read_masks"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}: expected True or False, got {getattr(self, name)!r}.")
        known = torch._dynamo.list_backends(exclude_tags=None)
        if self.inner_backend not in known or self.inner_backend == "s2o":
            raise OptionError(
                unknown_name("inner_backend", self.inner_backend, [name for name in known if name != "s2o"])
            )

    def operator_options(self) -> dict[str, Any]:
        """The operator's fields as keyword arguments of ``torch.ops.s2o.attention``."""
        options = {name: getattr(self, name) for name in _OPERATOR_FIELDS}
        by_head = {"tau": OperatorOptions.tau, "head_tau": list(self.tau)} if isinstance(self.tau, tuple) else {}
        return options | by_head | {"min_seq_len": None if self.min_seq_len == "auto" else self.min_seq_len}

    def to_json(self) -> str:
        """JSON text that ``from_json`` reads back to an equal configuration."""
        return json.dumps(dataclasses.asdict(self), default=dict)

    @classmethod
    def from_json(cls, text: str) -> S2OConfig:
        """Configuration from the text of ``to_json``; missing fields take their defaults."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise OptionError(f"S2OConfig.from_json: expected JSON, got {text[:60]!r} ({error}).") from error
        if not isinstance(fields, dict):
            raise OptionError(f"S2OConfig.from_json: expected a JSON object, got {type(fields).__name__}.")
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> S2OConfig:
        """Configuration from a mapping of field names; unknown names raise OptionError."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise OptionError(unknown_name("configuration field", name, known))
        return cls(**fields)  # pyright: ignore[reportArgumentType]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for a name that does not exist, with the nearest one that does."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}: expected one of {', '.join(known)}.{hint}"
