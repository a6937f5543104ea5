"""Plans that outlive a call: keys ranked once, attended over again and again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2o_compile.config import S2OConfig
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import TILE_LEN, Plan
from s2o_compile.kernels.core.validation import check_kinds, check_numbers
from s2o_compile.kernels.dispatch import choose_implementation
from s2o_compile.kernels.impl.flex.forward import place
from s2o_compile.kernels.impl.flex.layout import FlexLayout
from s2o_compile.kernels.planner import build_plan, estimate_unvisited
from s2o_compile.kernels.ranking.unvisited import blocks_to_visit
from s2o_compile.kernels.statistics import pairs_by_head
from s2o_compile.kernels.support.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class S2OPlan:
    """The order in which the keys of an attention are visited, and how far.

    A call that reuses the plan must have its shapes (the values' head dim may differ), dtype, device and mask. Then no
    result is wrong: the plan holds every key that a segment sees, and pass 2 stops by the ``tau`` of the call.

    The *contents* of the tensors are your promise. A plan fits neighbouring layers, steps of a diffusion, or a prompt
    that repeats. Where queries want other keys, important keys stand late, and a call takes longer or errs more. With
    ``implementation="flex"`` the plan's own estimates decide how far to go, so that other tensors err more without a
    sign. Keys and values that hold NaN are visited first only if they did when the plan was made.

    Legend: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, P segments, T query tiles.

    Attributes:
        key_index: int32 [B, Hkv, P, L] (Hq with ``ranking_per="head"``), keys outside the segment's own, most important
            first.
        prefix_count: int32 [B, P], how many entries of ``key_index`` are real; the others are -1.
        segment_len: Queries that share one ranking.
        chunk_len: Keys between two tests of the stop rule.
        unvisited: float32 [B, Hq, P, 1 + blocks], estimated share of the mass behind the first n blocks
            of a ranking.
        query_shape: B, Hq, Nq, D.
        key_shape: B, Hkv, Nk, D.
        dtype: Of the tensors.
        device: Of the tensors.
        causal: Whether keys behind a query's own position are hidden.
        causal_offset: Tokens, 0 unless causal.
        key_mask: bool [B, Nk], a copy of the padding mask, or None.
        tau: Of the configuration that the plan was made with.
    """

    key_index: Tensor
    prefix_count: Tensor
    segment_len: int
    chunk_len: int
    unvisited: Tensor
    query_shape: tuple[int, int, int, int]
    key_shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    causal: bool
    causal_offset: int
    key_mask: Tensor | None
    tau: float | tuple[float, ...]

    @property
    def lists(self) -> Plan:
        """The ranked key indices as executors take them."""
        return Plan(
            segment_len=self.segment_len,
            chunk_len=self.chunk_len,
            key_index=self.key_index,
            prefix_count=self.prefix_count,
        )

    @property
    def mask(self) -> AttentionMask:
        """Which keys a query sees."""
        return AttentionMask(causal=self.causal, offset=self.causal_offset, key_mask=self.key_mask)

    @property
    def nbytes(self) -> int:
        """Memory of the plan's tensors."""
        tensors = (self.key_index, self.prefix_count, self.unvisited, self.key_mask)
        return sum(x.nbytes for x in tensors if x is not None)

    def block_counts(self, tau: float | None = None) -> Tensor:
        """Blocks of 128 ranked keys that each tile visits by the estimate, int32 [B, Hq, T].

        Args:
            tau: As in `S2OConfig`; None for that of the plan. 0 visits all.
        """
        visits = self._visits(tau).clamp(max=self.unvisited.shape[3] - 1)
        real = -(-self.prefix_count // TILE_LEN)
        visits = torch.minimum(visits, real[:, None])
        tiles = torch.arange(0, self.query_shape[2], TILE_LEN, device=self.device)
        return visits[:, :, tiles // self.segment_len]

    def layout(self, tau: float | None = None) -> FlexLayout:
        """The gathered keys and tables of blocks that FlexAttention gets (``implementation="flex"``), tile by tile."""
        shape = (*self.query_shape[:2], self.key_shape[1], self.query_shape[2], self.key_shape[2])
        row_bytes = self.key_shape[3] * self.dtype.itemsize
        return place(self.mask, shape, self.device, row_bytes, self.lists, self._visits(tau))

    def density(self, tau: float | None = None) -> float:
        """Pairs that ``implementation="flex"`` computes over pairs that the mask leaves visible; tiles count whole.

        Implementations that stop while they walk decide by what they meet, and compute about as much.
        """
        batch, heads, n_queries, _ = self.query_shape
        computed = self.layout(tau).computed().view(batch, heads, -1)
        area = self.mask.area(batch, n_queries, self.key_shape[2])
        return pairs_by_head(computed, n_queries).mean(-1).sum().item() / max(area.sum().item(), 1.0)

    def check(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> None:
        """Raise InputError unless the plan fits a call.

        A key mask is compared value by value, which waits for the device, unless neither has one.
        """
        given = {
            "shape of query": (self.query_shape, tuple(query.shape)),
            "shape of key": (self.key_shape, tuple(key.shape)),
            "shape of value": (self.key_shape[:3], tuple(value.shape[:3])),
            "dtype": (self.dtype, query.dtype),
            "device": (self.device, query.device),
            "mask": (self.mask.text(self.query_shape[2], self.key_shape[2]), mask.text(query.shape[2], key.shape[2])),
        }
        for name, (expected, got) in given.items():
            if expected != got:
                raise InputError(
                    f"plan, {name}",
                    expected=f"{expected}, as when the plan was made",
                    got=got,
                    remedy="Make a new plan for this call with s2o_compile.plan.",
                )
        if self.key_mask is not None and mask.key_mask is not None and not torch.equal(self.key_mask, mask.key_mask):
            raise InputError(
                "plan, key_mask",
                expected="the padding that the plan was made for",
                got="another",
                remedy="Make a new plan for this call with s2o_compile.plan.",
            )

    def _visits(self, tau: float | None) -> Tensor:
        chosen = self.tau if tau is None else tau
        options = OperatorOptions(tau=chosen)
        options.check_heads(self.query_shape[1])
        return blocks_to_visit(self.unvisited, options.tau_on(self.device))

    def __repr__(self) -> str:
        _, heads, n_queries, _ = self.query_shape
        batch, kv_heads, n_keys, _ = self.key_shape
        return (
            f"S2OPlan(batch={batch}, heads={heads}, kv_heads={kv_heads}, queries={n_queries}, keys={n_keys}, "
            f"mask={self.mask.text(n_queries, n_keys)!r}, dtype={self.dtype}, device={str(self.device)!r}, "
            f"segment_len={self.segment_len}, tau={self.tau}, density={self.density():.3f}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )


@torch.no_grad()
def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    causal_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    config: S2OConfig | None = None,
    **fields: object,
) -> S2OPlan:
    """Rank the keys of an attention, to attend over them later: ``s2o_compile.attention(..., plan=plan)``.

    Ranked key indices take 4 bytes for each key, key/value head and segment of queries, all estimates another 6 %.
    Ranking holds about twice that. See `S2OPlan` for what may change between calls.

    Args:
        query: [B, Hq, Nq, D], float16, bfloat16 or float32.
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv]; only keys whose value holds NaN or inf are taken from it. None for none such.
        key_mask: bool [B, Nk] or [1, Nk], True where a key may be attended.
        causal: Key j is visible to query i iff ``j <= i + causal_offset``.
        causal_offset: Tokens; None aligns the last query with the last key.
        scale: Softmax scale; None for ``1 / sqrt(D)``.
        softcap: Bound of the logits, None for none.
        config: How to rank; its ``tau`` is that of the plan's own counts.
        **fields: Fields of `S2OConfig`, instead of ``config``.

    Raises:
        InputError: Shapes, dtypes, devices or numbers that do not fit, or nothing to plan.
        OptionError: A field that does not exist, or beside ``config``.

    Sliding windows and chunked attention need no plan: they are computed exactly, or chunk by chunk.
    """
    if config is None:
        config = S2OConfig.from_dict(fields)
    elif fields:
        raise InputError(
            "config",
            expected="either a configuration or its fields as keywords",
            got=f"both: {', '.join(fields)}",
            remedy="Use dataclasses.replace(config, ...).",
        )
    value = key if value is None else value
    check_kinds(query=query, key=key, value=value, key_mask=key_mask)
    query, key, value = (x.detach() for x in (query, key, value))  # tangents end here
    key_mask = None if key_mask is None else key_mask.clone()
    numbers = check_numbers(causal=causal, causal_offset=causal_offset, scale=scale, softcap=softcap)
    call = AttentionCall.of(query, key, value, key_mask, causal=causal, **numbers._asdict())
    if call.scale <= 0:
        raise InputError(
            "scale",
            expected="a positive number, because keys are ranked by their scores",
            got=call.scale,
            remedy="Negate the query, or attend without a plan.",
        )
    options = config.options
    options.check_heads(query.shape[1])
    wanted = "auto" if options.implementation == "flex" else options.implementation
    implementation = choose_implementation(wanted, query)
    call = call.but(mask=call.mask.for_batch(query.shape[0])).for_kernels()
    mask, call = call.mask, call.over_seen_keys()
    with call.on_device():
        ranked = build_plan(call, options, implementation)
        unvisited = estimate_unvisited(call, ranked, implementation)
        entry = torch.arange(ranked.key_index.shape[3], device=query.device)
        # Rankings leave the rest of a row unwritten, which nobody may see.
        key_index = ranked.key_index.masked_fill_(entry >= ranked.prefix_count[:, None, :, None], -1)
    return S2OPlan(
        key_index=key_index,
        prefix_count=ranked.prefix_count,
        segment_len=ranked.segment_len,
        chunk_len=ranked.chunk_len,
        unvisited=unvisited,
        query_shape=tuple(query.shape),  # pyright: ignore[reportArgumentType]
        key_shape=tuple(key.shape),  # pyright: ignore[reportArgumentType]
        dtype=query.dtype,
        device=query.device,
        causal=mask.causal,
        causal_offset=mask.offset,
        key_mask=mask.key_mask,
        tau=options.fixed_tau,
    )
