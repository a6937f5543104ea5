"""``optimize``, ``explain`` and ``status``: the calls that most users need."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from s2o_compile.backend import PREFIX, Backend, check_inner, split_options
from s2o_compile.capture import audit as audit
from s2o_compile.capture.compiled_copy import Model, account_of, compiled_copy
from s2o_compile.capture.one_at_a_time import ONE_AT_A_TIME
from s2o_compile.config import S2OConfig, config_or_default, refuse_keywords
from s2o_compile.errors import NothingRewrittenWarning, OptionError, UnknownSiteWarning
from s2o_compile.kernels.support.torch_compile import uncompiled
from s2o_compile.passes.site import SiteRecord
from s2o_compile.passes.site_names import unique_names
from s2o_compile.recording import Account, Recording, record
from s2o_compile.report import Report, Site, Status
from s2o_compile.rewriting import rewrite


def optimize(
    model: Model,
    config: S2OConfig | None = None,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    options: Mapping[str, object] | None = None,
    **unknown: object,
) -> Model:
    """Return the model with its long attention made sparse, ready to call.

    The result is a new module that shares every parameter and buffer with the original. Its class is a subclass of the
    original's, of the same name: ``generate``, ``state_dict`` and all other methods work. The original stays dense, so
    both can be compared; attributes and submodules that are changed later change in one of the two only.

    Compilation happens at the first call, as with ``torch.compile``. Whatever a method calls is compiled where the call
    comes in: ``generate`` of wrapped models, ``encode``, ``get_image_features``. A copy of the result, by ``copy``,
    ``deepcopy``, ``pickle``, ``torch.save`` or a replica, is optimized, too, and computes with its own weights.
    `status` tells what ran sparse. A long call in which nothing did warns once (`NothingRewrittenWarning`).

    Args:
        model: Any module, also an optimized one, for another configuration. Call the result under ``torch.no_grad()``:
            with gradients wanted, attention stays dense.
        config: Quality and implementation; None for the defaults.
        mode: As ``torch.compile(mode=...)``.
        dynamic: As ``torch.compile(dynamic=...)``.
        fullgraph: As ``torch.compile(fullgraph=...)``.
        options: Any option of the inner backend, Inductor or TensorRT.
        **unknown: None: a keyword that this function does not have raises TypeError, which says what to write instead.

    Raises:
        TypeError: The model is no ``nn.Module``, or is already the result of ``torch.compile``.
        OptionError: A mode or an option that does not exist, or an ``s2o.*`` option, which belongs into ``config``.
    """
    if unknown:
        refuse_keywords("optimize", unknown, {"backend": "Write config=S2OConfig(inner_backend=...)."})
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"optimize: expected a torch.nn.Module, got {type(model).__name__}. For a function use "
            'torch.compile(fn, backend="s2o").'
        )
    if uncompiled(model) is not model:
        raise TypeError(
            "optimize: expected an uncompiled module, got the result of torch.compile. Pass the original module, or "
            'give torch.compile backend="s2o".'
        )
    for name in options or {}:
        if name.startswith(PREFIX):
            raise OptionError(
                f"optimize: expected options of the inner backend, got {name!r}. Pass config=S2OConfig("
                f"{name.removeprefix(PREFIX)}=...) instead."
            )
    config = config_or_default(config, "optimize")
    merged = {**(options or {}), **{PREFIX + name: value for name, value in dataclasses.asdict(config).items()}}
    check_inner(*split_options(merged), mode)  # what is wrong fails here, not at the first call
    backend = Backend(mode, merged)
    return compiled_copy(model, backend, account=Account(config), dynamic=dynamic, fullgraph=fullgraph)


def status(model: nn.Module) -> Status:
    """Return what ran in the calls of an optimized model so far: whether it is sparse, and if not, why.

    It costs nothing but the reading of counters. Copies have a status of their own, but for shallow ones.

    Args:
        model: The result of `optimize`, or a module in it: they share one account.

    Raises:
        TypeError: The model is not optimized.
    """
    account = account_of(uncompiled(model))
    if not isinstance(account, Account):
        raise TypeError(
            f"status: expected the result of s2o_compile.optimize, got {type(model).__name__}. Optimize the model, or "
            "open s2o_compile.record() before its first call."
        )
    return account.status


def explain(
    model: Callable[..., object],
    *args: object,
    config: S2OConfig | None = None,
    method: str | None = None,
    **kwargs: object,
) -> Report:
    """Run a model and report every attention: rewritten, its proven mask and density, or why it stays dense.

    The model runs twice. First as it is, to count the attentions that really run: those that no captured graph showed
    to the pass are in ``Report.not_found``. That run works on copies of the inputs and of the model's state (parameters
    are shared) and on a fork of the random numbers; see `capture.audit`. Then compiled as by `optimize`, on the inputs
    themselves.
    The rewritten graphs run without Inductor, so this costs a capture and two forwards. Grad mode is the caller's:
    under enabled gradients the report says that sites stay dense because of them. Like ``torch._dynamo.explain`` it
    resets Dynamo: code compiled before is compiled anew at its next call.

    Args:
        model: A module, optimized or not, or a function.
        *args: Its inputs.
        config: Quality and implementation; None for the defaults.
        method: The method that you call, such as ``"generate"``; None for the module itself.
        **kwargs: Its keyword inputs.
    """
    model = uncompiled(model)
    with watched(config) as watch:
        ran, failure = (), ""
        try:
            ran = audit.take(getattr(model, method) if method else model, args, kwargs)
        except Exception as error:  # whatever copying or running a model raises: the compiled run decides
            failure = f"{type(error).__name__}: {error}".partition("\n")[0]
        if isinstance(model, nn.Module):
            model = compiled_copy(model, watch.backend)
            (getattr(model, method) if method else model)(*args, **kwargs)
        else:
            torch.compile(model, backend=watch.backend)(*args, **kwargs)
    return watch.report(ran, failure)


class Watch:
    """Records the graphs of one run and how often each of them runs; nothing is compiled behind the passes."""

    def __init__(self, config: S2OConfig | None) -> None:
        self._config = config_or_default(config, "explain")
        # By the identity of a graph's records, how often it ran: one that layers share covers an attention of each.
        self._runs: dict[int, int] = {}
        self.recording = Recording()

    def backend(self, gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., object]:
        """A backend for torch.compile."""
        graph = id(rewrite(gm, self._config))
        forward = gm.forward
        self._runs[graph] = 0

        def counted(*inputs: object) -> object:
            self._runs[graph] += 1
            return forward(*inputs)

        return counted

    def joined(self, ran: Sequence[audit.Ran]) -> tuple[tuple[audit.Ran, SiteRecord | None], ...]:
        """Every call that ran with the record that covers it, or None if no record does."""
        # Modules that were optimized before compile graphs of their own, which nobody counts.
        graphs = [(graph, self._runs.get(id(graph), 1)) for graph in self.recording.graphs]
        covered = audit.cover(ran, [(entry, runs) for graph, runs in graphs for entry in graph])
        return tuple(zip(ran, covered, strict=True))

    def report(self, ran: Sequence[audit.Ran], audit_error: str = "") -> Report:
        """The report of the compiled attentions, and of those that ran and were not found."""
        calls = [call for call, entry in self.joined(ran) if entry is None]
        names = unique_names([call.path or call.kind for call in calls])
        fields = ("reason", "query_shape", "key_shape", "dtype")
        not_found = tuple(
            Site(name=name, rewritten=False, found=False, **{field: getattr(call, field) for field in fields})
            for name, call in zip(names, calls, strict=True)
        )
        report = self.recording.report
        sites = report.sites + not_found
        return dataclasses.replace(report, sites=sites, audit_error=audit_error, compile_seconds=None)


@contextmanager
def watched(config: S2OConfig | None = None) -> Iterator[Watch]:
    """A fresh Dynamo and a `Watch` over what is compiled with its backend inside the block; one thread at a time.

    Dynamo and the filters of warnings belong to the process. A second block would drop the code that the first compiled
    and keep warnings off for good. Other threads compile their code anew at their next call.
    """
    watch = Watch(config)
    with ONE_AT_A_TIME:
        torch.compiler.reset()
        try:
            with record() as watch.recording, warnings.catch_warnings():
                for said in (NothingRewrittenWarning, UnknownSiteWarning):  # by the report
                    warnings.simplefilter("ignore", said)
                yield watch
        finally:
            torch.compiler.reset()
