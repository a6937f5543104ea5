"""Makes a call of flex_attention sparse that no frontend could prove, and keeps its functions.

A plan chooses the keys that are computed. The call's own score_mod, mask_mod and block mask still decide which keys a
query sees (``impl/flex/user_mods.py``). The functions must run for many scores at once, which is tried here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.validation import DTYPES
from s2o_compile.kernels.dispatch import is_short
from s2o_compile.kernels.impl.flex.forward import LEAST_HEAD_DIM
from s2o_compile.kernels.impl.flex.user_mods import block_len_fits, sparse_flex_attention
from s2o_compile.kernels.ranking.unvisited import BLOCK_LEN
from s2o_compile.kernels.support.torch_compat import FakeTensor
from s2o_compile.passes.frontends.checks import check_derivatives
from s2o_compile.passes.frontends.flex import block_tables
from s2o_compile.passes.frontends.flex import match as flex
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.operand import computed
from s2o_compile.passes.graph.rejected import Refused

logger = logging.getLogger(__name__)

_KERNEL_BLOCK = re.compile("BLOCK_[MN]")
_BACKENDS = ("AUTO", "TRITON")

PAYS_FROM = {"cuda": 32768}
"""By device, the number of keys from which such a call is faster sparse; else the operator's own crossover.

An ALiBi call of 32 heads over 32K tokens takes 19.3 ms on an H100, dense 22.4. Shorter calls were not measured."""


def lower(node: fx.Node, options: Mapping[str, Any], *, dense_heads: Sequence[int], head_tau: Sequence[float]) -> None:
    """Make a call of flex_attention sparse, in place; raises `Refused` if it must stay as it is.

    The options are keyword arguments of the operator. Without ``head_tau``, their tau is that of all query heads.
    """
    call = flex.operands(node)
    quality = quality_of(options, head_tau)
    _check(node, call, options, quality)
    tau, heads = quality.fixed_tau, value_of(call["query"]).shape[1]
    if isinstance(tau, tuple) and len(tau) != heads:
        raise Refused("it has %s query heads, and a tau is given for each of %s", heads, len(tau))
    keywords: dict[str, Any] = {
        "tau": tau,
        "segment_len": options.get("segment_len"),
        "dense_heads": tuple(dense_heads),
        "stride": tuple(value_of(flex.output_of(node)).stride()),
    }
    _try(node, keywords)
    node.target, node.kwargs = sparse_flex_attention, {**node.kwargs, **keywords}


def quality_of(options: Mapping[str, Any], head_tau: Sequence[float]) -> OperatorOptions:
    """Tau and error of a call; arguments as of `lower`."""
    taus = tuple(head_tau) or tuple(options.get("head_tau") or ())
    return OperatorOptions(tau=taus or options.get("tau"), error=options.get("error"))


def _check(node: fx.Node, call: dict[str, Any], options: Mapping[str, Any], quality: OperatorOptions) -> None:
    if options.get("implementation", "auto") not in ("auto", "flex"):
        raise Refused(
            'implementation=%r knows no functions of its own, "auto" and "flex" do', options["implementation"]
        )
    if quality.ceiling and not quality.has_default_ceiling:
        raise Refused("FlexAttention cannot measure the error that error=%g allows: give a tau alone", quality.error)
    if quality.fixed_tau == 0:
        raise Refused("tau=0 leaves nothing out")
    flex.output_of(node)
    query, key, value = (value_of(call[name]) for name in ("query", "key", "value"))
    if not all(isinstance(x, FakeTensor) and x.ndim == 4 for x in (query, key, value)):
        raise Refused("the shapes of query, key and value are not recorded in the graph")
    if any(not isinstance(size, int) for x in (query, key, value) for size in x.shape):
        raise Refused("its lengths are symbolic, and sparse FlexAttention is laid out for constant ones")
    if not isinstance(call["scale"], int | float):
        raise Refused("its scale %s is no constant", call["scale"])
    if query.dtype not in DTYPES:
        raise Refused("its query is %s, expected one of float16, bfloat16, float32", query.dtype)
    check_derivatives(node)
    shortest = options.get("min_seq_len")
    if shortest is None:
        shortest = PAYS_FROM.get(query.device.type, "auto")
    n_queries, n_keys = query.shape[2], key.shape[2]
    if is_short(query, n_queries, n_keys, shortest):
        raise Refused("%s queries and %s keys are short: dense is faster", n_queries, n_keys)
    if query.device.type != "cpu" and min(query.shape[3], value.shape[3]) < LEAST_HEAD_DIM:
        raise Refused("its head dim is below %s", LEAST_HEAD_DIM)
    tables = block_tables.read(call["block_mask"])
    if not all(isinstance(size, int) for size in tables.sizes) or not block_len_fits(*tables.sizes, n_queries, n_keys):
        raise Refused("blocks of its block mask are %s long, expected multiples of 128", tables.sizes)
    for name, chosen in call["kernel_options"].items():
        too_long = _KERNEL_BLOCK.search(name) and BLOCK_LEN % chosen
        if too_long or (name == "BACKEND" and chosen not in _BACKENDS):
            raise Refused("its kernel_options ask for %s=%s, which does not suit blocks of 128", name, chosen)


def _try(node: fx.Node, keywords: dict[str, Any]) -> None:
    """Runs the sparse call on fake tensors, because a user's functions may fail for many scores."""

    def fake(argument: fx.Node) -> object:
        return flex.body(node, argument) or value_of(argument)

    args, kwargs = fx.map_arg(node.args, fake), fx.map_arg(node.kwargs, fake)
    try:
        computed(value_of(flex.operands(node)["query"]), sparse_flex_attention, args, {**kwargs, **keywords})
    except Exception as error:
        logger.debug("%s cannot be made sparse", node, exc_info=True)
        raise Refused("its score_mod or mask_mod cannot be run for many scores (%s)", type(error).__name__) from error
