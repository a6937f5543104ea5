"""``context_parallel``: a model whose calls are shared out over ranks by positions, with the arguments as before."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from s2o_compile.backend import PREFIX, Backend
from s2o_compile.capture.compiled_copy import Model, account_of, compiled_copy
from s2o_compile.capture.generation_masks import name_of_cache
from s2o_compile.capture.rebound import rebound
from s2o_compile.config import S2OConfig, config_or_default, refuse_keywords
from s2o_compile.distributed.inputs import Call, of_shard, read_call
from s2o_compile.distributed.outputs import Kept, fill_cache, gather_outputs
from s2o_compile.distributed.sequences import checksum, shard_sequence
from s2o_compile.kernels.core.shards import held_sequence
from s2o_compile.kernels.core.tuned import shortest_sparse
from s2o_compile.kernels.sequence.ranks import Ranks
from s2o_compile.kernels.sequence.sharded import ShardedSequence, check_method
from s2o_compile.kernels.support.arguments import shown
from s2o_compile.kernels.support.errors import InputError
from s2o_compile.kernels.support.torch_compat import dtype_of
from s2o_compile.kernels.support.torch_compile import uncompiled
from s2o_compile.recording import Account

_PARALLEL = "_s2o_parallel"
CACHES = ("cache", "past_key_values")
"""Names of the cache among the arguments of transformers' models."""

MIXING = (nn.RNNBase, nn.Conv1d)
"""Modules that look at neighbouring positions, which other ranks hold."""


def context_parallel(
    model: Model,
    mesh: Any,  # noqa: ANN401 (a DeviceMesh or a process group)
    config: S2OConfig | None = None,
    *,
    method: str = "all_gather",
    order: str = "zigzag",
    dynamic: bool | None = None,
    tokens: str | None = None,
    positions: str | None = "position_ids",
    documents: str | None = None,
    gather: bool = True,
    **unknown: object,
) -> Model:
    """Return the model with its long calls shared out over the ranks of a mesh, each of which holds some positions.

    Every rank makes the same calls with the same arguments, whole, and gets the whole outputs. Inside, a rank runs the
    model on its tokens; attention looks at the keys of all of them. ``generate`` shares out the prefill and decodes on
    every rank. The weights are shared with the original, which stays as it is. `docs/several-gpus.md` says more.

    Calls that are not shared out run whole on every rank: of a single token, over a cache that holds tokens already,
    and shorter than ``min_seq_len``.

    Args:
        model: A module, optimized or not, or a model of transformers with the attention implementation "s2o". What is
            not of that implementation is compiled as one graph. It may be sharded by tensor parallelism, too.
        mesh: One dimension of a ``DeviceMesh``, such as ``mesh["cp"]``, or a process group.
        config: Quality and implementation; None for those of an optimized model, else for the defaults.
        method: "all_gather" or "ulysses", see `shard_sequence`.
        order: "zigzag" or "head_tail", see `shard_sequence`.
        dynamic: As ``torch.compile(dynamic=...)``.
        tokens: The argument that holds the tokens, [batch, length, ...]; None for those of transformers' models.
        positions: The argument that holds the tokens' positions, [batch, length]. None says that the model needs none:
            one that counts positions itself would count those of its shard.
        documents: The argument that holds the documents of packed tokens, integers [batch or 1, length], equal inside
            of a document. Models of transformers need none: they find documents where positions jump.
        gather: Whether outputs are gathered. Without, each rank gets those of its own tokens, in the order of
            ``shard_sequence(...).positions()``, and no cache.
        **unknown: None: a keyword that this function does not have raises TypeError, which says what to write instead.

    Raises:
        TypeError: The model is no ``nn.Module``, or is already the result of ``torch.compile``.
        OptionError: The configuration is no S2OConfig.
        InputError: A mesh or a name that cannot be used, or a model that mixes positions outside of attention; in a
            call: arguments or outputs that cannot be shared out, or an attention that would see its shard alone.
        RankError: Ranks differ in their configurations or their arguments, or one has ended.
    """
    if unknown:
        refuse_keywords(
            "context_parallel", unknown, {"mode": "Leave it out.", "fullgraph": "Leave it out: it is True."}
        )
    if not isinstance(model, nn.Module) or uncompiled(model) is not model:
        raise TypeError(
            f"context_parallel: expected a torch.nn.Module that is not compiled, got {type(model).__name__}. Pass the "
            "original module."
        )
    ranks = Ranks(mesh, "context_parallel")
    account = account_of(model)
    if config is None and isinstance(account, Account):
        config = account.config
    config, is_eager = config_or_default(config, "context_parallel"), _is_eager(model)
    with ranks.checking("context_parallel"):
        check_method(method)
        _check_model(model, is_eager, positions=positions, documents=documents)
    names = {"tokens": tokens, "positions": positions, "documents": documents}
    facts = {"config": config.to_json(), "method": method, "order": order, "gather": gather, **names}
    ranks.agree("context_parallel", facts)
    inner: Any = model
    if not is_eager:
        merged = {PREFIX + name: value for name, value in dataclasses.asdict(config).items()}
        backend = Backend(None, merged)
        inner = compiled_copy(model, backend, dynamic=dynamic, fullgraph=True)
        model = compiled_copy(model, backend, account=Account(config), dynamic=dynamic)
    copied: Any = object.__new__(_class_of(type(model)))
    vars(copied).update({name: rebound(value, {id(model): copied}) for name, value in vars(model).items()})
    vars(copied)[_PARALLEL] = _Parallel(
        inner, mesh, config, ranks, method=method, order=order, names=names, gather=gather
    )
    return copied


class _ContextParallel:
    """What the class of such a model adds to that of the original."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (a model's)
        parallel: _Parallel = vars(self)[_PARALLEL]
        whole = super().__call__  # pyright: ignore[reportAttributeAccessIssue]
        return parallel.call(whole, args, kwargs) if held_sequence() is None else whole(*args, **kwargs)


def _class_of(base: type) -> type:
    fields = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    hidden = {"__init_subclass__": classmethod(lambda _: None)}  # it might register a second class of the name
    mixin = type("_ContextParallel", (_ContextParallel,), hidden)
    return type(base.__name__, (mixin, base), fields)


def _is_eager(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == "s2o" and account_of(model) is None


def _check_model(model: nn.Module, is_eager: bool, **names: str | None) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        if not is_eager and fsdp is not None and isinstance(module, fsdp.FSDPModule):
            raise InputError(
                f"context parallel, module {name or type(model).__name__}",
                expected="a model that is captured as one graph",
                got="FSDP2, whose hooks break it",
                remedy='Use the attention implementation "s2o" of transformers, which is not compiled, or leave FSDP2 '
                "out.",
            )
        if isinstance(module, MIXING):
            raise InputError(
                f"context parallel, module {name}",
                expected="attention alone to mix positions",
                got=f"a {type(module).__name__}, which would not see those of other ranks",
                remedy="Run this model on one rank.",
            )
    for kind, name in names.items():
        if name is not None and name not in inspect.signature(model.forward).parameters:
            raise InputError(
                f"context parallel, {kind}",
                expected=f"a forward with an argument {name!r}",
                got=str(inspect.signature(model.forward)),
                remedy=f"Name the argument that holds {kind}, or pass {kind}=None if the model needs none.",
            )


class _Parallel:
    """How one model's calls are shared out; the arguments are those of `context_parallel`."""

    def __init__(
        self,
        inner: Any,  # noqa: ANN401 (a module)
        mesh: Any,  # noqa: ANN401 (a DeviceMesh or a process group)
        config: S2OConfig,
        ranks: Ranks,
        *,
        method: str,
        order: str,
        names: dict[str, str | None],
        gather: bool,
    ) -> None:
        self._inner, self._mesh, self._config, self._ranks = inner, mesh, config, ranks
        self._ways = {"method": method, "order": order, "segment_len": config.segment_len}
        self._names, self._gather = names, gather
        parameters = inspect.signature(inner.forward).parameters
        self._takes_masks = "attention_mask" in parameters
        self._cache_name = next((name for name in CACHES if name in parameters), "")

    def call(self, whole: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401 (a model's)
        """Run a call on shards, or by ``whole`` on every rank."""
        what = "a call of a context parallel model"
        with self._ranks.checking(what):
            call = None if self._is_filled(kwargs) else read_call(self._inner.forward, args, kwargs, **self._names)
        if call is None or not self._is_long(call):
            return whole(*args, **kwargs)
        with self._ranks.checking(what):
            self._ranks.check_device(call.arguments[call.tokens], call.tokens)
        self._ranks.agree(what, self._facts(call))
        tokens = {"key_mask": call.key_mask, "documents": call.documents}
        sequence = shard_sequence(self._mesh, call.length, **tokens, **self._ways)
        sequence = dataclasses.replace(sequence, are_found=call.jumps)
        return self._on_shards(call, sequence)

    def _is_filled(self, kwargs: Mapping[str, Any]) -> bool:
        name = name_of_cache(kwargs)
        return bool(name) and int(kwargs[name].get_seq_length()) > 0

    def _is_long(self, call: Call) -> bool:
        shortest = shortest_sparse(self._config.min_seq_len, call.device, dtype_of(self._inner))
        return call.length >= max(shortest, 4 * self._ranks.size)

    def _facts(self, call: Call) -> dict[str, object]:
        return {
            name: f"{x.dtype} {tuple(x.shape)} checksum {checksum(x)}" if isinstance(x, Tensor) else type(x).__name__
            for name, x in call.arguments.items()
        }

    def _on_shards(self, call: Call, sequence: ShardedSequence) -> Any:  # noqa: ANN401 (a model's)
        cache, shards = self._caches(call)
        mine = of_shard(call, sequence, self._names["positions"], self._takes_masks)
        kept, wanted = None, call.arguments.get("logits_to_keep", 0)
        if isinstance(wanted, Tensor) or wanted:
            kept = Kept(wanted, sequence, call.device)
            mine["logits_to_keep"] = kept.places
        if shards is not None:
            mine[self._cache_name] = shards
        with sequence.attending():
            outputs = self._inner(**mine)
        if not self._gather:
            return outputs
        outputs = gather_outputs(outputs, sequence, kept)
        if shards is not None:
            fill_cache(cache, shards, sequence)
            outputs[self._cache_name] = cache
        return outputs

    def _caches(self, call: Call) -> tuple[Any, Any]:
        """The caller's empty cache, or one that the model would make, and a cache for the shards; None for none."""
        given = call.arguments.get(self._cache_name) if self._cache_name else None
        config = getattr(self._inner, "config", None)
        wanted = call.arguments.get("use_cache", getattr(config, "use_cache", False))
        if not self._cache_name or not self._gather or not (wanted or given is not None):
            if self._cache_name and wanted and call.jumps:
                raise InputError(
                    "context parallel, packed documents",
                    expected="use_cache=False beside gather=False",
                    got="a cache, beside which models attend across documents",
                    remedy="Pass use_cache=False.",
                )
            if self._cache_name:
                call.arguments["use_cache"] = False
            return None, None
        from transformers import DynamicCache

        if given is not None and type(given) is not DynamicCache:
            raise InputError(
                f"context parallel, {self._cache_name}",
                expected="an empty DynamicCache, or none",
                got=shown(type(given).__name__),
                remedy='Leave cache_implementation out, or pass "dynamic".',
            )
        return DynamicCache(config=config) if given is None else given, DynamicCache()
