"""``ranking.per_query`` on the GPU: every query against every earlier key in few dimensions, nothing of size N^2 kept.

    score[s, j] = log sum over slots t of exp max over rows r = t mod SLOTS of  few_query[s, r] . few_key[j]

Rows are packed to PACKED numbers: the chosen directions, brought to the same size in queries and keys, and two columns
for the row normaliser (its value and its rounding error), -1 in the keys. So the last kernel's product is normalised
already, and one exponential a slot is all it needs. Where the tensor cores multiply 8-bit floats rows are packed in
them: the rate doubles, and a rank needs no more. few_query [B * Hr, P, G * n, PACKED], n of each segment's queries
(``ranking.per_query.scored_positions``), few_key [B, Hkv, Nk, PACKED], score fp16 [B * Hr, P, Nk]. G heads share a
ranking.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import same_length
from s2o_compile.kernels.core.plan import ScoreKeys, n_segments
from s2o_compile.kernels.impl.triton.basis import choose_basis
from s2o_compile.kernels.impl.triton.listing import aside, device_of
from s2o_compile.kernels.impl.triton.tile import (
    LN2,
    LOG2E,
    first_row,
    key_mask_of,
    key_rows,
    launch,
    number,
    paging,
    seg_bounds,
)
from s2o_compile.kernels.pages.sizes import Size
from s2o_compile.kernels.pages.sizes import number as number_of
from s2o_compile.kernels.pages.table import Pages
from s2o_compile.kernels.ranking.basis import Basis, FewKeys
from s2o_compile.kernels.ranking.per_query import FIRST_KEYS, few_dims, key_stride, scored_rows
from s2o_compile.kernels.ranking.slots import SLOTS

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float16: 30000.0}
"""Clamp of packed numbers: the normaliser of an ignored row, the sum of two of them, still fits in a float16 score."""

KEY_BLOCK = 128
"""Keys of one program of the last kernel."""


@triton.jit
def scored_position(slot, member, segment_len, scored, shared):
    """The query of its segment that stands in a slot of a head (``ranking.per_query.scored_positions``)."""
    return slot + (slot * (segment_len - scored) + member * segment_len // shared) // scored


@triton.jit
def pack_rows_kernel(
    x_ptr, factor_ptr, packed_ptr, stride_b, stride_h, stride_n, stride_fb, first, length, heads, group, shared,
    segment_len, scored, segments, last, largest, pages, page_rows, last_page, HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr, DIM_STEP: tl.constexpr, PACKED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """TILE rows [.., D] times their factor [D, PACKED]; ``last`` in the two columns of the normaliser."""
    start, length = first_row(length) * stride_n, number(length)
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    ranking_head = b * (heads // shared) + h // shared
    segment = slot // scored
    row = first + segment * segment_len + scored_position(slot % scored, h % shared, segment_len, scored, shared)
    column, present = tl.arange(0, PACKED), (row < length)[:, None]
    if PAGE:
        row = key_rows(tl.maximum(tl.minimum(row, length - 1), 0), pages, page_rows, last_page, PAGE)
    source = x_ptr + b * stride_b + h * stride_h + start + row.to(tl.int64)[:, None] * stride_n
    factors = factor_ptr + b * stride_fb + h // group * HEAD_DIM * PACKED
    packed = tl.zeros([TILE, PACKED], tl.float32)
    for d in range(0, HEAD_DIM, DIM_STEP):
        dims = d + tl.arange(0, DIM_STEP)
        x = tl.load(source + dims[None, :], mask=present & (dims < HEAD_DIM)[None, :], other=0.0)
        factor = tl.load(factors + dims[:, None] * PACKED + column[None, :], mask=(dims < HEAD_DIM)[:, None], other=0.0)
        packed = tl.dot(x, factor, packed)
    packed = tl.where(packed == packed, packed, 0.0)  # one bad row must not spoil the whole order
    packed = tl.minimum(tl.maximum(packed, -largest), largest)
    packed = tl.where((column >= PACKED - 2)[None, :], last, packed)
    target = (ranking_head * segments + segment) * shared * scored + (h % shared) * scored + slot % scored
    tl.store(
        packed_ptr + target[:, None] * PACKED + column[None, :], packed.to(packed_ptr.dtype.element_ty),
        mask=(segment < segments)[:, None],
    )  # fmt: skip


@triton.jit
def add_keys(
    m, l, query, few_key, key_mask, keys, present, weight, last_seen,
    MASKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Fold present keys [C] into maximum m and sum l of the rows [TILE]; MASKED hides those behind ``last_seen``."""
    dims = tl.arange(0, PACKED)
    if HAS_KEY_MASK:
        present = present & (tl.load(key_mask + keys, mask=present, other=0) != 0)
    pointers = few_key + keys.to(tl.int64)[None, :] * PACKED + dims[:, None]
    logits = tl.dot(query, tl.load(pointers, mask=present[None, :], other=0.0))
    logits += tl.where(present, 0.0, -float("inf"))[None, :]
    if MASKED:
        logits = tl.where(keys[None, :] <= last_seen[:, None], logits, -float("inf"))
    m_new = tl.maximum(m, tl.max(logits, 1))
    reference = tl.where(m_new == -float("inf"), 0.0, m_new) * LOG2E
    weights = tl.math.exp2(logits * LOG2E - reference[:, None])
    return m_new, l * tl.math.exp2(m * LOG2E - reference) + tl.sum(weights, 1) * weight


@triton.jit
def row_normaliser_kernel(
    few_query_ptr, few_key_ptr, key_mask_ptr, stride_key, stride_mb, n_queries, n_keys, n_segments, rows, heads,
    rankings, offset, seg_offset, stride, largest,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, SEGMENT: tl.constexpr, SCORED: tl.constexpr, FIRST: tl.constexpr,
    TILE: tl.constexpr, KEY_BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of TILE rows over in-segment keys, the FIRST keys and a sample, to the rows' last two columns."""
    n_queries, n_keys, offset, seg_offset = number(n_queries), number(n_keys), number(offset), number(seg_offset)
    stride = number(stride)
    segment = tl.program_id(1)
    if segment * SEGMENT >= n_queries:
        return
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = segment * SEGMENT + scored_position(row % SCORED, row // SCORED, SEGMENT, SCORED, rows // SCORED)
    dims = tl.arange(0, PACKED)
    query_ptr = few_query_ptr + ((head * n_segments + segment) * rows + row)[:, None] * PACKED
    query = tl.load(query_ptr + dims[None, :])
    few_key = few_key_ptr + head // rankings * stride_key
    key_mask = key_mask_ptr + head // heads * stride_mb
    seg_start, seg_stop = seg_bounds(segment, n_queries, n_keys, seg_offset, SEGMENT)
    free_stop, end = seg_stop, n_keys  # all rows of the tile see what lies before free_stop
    if CAUSAL:
        seg_stop = tl.maximum(tl.minimum(seg_stop, tl.max(position, 0) + 1 + offset), seg_start)
        free_stop = tl.minimum(tl.maximum(tl.min(position, 0) + 1 + offset, seg_start), seg_stop)
        free_stop = seg_start + (free_stop - seg_start) // KEY_BLOCK * KEY_BLOCK
        end = seg_start
    m = tl.full([TILE], -float("inf"), tl.float32)
    l = tl.zeros([TILE], tl.float32)
    columns = tl.arange(0, KEY_BLOCK)
    for j in range(seg_start, free_stop, KEY_BLOCK):
        keys = j + columns
        m, l = add_keys(
            m, l, query, few_key, key_mask, keys, keys < free_stop, 1.0, position, False, HAS_KEY_MASK, PACKED
        )
    if CAUSAL:
        for j in range(free_stop, seg_stop, KEY_BLOCK):
            keys = j + columns
            m, l = add_keys(
                m, l, query, few_key, key_mask, keys, keys < seg_stop, 1.0, position + offset, True, HAS_KEY_MASK,
                PACKED,
            )  # fmt: skip
    # The first keys of the prefix count once, because trained models put much weight there. The others are sampled.
    for j in range(0, end, KEY_BLOCK * stride):
        keys = j + columns * stride + stride // 2
        present = (keys >= FIRST) & (keys < end)
        if not CAUSAL:
            present = present & ((keys < seg_start) | (keys >= seg_stop))
        m, l = add_keys(m, l, query, few_key, key_mask, keys, present, stride, position, False, HAS_KEY_MASK, PACKED)
    keys = tl.arange(0, 16)
    present = (keys < FIRST) & (keys < end)
    if not CAUSAL:
        present = present & ((keys < seg_start) | (keys >= seg_stop))
    m, l = add_keys(m, l, query, few_key, key_mask, keys, present, 1.0, position, False, HAS_KEY_MASK, PACKED)
    # A row that sees none of these keys, or lies beyond the last query, is ignored.
    normaliser = m + tl.math.log2(l) * LN2
    ignored = (l == 0.0) | (position >= n_queries)
    packed = few_query_ptr.dtype.element_ty
    whole = tl.where(ignored, largest, tl.minimum(tl.maximum(normaliser, -largest), largest)).to(packed)
    rest = tl.where(ignored, largest, tl.minimum(tl.maximum(normaliser - whole.to(tl.float32), -largest), largest))
    tl.store(query_ptr + (PACKED - 2), whole[:, None])
    tl.store(query_ptr + (PACKED - 1), rest.to(packed)[:, None])


@triton.jit
def largest_of_three(a, b, c, PTX: tl.constexpr):
    """Elementwise maximum of fp16 numbers, in PTX where the compiler seldom finds the instruction for two at once."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; max.f16x2 t, $1, $2; max.f16x2 $0, t, $3; }", "=r,r,r,r", [a, b, c], dtype=tl.float16,
            is_pure=True, pack=2,
        )  # fmt: skip
    return tl.maximum(tl.maximum(a, b), c)


@triton.jit
def score_keys_kernel(
    few_query_ptr, few_key_ptr, score_ptr, stride_key, n_queries, n_keys, n_segments, rows, rankings, seg_offset,
    CAUSAL: tl.constexpr, SEGMENT: tl.constexpr, KEY_BLOCK: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Scores of KEY_BLOCK keys for every segment that has them in its prefix: one program keeps its keys on chip."""
    n_queries, n_keys, seg_offset = number(n_queries), number(n_keys), number(seg_offset)
    if tl.program_id(0) * KEY_BLOCK >= n_keys:
        return
    head = tl.program_id(1).to(tl.int64)
    keys = tl.program_id(0) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    inside = keys < n_keys
    dims = tl.arange(0, PACKED)
    key = tl.load(
        few_key_ptr + head // rankings * stride_key + keys.to(tl.int64)[:, None] * PACKED + dims[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    first = 0
    if CAUSAL:  # the first segment whose in-segment keys start behind the first key of this block
        first = tl.maximum(tl.program_id(0) * KEY_BLOCK - seg_offset, 0) // SEGMENT
    for segment in range(first, tl.minimum(n_segments, tl.cdiv(n_queries, SEGMENT))):
        base = few_query_ptr + (head * n_segments + segment) * rows * PACKED
        best = tl.full([KEY_BLOCK, SLOTS], -60000.0, tl.float16)  # a key's numbers lie side by side in few threads
        for row in tl.range(0, rows, 2 * SLOTS, num_stages=STAGES):
            query = base + (row + tl.arange(0, SLOTS))[None, :] * PACKED + dims[:, None]
            one = tl.dot(key, tl.load(query), out_dtype=tl.float16)
            other = tl.dot(key, tl.load(query + SLOTS * PACKED), out_dtype=tl.float16)
            best = largest_of_three(one, other, best, PTX)
        most = tl.max(best, 1)
        total = tl.sum(tl.math.exp2((best - most[:, None]).to(tl.float32) * LOG2E), 1)
        score = most + tl.math.log2(total) * LN2
        tl.store(score_ptr + (head * n_segments + segment) * n_keys + keys, score.to(tl.float16), mask=inside)


def packed_dtype(device: torch.device) -> torch.dtype:
    """8-bit floats where the tensor cores multiply them (compute capability 8.9 and later), else float16."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return torch.float8_e4m3fn if fast else torch.float16


def takes_ptx(device: torch.device) -> bool:
    """Whether ``max.f16x2`` exists: on NVIDIA's devices from compute capability 8.0 on."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def packed_width(head_dim: int) -> int:
    """Numbers of a packed row, a power of two from 32 to 128: ``few_dims`` and the normaliser, or more where that pays.

    In heads of 64 dimensions 62 instead of 30 save 10 to 20 % of the density (SmolLM2, 16K and 64K, by coordinates). In
    heads of 256, 126 instead of 62 save 4 to 14 % at 5 % of error (the global layers of Gemma-3, 8K). Heads of 128 were
    judged by made-up inputs alone, where 62 instead of 30 saved 1 %.
    """
    wanted = head_dim if head_dim <= 64 else few_dims(head_dim) + 1
    if head_dim > 128:
        wanted = min(head_dim // 2, 128)
    return max(32, triton.next_power_of_2(wanted))


def pack_rows(
    x: Tensor, factor: Tensor, *, shared: int, segment_len: int, scored: int, dtype: torch.dtype,
    size: Size | None = None,
) -> Tensor:  # fmt: skip
    """Queries [B, H, N, D] -> [B * H / shared, P, shared * scored, PACKED], rows (head, slot); zeros beyond N.

    Args:
        x: Queries.
        factor: Of the basis, [B, Hkv, D, PACKED], contiguous but for a slice of heads.
        shared: Neighbouring heads whose rows stand together.
        segment_len: Rows of one segment.
        scored: How many of them are packed (``ranking.per_query.scored_positions``).
        dtype: Of the packed rows, a key of LARGEST.
        size: Queries on the device, if N is a bound (``pages/sizes.py``).
    """
    batch, heads, length, _ = x.shape
    segments = 1 if same_length(length, segment_len) else n_segments(length, segment_len)
    packed = torch.empty(
        batch * heads // shared, segments, shared * scored, factor.shape[3], device=x.device, dtype=dtype
    )
    _launch_packing(
        x, factor, packed, first=0, length=length if size is None else size, group=heads // factor.shape[1],
        shared=shared,
        segment_len=segment_len, scored=scored, segments=segments, last=0.0, pages=None,
    )  # fmt: skip
    return packed


def pack_keys(call: AttentionCall, factor: Tensor, first: int = 0) -> Tensor:
    """Keys from ``first`` on as `pack_rows` packs them, [B, Hkv, n, PACKED], -1 in the columns of the normaliser."""
    key, dtype = call.key, packed_dtype(device_of(call.key))
    count = call.n_keys - first
    packed = torch.empty(*key.shape[:2], count, factor.shape[3], device=key.device, dtype=dtype)
    _launch_packing(
        key, factor, packed, first=first, length=call.sizes.n_keys, group=1, shared=1, segment_len=count, scored=count,
        segments=1, last=-1.0, pages=call.pages,
    )  # fmt: skip
    return packed


def _launch_packing(
    x: Tensor, factor: Tensor, packed: Tensor, *, first: int, length: Size, group: int, shared: int, segment_len: int,
    scored: int, segments: int, last: float, pages: Pages | None,
) -> None:  # fmt: skip
    """`pack_rows_kernel` over rows [first, length) of x; ``last`` goes to the two columns of the normaliser."""
    (batch, heads, _, head_dim), width = x.shape, factor.shape[3]
    launch(
        pack_rows_kernel, (triton.cdiv(segments * scored, 128), batch * heads),
        x, factor, packed, *x.stride()[:3], factor.stride(0), first, length, heads, group, shared, segment_len, scored,
        segments, last, LARGEST[packed.dtype], **paging(pages, x), HEAD_DIM=head_dim, TILE=128,
        DIM_STEP=max(16, min(triton.next_power_of_2(head_dim), 64)), PACKED=width, num_warps=8 if width > 32 else 4,
    )  # fmt: skip


def basis_of_samples(samples: AttentionCall) -> Basis:
    """The basis of a call whose every few queries and keys these are (``ranking.basis.dim_stride``)."""
    return _choose_basis(samples, of_samples=True)


def few_keys_of(call: AttentionCall, basis: Basis) -> Tensor:
    """The keys of a call as its ranking compares them."""
    return pack_keys(call, basis.key)


def _choose_basis(call: AttentionCall, *, of_samples: bool = False) -> Basis:
    head_dim = call.query.shape[3]
    width = packed_width(head_dim)
    with aside():  # a program a head, each of which does one thing after the other
        return choose_basis(call, min(width - 2, head_dim), width, of_samples=of_samples)


def prepare(call: AttentionCall, segment_len: int, shared: int, made: FewKeys | None = None) -> ScoreKeys:
    """The function that scores slices of a call; arguments as of ``ranking.per_query.prepare``."""
    kept, packed = call.kept, None if made is None else made.keys

    def chosen() -> Basis:
        return made.basis if made is not None else _choose_basis(call)

    basis = chosen() if kept is None else kept.once("basis", chosen)
    if kept is not None:
        first = kept.known("few keys", call.earlier_keys)
        packed = kept.extend("few keys", call.n_keys, first, pack_keys(call, basis.key, first))
    stride = key_stride(number_of(call.sizes.n_keys))

    def score_keys(part: AttentionCall, heads: slice) -> Tensor:
        few_key = pack_keys(part, basis.key[:, heads]) if packed is None else packed[:, heads]
        few_key = few_key if len(few_key) == 1 else few_key.contiguous()  # kernels count heads of all entries through
        return _score_keys(part, basis.query[:, heads], few_key, stride, segment_len, shared)

    return score_keys


def _score_keys(
    call: AttentionCall, factor: Tensor, few_key: Tensor, stride: Size, segment_len: int, shared: int
) -> Tensor:
    """Importance of every key for every segment, fp16 [B, Hr, P, Nk]; undefined for keys outside the prefix.

    ``factor`` is the basis of the queries, ``few_key`` of `pack_keys`, for the call's keys at least.
    """
    query, mask, n_keys, sizes = call.query, call.mask, call.n_keys, call.sizes
    batch, kv_heads = few_key.shape[:2]
    ranking_heads, dtype = query.shape[1] // shared, few_key.dtype
    rankings = ranking_heads // kv_heads
    scored = scored_rows(query, segment_len, shared, device_of(query))
    few_query = pack_rows(
        query, factor, shared=shared, segment_len=segment_len, scored=scored, dtype=dtype, size=sizes.n_queries
    )
    segments, rows, width = few_query.shape[1:]
    score = torch.empty(batch, ranking_heads, segments, n_keys, device=query.device, dtype=torch.float16)
    key_mask, stride_mb = key_mask_of(mask.key_mask, few_key)
    launch(
        row_normaliser_kernel, (rows // 128, segments, batch * ranking_heads),
        few_query, few_key, key_mask, few_key.stride(1), stride_mb, *sizes[:2], segments, rows, ranking_heads,
        rankings, sizes.offset, sizes.seg_offset, stride, LARGEST[dtype],
        CAUSAL=mask.causal, HAS_KEY_MASK=mask.key_mask is not None, SEGMENT=segment_len, SCORED=scored,
        FIRST=FIRST_KEYS, TILE=128, KEY_BLOCK=64, PACKED=width, num_warps=4,
    )  # fmt: skip
    launch(
        score_keys_kernel, (triton.cdiv(n_keys, KEY_BLOCK), batch * ranking_heads),
        few_query, few_key, score, few_key.stride(1), *sizes[:2], segments, rows, rankings,
        sizes.seg_offset, CAUSAL=mask.causal, SEGMENT=segment_len, KEY_BLOCK=KEY_BLOCK, SLOTS=SLOTS,
        STAGES=3, PACKED=width, PTX=takes_ptx(device_of(query)), num_warps=4,
    )  # fmt: skip
    return score
