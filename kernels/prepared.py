"""Sparse calls whose launches are known: from the second call of a kind on, the host only hands pointers over.

The key of a call is everything that its launches depend on: shapes, strides, dtypes, devices, addresses modulo 16,
the mask's terms, scale, softcap and options. A call whose key was not seen before runs as ever. The second writes its
launches down (``impl/triton/listing.py``) and makes them from the list, as every later one does: the same kernels in
the same order on the same numbers, so the same bits. Only launches can be written down. Heads that are marked dense run
before them; a call that needs more than launches otherwise is never prepared, nor is one of very many slices.

From the third call on all launches are made at once (``impl/triton/launch.cpp``), and `again` makes them without a look
at the path that led to them.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.call import AttentionCall, on_device
from s2o_compile.kernels.core.layout import empty_output
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import TILE_LEN, n_tiles
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.observe import observing
from s2o_compile.kernels.planner import Planner
from s2o_compile.kernels.statistics import count, recording
from s2o_compile.kernels.streams import in_turn, numbers_of_other, other_stream

if TYPE_CHECKING:
    from s2o_compile.kernels.impl.triton.listing import Launches

KEPT, SEEN = 128, 1024
"""Lists that are kept, two times each at most, and keys that are remembered: those used last. 0 prepares nothing."""

LAUNCHES = 2**15
"""Launches of all lists that are kept, at most, beside those of the newest: a launch takes 2 KiB of the host."""

_lists: OrderedDict[object, Any] = OrderedDict()
_seen: OrderedDict[object, None] = OrderedDict()
_lock = threading.Lock()


_asked: weakref.WeakKeyDictionary[AttentionCall, object] = weakref.WeakKeyDictionary()
"""Keys of the operator's arguments, by the call that it made of them."""


def again(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, terms: tuple[object, ...],
    options: OperatorOptions, *, return_lse: bool,
) -> tuple[tuple[Tensor, Tensor | None] | None, object]:  # fmt: skip
    """Output and log-sum-exp, None unless asked for, of arguments whose launches are known; and the arguments' key.

    ``terms`` are all other arguments that change the results. Where nothing is known yet, `expect` the call that is
    made of the arguments, by this key. There is none while somebody looks at calls.
    """
    if KEPT < 1 or not _seen or query.dim() != 4 or query.shape[2] < TILE_LEN or recording() or observing():
        return None, None
    batch, heads, n_queries, _ = query.shape
    with on_device(query):
        inputs = _named(query, key, value, key_mask=key_mask, tau=options.tau_on(query.device))
        asked = (*_kinds(inputs), *terms, options, tuned.generation())
        with _lock:
            launches = _used(asked, None)
        replay = None if launches is None else launches.at_once
        if launches is None or replay is None:
            return None, asked
        output = empty_output(query, value.shape[3])
        lse = query.new_empty(batch, heads, n_queries, dtype=torch.float32) if return_lse else None
        # Nobody reads what else the launches write: it lies behind the workspace.
        sizes = [-(-4 * batch * heads * length // 16) * 16 for length in (n_queries, n_tiles(n_queries))]
        workspace = launches.workspace(query.device, sum(sizes))
        base = workspace.data_ptr()
        end = base + launches.size
        results = output.data_ptr(), end if lse is None else lse.data_ptr(), end + sizes[0]
        bases = [*[x.data_ptr() for x in inputs.values()], *results, base]
        replay(bases, query.device.index, *numbers_of_other(query.device, launches.streams))
    count("s2o")
    return (output, lse), asked


def expect(call: AttentionCall, key: object) -> None:
    """Let `again` know a call by the key of its arguments, if launches turn out to be all that it needs.

    That is so once `attend` gets this very object: then nobody has copied a tensor or changed a term on the way, and
    behind the launches nothing is left to do for arguments that `again` is asked for.
    """
    if key is not None:
        _asked[call] = key


def attend(
    call: AttentionCall, options: OperatorOptions, tau: float | Tensor, into: Result, run: Callable[..., None]
) -> bool:
    """Attention of a call by launches that are known, unless it must be planned anew; returns whether it ran.

    ``run`` is the function that makes or writes down the launches, `schedule._attend`.
    """
    if call.kept is not None or call.lengths is not None or KEPT < 1:
        return False
    tensors = _inputs(call, tau) | into._asdict()
    key = _key(call, options, tensors)
    with _lock:
        launches = _used(key, missing := object())
        if launches is missing and not _remembered(key):
            return False
    if launches is missing:
        launches = _written(call, options, tensors, run)
        with _lock:
            _keep(key, launches)
    if launches is None:
        return False
    _make(launches, list(tensors.values()))
    if launches.replay is not None and call in _asked:
        with _lock:
            _keep(_asked[call], launches)
    return True


def _used(key: object, default: object) -> Any:  # noqa: ANN401 (Launches, None or the default)
    """What is kept under a key, from now on as what was used last."""
    launches = _lists.pop(key, default)
    if launches is not default:
        _lists[key] = launches
    return launches


def _keep(key: object, launches: Launches | None) -> None:
    _lists[key] = launches
    while len(_lists) > KEPT or (len(_lists) > 1 and _launches_kept() > LAUNCHES):
        _lists.popitem(last=False)


def _launches_kept() -> int:
    """Launches of all lists, each of which may be kept under two keys."""
    return sum({id(x): x.count for x in _lists.values() if x is not None}.values())


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


def _inputs(call: AttentionCall, tau: float | Tensor) -> dict[str, Tensor]:
    """Every tensor that the launches of a call may read, by name."""
    table = None if call.pages is None else call.pages.table
    return _named(
        *call.tensors, key_mask=call.mask.key_mask, tau=tau, sinks=call.sinks, unread_rows=call.unread_rows, pages=table
    )


def _named(query: Tensor, key: Tensor, value: Tensor, **optional: object) -> dict[str, Tensor]:
    tensors = {"query": query, "key": key, "value": value}
    return tensors | {name: x for name, x in optional.items() if isinstance(x, Tensor)}


def _kinds(tensors: dict[str, Tensor]) -> list[object]:
    """What kernels are compiled for, and where: a tensor that lies elsewhere than the query is an error."""
    return [(name, x.device, x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for name, x in tensors.items()]


def _key(call: AttentionCall, options: OperatorOptions, tensors: dict[str, Tensor]) -> object:
    mask, pages = call.mask, call.pages
    return (
        *_kinds(tensors), mask.causal, mask.offset, mask.window, mask.attention_chunk, call.scale, call.softcap,
        *call.dense_heads,
        None if pages is None else (pages.length, pages.page_len, pages.page_rows, pages.last), options,
        tuned.generation(),
    )  # fmt: skip


def _written(
    call: AttentionCall, options: OperatorOptions, tensors: dict[str, Tensor], run: Callable[..., None]
) -> Launches | None:
    """The launches of a call, written down by its functions on stand-ins; None if launches are not all they do."""
    from s2o_compile.kernels.impl.triton.listing import Listing, UnlistableError  # triton may be missing

    listing = Listing(list(tensors.values()), len(tensors) - len(Result._fields))
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
        return listing.finish()
    except UnlistableError:
        return None
    finally:
        in_turn.reset(turns)


def _make(launches: Launches, tensors: list[Tensor]) -> None:
    """Make launches on these tensors, slices in turn on two streams."""
    device, replay = tensors[0].device, launches.at_once
    workspace = launches.workspace(device)
    if replay is not None:
        bases = [x.data_ptr() for x in (*tensors, workspace)]
        replay(bases, device.index, *numbers_of_other(device, launches.streams))
        return
    launches.make(launches.common, tensors, workspace, None)
    if launches.slices:
        with other_stream(device, launches.turns) as other:
            launches.make(launches.slices, tensors, workspace, other)
