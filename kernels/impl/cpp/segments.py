"""What every call of ``s2o_attend`` takes: tensors as C++ reads them, and the places of their elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.core import stop_rule
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.support import cpp_library
from s2o_compile.kernels.support.cpp_library import ALL, address, run, with_unit_stride

_Segment = cpp_library.structure(
    "query key value mean_value tau key_mask index from below output lse tail unvisited computed",
    "query_head query_row key_row value_row output_head output_row lse_head lse_row tail_head tail_row "
    "unvisited_head computed_head group rows dim value_dim count chunk_len own_start own_stop sees",
    "scale softcap tail_share",
    "wide resume",
)
"""``struct Segment`` of forward.cpp."""


class Segments:
    """A call as C++ reads it: products of float32, or of bfloat16 where the CPU multiplies it in tiles (AMX).

    Args:
        call: The call.
        query: The queries to attend, [B, Hq, N, D]; those of the call if None.
        output: [B, Hq, N, Dv], where outputs go: in the dtype of the products, or float32.
        lse: float32 [B, Hq, N].
        computed: int32 [B, Hq, tiles].
    """

    def __init__(
        self, call: AttentionCall, query: Tensor | None, output: Tensor, lse: Tensor, computed: Tensor
    ) -> None:
        functions = cpp_library.load()
        assert functions is not None
        dtype = products_dtype(call)
        self._attend: Callable[..., int] = (
            functions.s2o_attend_halves if dtype == torch.bfloat16 else functions.s2o_attend
        )
        query, scale = call.query if query is None else query, call.scale
        if not _is_usual(scale):
            query, scale = query.float() * scale, 1.0
        self._query, self._key, self._value = (with_unit_stride(x.to(dtype)) for x in (query, call.key, call.value))
        mask = call.mask.key_mask
        self._key_mask = None if mask is None else with_unit_stride(mask)
        self._output, self._lse, self._computed = output, lse, computed
        self._alike = {
            "query_head": self._query.stride(1), "query_row": self._query.stride(2), "key_row": self._key.stride(2),
            "value_row": self._value.stride(2), "output_head": output.stride(1), "output_row": output.stride(2),
            "lse_head": lse.stride(1), "lse_row": lse.stride(2), "computed_head": computed.stride(1),
            "dim": query.shape[3], "value_dim": call.value.shape[3], "scale": scale, "sees": ALL,
            "softcap": call.softcap or 0.0, "tail_share": stop_rule.TAIL_SHARE,
            "wide": output.dtype == torch.float32,
        }  # fmt: skip

    def attend(self, b: int, heads: slice, kv: int, rows: slice, tile: int, **others: Any) -> None:  # noqa: ANN401 (numbers)
        """One segment: rows of the heads that share it, on the keys of a head; ``others`` by their names in C++."""
        place = (b, heads.start, rows.start)
        argument = _Segment(
            query=address(self._query, *place), key=address(self._key, b, kv), value=address(self._value, b, kv),
            key_mask=address(self._key_mask, b), output=address(self._output, *place), lse=address(self._lse, *place),
            computed=address(self._computed, b, heads.start, tile), group=heads.stop - heads.start,
            rows=rows.stop - rows.start, **{**self._alike, **others},
        )  # fmt: skip
        run(self._attend, argument)


def products_dtype(call: AttentionCall) -> torch.dtype:
    """The dtype of a call's products."""
    halves = call.query.dtype == torch.bfloat16 and _is_usual(call.scale) and cpp_library.has_halves()
    return torch.bfloat16 if halves else torch.float32


def _is_usual(scale: float) -> bool:
    """Whether C++ takes this scale: a positive one, by which it can also divide."""
    return 1e-18 < scale < 1e18


def writable(output: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself, where C++ can write outputs of this dtype into it, or a copy of it where it can."""
    fits = output.dtype in (dtype, torch.float32) and output.stride(3) == 1
    return output if fits else output.to(dtype).contiguous()
