"""Pieces that the Triton kernels share: row loads, the softmax update, and launch configurations."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.mask import AttentionMask, upper_bound
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.impl.triton.listing import listing
from s2o_compile.kernels.pages.table import Pages

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING_SEEN = tl.constexpr(-3.4e38)
"""Maximum of no logits. Not -inf: the difference to it stays a number, so no step needs a guard."""

WIDEST_VALUE = 256


@triton.jit
def number(size):
    """A size of a call: a number of the host, or where it lies on the device (``pages/sizes.py``)."""
    if isinstance(size, tl.tensor):  # noqa: SIM102 (a 1 of the host is a constant, and has no dtype)
        if size.dtype.is_ptr():
            size = tl.load(size)
    return size


@triton.jit
def first_row(size):
    """The row of the first query or key: behind their number where that lies on the device, else 0."""
    first = 0
    if isinstance(size, tl.tensor):  # noqa: SIM102 (as above)
        if size.dtype.is_ptr():
            first = tl.load(size + 1).to(tl.int64)
    return first


@triton.jit
def key_rows(keys, pages, page_rows, last_page, PAGE: tl.constexpr):
    """The rows of keys: themselves, or their slots in pages of PAGE tokens (``pages/table.py``)."""
    if PAGE:
        page = tl.minimum(tl.maximum(tl.load(pages + keys // PAGE), 0), last_page)
        keys = page * page_rows + keys % PAGE
    return keys


@triton.jit
def load_rows(base, rows, stride, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a [N, HEAD_DIM] matrix by index, [rows, BLOCK_DIM], zero beyond HEAD_DIM.

    WIDE takes 64-bit offsets, for matrices of 2^31 elements and more; they cost registers, so it is not the default.
    """
    dims = tl.arange(0, BLOCK_DIM)
    if WIDE:
        rows = rows.to(tl.int64)
    pointers = base + rows[:, None] * stride + dims[None, :]
    if HEAD_DIM == BLOCK_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def seg_bounds(segment, n_queries, n_keys, seg_offset, SEGMENT: tl.constexpr):
    """In-segment keys [start, stop) of a segment."""
    seg_start = tl.minimum(tl.maximum(segment * SEGMENT + seg_offset, 0), n_keys)
    seg_stop = tl.minimum(tl.maximum(tl.minimum(segment * SEGMENT + SEGMENT, n_queries) + seg_offset, 0), n_keys)
    return seg_start, tl.maximum(seg_start, seg_stop)


@triton.jit
def cap_products(products, inner, SOFTCAP: tl.constexpr):
    """Products q . k as they are, or tanh(products * inner), which ``softmax_update`` scales by the softcap instead.

    The tanh is made of a sigmoid because the interpreter has no tanh. Its error is about 1e-7 of the softcap, so that
    small ones of a large softcap (SOFTCAP is 2) are those of the series, whose next term is below 1e-8.
    """
    if SOFTCAP:
        capped = 2.0 * tl.sigmoid(2.0 * inner * products) - 1.0
        if SOFTCAP == 2:
            x = inner * products
            square = x * x
            series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
            capped = tl.where(square < 0.0625, x * series, capped)
        products = capped
    return products


@triton.jit
def softmax_update(m, l, acc, products, value, qk_scale, FIXED: tl.constexpr, PRECISION: tl.constexpr):
    """Fold products q . k [M, C] (hidden = -inf) and value [C, Dv] into m, l [M] and acc [M, Dv].

    Logits are products * qk_scale in base 2, qk_scale > 0. Scaling after the maximum leaves one fused multiply-add an
    element, where scaling first costs a multiplication more.

    FIXED keeps m as it is: softmax is the same for any reference, and float32's exponents hold weights 2^127 above it.
    It saves the row maxima and the rescaling of acc, and lets the product with V run on behind the next block's
    product with K. Weights that do overflow (or a row that had seen nothing, m = NOTHING_SEEN) leave inf or NaN in l or
    acc: the caller asks ``overflowed`` and starts again with the running maximum.
    """
    if FIXED:
        weight = tl.math.exp2(products * qk_scale - m[:, None])
        l += tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
        return m, l, acc
    m_new = tl.maximum(m, tl.max(products, 1) * qk_scale)
    weight = tl.math.exp2(products * qk_scale - m_new[:, None])
    decay = tl.math.exp2(m - m_new)
    l = l * decay + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
    return m_new, l, acc


@triton.jit
def overflowed(l, acc):
    """Whether a FIXED reference left inf or NaN anywhere in l [M] or acc [M, Dv]."""
    finite = (l < float("inf"))[:, None] & (tl.abs(acc) < float("inf"))
    return tl.sum(tl.where(finite, 0, 1)) > 0


@triton.jit
def store_tile(out, lse, m, l, acc, rows, present, stride, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr):
    """Write acc / l (zeros where l is 0) to rows of out and the natural log-sum-exp to lse."""
    dims = tl.arange(0, BLOCK_VALUE)
    result = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    pointers = out + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=present[:, None] & (dims[None, :] < VALUE_DIM))
    tl.store(lse + rows, (m + tl.math.log2(l)) * LN2, mask=present)


def logit_scales(scale: float, softcap: float | None) -> dict[str, float]:
    """Arguments of a kernel: the factor of ``softmax_update``, in base 2, and what ``cap_products`` takes before it."""
    if softcap is None:
        return {"qk_scale": scale * LOG2E.value, "inner": 0.0, "SOFTCAP": 0}
    softcap = min(softcap, 1e18)  # its inverse stays a normal number; it caps nothing
    return {"qk_scale": softcap * LOG2E.value, "inner": scale / softcap, "SOFTCAP": 1 + (softcap > 256)}


def key_mask_of(key_mask: torch.Tensor | None, unused: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A key mask [B, Nk] and its stride as kernels take them; without one any tensor, which no kernel reads."""
    return (unused, 0) if key_mask is None else (key_mask, key_mask.stride(0))


def paging(pages: Pages | None, unused: torch.Tensor) -> dict[str, object]:
    """The arguments of kernels that look for keys by ``key_rows``; without pages any tensor, which no kernel reads."""
    if pages is None:
        return {"pages": unused, "page_rows": 0, "last_page": 0, "PAGE": 0}
    return {"pages": pages.table, "page_rows": pages.page_rows, "last_page": pages.last, "PAGE": pages.page_len}


def value_parts(value: torch.Tensor, into: Result) -> Iterator[tuple[torch.Tensor, Result]]:
    """Value and results in parts of at most WIDEST_VALUE columns; a tile's accumulator [M, Dv] must stay in registers.

    Visits do not depend on the value, so every part repeats them alike.
    """
    if value.shape[3] <= WIDEST_VALUE:
        yield value, into
        return
    for columns, output in zip(value.split(WIDEST_VALUE, 3), into.output.split(WIDEST_VALUE, 3), strict=True):
        yield columns, into._replace(output=output)


def can_fix(dtype: torch.dtype, mask: AttentionMask) -> bool:
    """Whether a FIXED reference is worth a try. Float16 weights overflow 2^16 above it; padded rows may have none."""
    return dtype != torch.float16 and (mask.causal or mask.key_mask is None)


def needs_wide(*tensors: torch.Tensor) -> bool:
    """Whether some row of a [B, H, N, D] tensor lies 2^31 elements or more behind its head's first, or may do so."""
    return any(upper_bound(x.shape[2] * x.stride(2)) >= 2**31 for x in tensors)


tracing = ContextVar("tracing", default=False)
"""Whether launches are recorded into a program (``impl.aot.cuda_forward``)."""


class Launched(NamedTuple):
    """A launch that was made and can be repeated: the host then spares to look at each argument again."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[object, ...]
    keywords: dict[str, object]
    compiled: Any

    def again(self, **changes: float) -> None:
        """Launch it on the same tensors, on the present stream; floats among the keywords may change."""
        keywords = self.keywords | changes
        if self.compiled is None:  # interpreted, or written down
            launch(self.kernel, self.grid, *self.args, **keywords)
            return
        others = (keywords[name] for name in self.kernel.arg_names[len(self.args) :])
        self.compiled[(*self.grid, 1, 1)[:3]](*self.args, *others)


def launch(kernel, grid, *args, **keywords) -> Launched:
    """Launch a kernel, or write the launch down where a list is made (``listing.py``) or a program is traced."""
    held = listing.get()
    if held is not None:
        held.add(kernel, grid, args, keywords)
        return Launched(kernel, grid, args, keywords, None)
    if not tracing.get():
        return Launched(kernel, grid, args, keywords, kernel[grid](*args, **keywords))
    # Torch's launches take maxnreg from a configuration only. A single one leaves nothing to tune.
    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in keywords}
    torch.library.wrap_triton(triton.autotune([triton.Config({}, **options)], key=[])(kernel))[grid](*args, **keywords)
    return Launched(kernel, grid, args, keywords, None)


def launch_config(head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """Head dims and block sizes as the device's table has them (``tuned.py``), by the larger head dim and the dtype."""
    block_dim, block_value = (max(16, triton.next_power_of_2(dim)) for dim in (head_dim, value_dim))
    chosen = tuned.launch(device, max(block_dim, block_value), dtype)
    dims = {"HEAD_DIM": head_dim, "BLOCK_DIM": block_dim, "VALUE_DIM": value_dim, "BLOCK_VALUE": block_value}
    steps = {"KEY_BLOCK": chosen.key_block, "STAGES": chosen.stages, "num_warps": chosen.num_warps}
    registers = {} if chosen.maxnreg is None else {"maxnreg": chosen.maxnreg}
    return dims | steps | registers | {"PRECISION": "ieee" if dtype == torch.float32 else "tf32"}
