"""Sparse calls whose launches are known: from the second call of a kind on, the host only hands pointers over.

The key of a call is everything that its launches depend on: shapes, strides, dtypes, the device, addresses modulo 16,
the mask's terms, scale, softcap and options. A call whose key was not seen before runs as ever. The second writes its
launches down (``impl/triton/listing.py``) and makes them from the list, as every later one does: the same kernels in
the same order on the same numbers, so the same bits. Only launches can be written down. Heads that are marked dense run
before them; a call that needs more than launches otherwise is never prepared, nor is one of many slices.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.planner import Planner
from s2o_compile.kernels.streams import in_turn, other_stream

if TYPE_CHECKING:
    from s2o_compile.kernels.impl.triton.listing import Launches

KEPT, SEEN = 64, 1024
"""Lists that are kept, and keys that are remembered, at most: those used last. 0 lists prepare nothing."""

_lists: OrderedDict[object, Any] = OrderedDict()
_seen: OrderedDict[object, None] = OrderedDict()
_lock = threading.Lock()


def attend(
    call: AttentionCall, options: OperatorOptions, tau: float | Tensor, into: Result, run: Callable[..., None]
) -> bool:
    """Attention of a call by launches that are known, unless it must be planned anew; returns whether it ran.

    ``run`` is the function that makes or writes down the launches, `schedule._attend`.
    """
    if call.kept is not None or call.lengths is not None or KEPT < 1:
        return False
    tensors = _tensors(call, tau, into)
    key = _key(call, options, tensors)
    with _lock:
        launches = _lists.pop(key, missing := object())  # and put back as the newest
        if launches is not missing:
            _lists[key] = launches
        elif not _remembered(key):
            return False
    if launches is missing:
        launches = _written(call, options, tensors, run)
        with _lock:
            _lists[key] = launches
            if len(_lists) > KEPT:
                _lists.popitem(last=False)
    if launches is None:
        return False
    _make(launches, list(tensors.values()))
    return True


def _remembered(key: object) -> bool:
    """Whether a key was seen before; it is remembered from now on."""
    if key in _seen:
        return True
    _seen[key] = None
    if len(_seen) > SEEN:
        _seen.popitem(last=False)
    return False


def newest() -> Launches | None:
    """The launches that were made last from a list."""
    with _lock:
        return next(reversed(_lists.values()), None)


def forget() -> None:
    """Prepare every call anew."""
    with _lock:
        _lists.clear()
        _seen.clear()


def _tensors(call: AttentionCall, tau: float | Tensor, into: Result) -> dict[str, Tensor]:
    """Every tensor that launches may read or write, by name."""
    found = {"query": call.query, "key": call.key, "value": call.value, **into._asdict()}
    optional = {
        "key_mask": call.mask.key_mask, "sinks": call.sinks, "unread_rows": call.unread_rows,
        "pages": None if call.pages is None else call.pages.table, "tau": tau if isinstance(tau, Tensor) else None,
    }  # fmt: skip
    return found | {name: x for name, x in optional.items() if x is not None}


def _key(call: AttentionCall, options: OperatorOptions, tensors: dict[str, Tensor]) -> object:
    mask, pages = call.mask, call.pages
    return (
        call.query.device, *[(name, x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for name, x in tensors.items()],
        mask.causal, mask.offset, mask.window, mask.attention_chunk, call.scale, call.softcap, *call.dense_heads,
        None if pages is None else (pages.length, pages.page_len, pages.page_rows, pages.last), options,
        tuned.generation(),
    )  # fmt: skip


def _written(
    call: AttentionCall, options: OperatorOptions, tensors: dict[str, Tensor], run: Callable[..., None]
) -> Launches | None:
    """The launches of a call, written down by its functions on stand-ins; None if launches are not all they do."""
    from s2o_compile.kernels.impl.triton.listing import Listing, UnlistableError  # triton may be missing

    listing = Listing(list(tensors.values()))
    given = dict(zip(tensors, listing.tensors, strict=True))
    mask = replace(call.mask, key_mask=given.get("key_mask"))
    stand_in = call.over(given["query"], given["key"], given["value"], mask)
    pages = None if call.pages is None else replace(call.pages, table=given["pages"])
    stand_in = stand_in.but(sinks=given.get("sinks"), unread_rows=given.get("unread_rows"), pages=pages)
    tau = given.get("tau", options.tau_on(call.query.device))
    into = Result(given["output"], given["lse"], given["computed"])
    turns = in_turn.set(listing.turn)
    try:
        with listing.writing():
            run(stand_in, options, "triton", tau, into, Planner(stand_in, options, "triton"))
    except UnlistableError:
        return None
    finally:
        in_turn.reset(turns)
    return listing.finish()


def _make(launches: Launches, tensors: list[Tensor]) -> None:
    """Make launches on these tensors, slices in turn on two streams."""
    workspace = launches.workspace(tensors)
    launches.make(launches.common, tensors, workspace, None)
    with other_stream(workspace.device, launches.turns) as other:
        launches.make(launches.slices, tensors, workspace, other)
