"""The audit: counts attention at the ATen level in an uncompiled run, to check the pass's report.

A frontend that does not know a form of attention finds nothing and says nothing. So the model runs once more,
uncompiled, under a `TorchDispatchMode`. There einsum, ``@``, ``baddbmm`` and ``Tensor.softmax`` are a handful of
operators. Each fused attention of torch is one operator, and the mode sees nothing below it, so nothing counts twice.
Under a `TorchFunctionMode`, ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` would leave their fused paths.

A hand-written attention is a product of two tensors that reaches a product with values: through a softmax over the last
dimension, through ``exp``, or without either. `passes.trail` follows it. A router's softmax ends in ``topk``, a
classifier's nowhere. Weights that are no product of queries and keys (token mergers, hyper-connections, additive
attention) have a kind of their own, because no pass looks for them.
"""

from __future__ import annotations

import copy
import random
import sys
import threading
import warnings
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from s2o_compile.capture.one_at_a_time import ONE_AT_A_TIME
from s2o_compile.kernels.support.torch_compat import TorchDispatchMode, base_of, buffers_of, tree_leaves
from s2o_compile.kernels.support.torch_compile import names_of_modules, uncompiled
from s2o_compile.passes.site import SiteRecord, is_named_attention, shape_text, sizes_of
from s2o_compile.passes.trail import Scores, Trail

SDPA = "scaled_dot_product_attention"
FLEX = "flex_attention"
HAND_WRITTEN = "softmax attention"
MIXING = "softmax mixing"
"""A sum of values whose softmax weights are no product of queries and keys."""
WITHOUT_SOFTMAX = "attention without softmax"
"""Products of queries, keys and values: linear attention, or other functions of the scores. One a module is counted."""

_LIBRARIES = (
    "flash_attn", "xformers", "sageattention", "vllm", "flashinfer", "transformer_engine", "natten", "kernels",
    "torch_attn",
)  # fmt: skip
"""Namespaces whose operators are counted by a part of their names; ``s2o`` itself belongs into its own report."""
_FUSED = {
    "_transformer_encoder_layer_fwd": "torch._transformer_encoder_layer_fwd",
    "_native_multi_head_attention": "torch._native_multi_head_attention",
    "_flash_attention_forward": "aten._flash_attention_forward",
    "_efficient_attention_forward": "aten._efficient_attention_forward",
}
_SOFTMAXES = frozenset({"_softmax", "_safe_softmax", "softmax", "_log_softmax"})
_EXPONENTIALS = frozenset({"exp", "exp_"})
_CHOICES = frozenset({"index", "index_select", "gather"})
_PRODUCTS = frozenset({"mm", "bmm", "baddbmm", "addmm", "matmul"})
_VIEWS = frozenset(
    (
        "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "clone",
        "alias", "detach", "contiguous", "_to_copy", "lift_fresh", "_reshape_alias", "select", "split", "unbind",
        "split_with_sizes", "view_as", "flatten", "slice", "index_select",
    )
)  # fmt: skip
# Operators between the softmax and the values, and between the scores and the softmax, that keep a matrix of queries x
# keys what it is. Of all others, the value's shape tells.
_KEEPING = _VIEWS | frozenset(
    (
        "native_dropout", "dropout", "bernoulli", "mul", "mul_",
        "div", "div_", "add", "add_", "sub", "sub_", "masked_fill", "masked_fill_", "where", "nan_to_num", "tanh",
        "cat", "copy_", "constant_pad_nd", "clamp", "clamp_min", "rsub", "neg", "tril", "maximum",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """One call of attention, as it ran.

    Attributes:
        path: The module that ran it, such as ``model.layers.0.self_attn``; empty outside modules.
        kind: The operator's name, or "softmax attention" for a hand-written one.
        query_shape: [..., Nq, D]; D is absent where the scores are no matrix product.
        key_shape: [..., Nk, D].
        dtype: Of the query or the scores.
        mask: The mask, from a counter that looks at values. The audit itself does not look.
    """

    path: str
    kind: str
    query_shape: tuple[str, ...]
    key_shape: tuple[str, ...]
    dtype: str
    mask: str = ""

    @property
    def reason(self) -> str:
        """Why this is in the report, if no record of the pass covers it."""
        if self.kind == MIXING:
            return "not found: values are mixed here by a softmax of what is seen to be no product of queries and keys"
        return f"not found: {self.kind} ran here, and the pass knew it in no captured graph"


class Counter(TorchDispatchMode):
    """Counts attention operators and follows scores and weights from product to product."""

    supports_higher_order_operators = True

    def __init__(self, path: Callable[[], str]) -> None:
        super().__init__()
        self.ran: list[Ran] = []
        self._path = path
        self._trail: Trail[Tensor] = Trail(WeakIdKeyDictionary())
        self._learned: Any = WeakIdKeyDictionary()  # what is made of parameters and buffers alone

    def learn(self, buffers: Iterable[Tensor]) -> None:
        """Tensors that are no input of the call, as parameters are none."""
        self._learned.update((buffer, True) for buffer in buffers)

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 (an operator of any kind)
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (what the operator returns)
        output = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", func)
        name = getattr(packet, "__name__", str(packet))
        kind = _kind(name, getattr(func, "namespace", ""))
        if kind:
            self._count(func, kind, args, kwargs or {})
        elif name in _SOFTMAXES or (name in _EXPONENTIALS and args[0] in self._trail.table):
            self._softmax(name, args[0], -1 if name in _EXPONENTIALS else args[1], output)
        elif name in _PRODUCTS:
            self._product(name, args, output)
        else:
            self._step(name, args, output)
        return output

    def _count(self, _: object, kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        tensors = [x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor)]
        query, key = (tensors[0], tensors[1]) if len(tensors) > 1 else (None, None)
        path = self._path()
        if "encoder_layer" in kind:  # the whole layer in one operator
            key, path = query, f"{path}.self_attn".removeprefix(".")
        self.ran.append(Ran(path, kind, shape_text(query), shape_text(key), _dtype(query)))

    def _softmax(self, name: str, scores: object, dim: int, weights: Tensor) -> None:
        if isinstance(scores, Tensor) and scores.ndim >= 2 and dim % scores.ndim == scores.ndim - 1:
            self._trail.softmax(name, scores, weights, sizes_of(scores))

    def _product(self, name: str, args: Sequence[Any], output: Tensor) -> None:
        left, right = args[1:3] if name in ("baddbmm", "addmm") else args[:2]
        learned = self._is_learned(left), self._is_learned(right)
        if all(learned):
            self._learned[output] = True
        scores = self._trail.product(left, right, output, sizes_of(output), sizes_of(left)[-1], learned)
        if scores is not None:
            self._weigh(scores, output)

    def _weigh(self, scores: Scores, output: Tensor) -> None:
        """Count an attention whose scores meet its values."""
        kind = MIXING if scores.depth is None else HAND_WRITTEN if scores.softmax else WITHOUT_SOFTMAX
        path = self._path()
        if kind == WITHOUT_SOFTMAX and any(call.path == path and call.kind == kind for call in self.ran):
            return  # code of this kind has products of its parts
        self.ran.append(Ran(path, kind, *scores.shapes, _dtype(output)))

    def _is_learned(self, tensor: Tensor) -> bool:
        tensors = [x for x in (tensor, base_of(tensor)) if x is not None]
        return any(isinstance(x, nn.Parameter) or x in self._learned for x in tensors)

    def _step(self, name: str, args: Sequence[Any], output: object) -> None:
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        # An expert's weights are chosen from those of all; of a table of embeddings rows are.
        chosen = name in _CHOICES and args[0].ndim > 2 and self._is_learned(args[0])
        if inputs and (chosen or all(map(self._is_learned, inputs))):
            self._learned.update((x, True) for x in outputs)
        elif name.endswith("_"):  # a cache of keys is a buffer, too, until keys are written to it or to a view of it
            for x in (x for output in outputs for x in (output, base_of(output)) if x is not None):
                self._learned.pop(x, None)
        outputs, keeps = [x for x in outputs if x.is_floating_point()], name in _KEEPING
        # Scores copied into a part of a larger tensor make that one scores, too.
        outputs += [base for x in outputs if name.endswith("_") and (base := base_of(x)) is not None]
        for x in outputs:
            self._trail.step(name.strip("_"), inputs, x, sizes_of(x), view=name in _VIEWS, keeps=keeps)


def _kind(name: str, space: str) -> str:
    if name.startswith("_scaled_dot_product_") and "backward" not in name:
        return SDPA
    if name == FLEX:
        return name
    if space == "aten":
        return _FUSED.get(name, "")
    known = space.startswith(_LIBRARIES) and any(word in name for word in ("att", "fwd", "forward"))
    forward = "backward" not in name and "bwd" not in name
    return f"{space}::{name}" if forward and (known or is_named_attention(space, name)) else ""


def _dtype(tensor: Tensor | None) -> str:
    return "" if tensor is None else str(tensor.dtype).removeprefix("torch.")


class _ModulePath:
    """Where in the model the run is, by hooks of all modules: hooks of one module would switch fused paths off.

    They run in every thread; modules of others than the one that made this say nothing about the model.
    """

    def __init__(self, root: object) -> None:
        self._thread = threading.get_ident()
        self._names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._stack: list[str] = []
        if isinstance(root, nn.Module):
            self._learn(root, "")

    def __call__(self) -> str:
        return self._stack[-1] if self._stack else ""

    def _learn(self, root: nn.Module, prefix: str) -> None:
        for module, name in names_of_modules(root).items():
            self._names.setdefault(module, ".".join(part for part in (prefix, name) if part))

    def enter(self, module: nn.Module, _: object) -> None:
        """Hook before every forward."""
        if threading.get_ident() != self._thread:
            return
        if module not in self._names:  # a module that a function closed over, or that was made while running
            self._learn(module, self())
        self._stack.append(self._names[module])

    def leave(self, *_: object) -> None:
        """Hook behind every forward."""
        if threading.get_ident() == self._thread:
            self._stack.pop()


def take(
    model: Callable[..., object],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    counter: Callable[[Callable[[], str]], Counter] = Counter,
) -> tuple[Ran, ...]:
    """Run a model once, uncompiled, and return every attention that ran, in order.

    Grad mode, autocast and training mode are the caller's. The run works on copies of the inputs (so caches among
    them are not filled) and on a copy of the model that shares its parameters but no buffer and no other state; a
    model that cannot be copied runs itself and gets its buffers back. Random numbers are drawn from a fork.
    State that a plain function keeps outside its arguments is not protected. ``counter`` makes the counter, from a
    function that names the module that runs.

    Audits run one at a time. Meanwhile other threads run their compiled code uncompiled, do not warn, and get random
    numbers twice.
    """
    with ExitStack() as stack:
        stack.enter_context(ONE_AT_A_TIME)
        stack.enter_context(_forked_random_state())
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # the compiled run gives the model's own
        args, kwargs = _copies((args, dict(kwargs)))
        copied = stack.enter_context(_copy_of(model))
        path = _ModulePath(copied if isinstance(copied, nn.Module) else getattr(copied, "__self__", None))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # also for compiled parts of the model
        stack.enter_context(register_module_forward_pre_hook(path.enter))
        stack.enter_context(register_module_forward_hook(path.leave, always_call=True))
        counting = stack.enter_context(counter(path))
        if isinstance(copied, nn.Module):
            counting.learn(copied.buffers())
        copied(*args, **kwargs)
        return tuple(counting.ran)


@contextmanager
def _forked_random_state() -> Iterator[None]:
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(state)


def _copies(inputs: Any) -> Any:  # noqa: ANN401 (any nest of arguments)
    # deepcopy refuses tensors with a history, and nested ones; a clone keeps the history.
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and (x.is_nested or not x.is_leaf)]
    return copy.deepcopy(inputs, {id(x): x.clone() for x in tensors})


@contextmanager
def _copy_of(model: Callable[..., object]) -> Iterator[Callable[..., Any]]:
    model = uncompiled(model)
    owner = getattr(model, "__self__", model)  # of a bound method
    if not isinstance(owner, nn.Module):
        yield model
        return
    try:
        shared = {id(parameter): parameter for parameter in owner.parameters()}
        copied = copy.deepcopy(model, shared)
    except Exception:  # whatever a model keeps: locks, generators, tensors with a history
        copied = None
    if copied is not None:
        yield copied
        return
    holders = [(table := buffers_of(module), dict(table)) for module in owner.modules()]
    saved = {id(b): (b, b.detach().clone()) for _, buffers in holders for b in buffers.values() if b is not None}
    try:
        yield model
    finally:
        for held, buffers in holders:
            held.clear()
            held.update(buffers)
        with torch.no_grad():
            for buffer, values in saved.values():
                buffer.copy_(values)


def cover(ran: Sequence[Ran], covered: Sequence[tuple[SiteRecord, int]]) -> tuple[SiteRecord | None, ...]:
    """For each call the record of the pass that covers it; None where none does.

    Args:
        ran: The audit.
        covered: Records and how often their graph ran: a record covers as many calls of its module.
    """
    left = Counts({index: runs for index, (_, runs) in enumerate(covered) if runs})
    names = [record.name.partition("#")[0] for record, _ in covered]
    found: list[SiteRecord | None] = [None] * len(ran)
    for covers in _COVERS:
        for place, call in enumerate(ran):
            if found[place] is None:
                index = next((i for i in left if left[i] > 0 and covers(call, names[i], covered[i][0])), None)
                if index is not None:
                    left[index] -= 1
                    found[place] = covered[index][0]
    return tuple(found)


def _same_shape(call: Ran, record: SiteRecord) -> bool:
    """Lengths and head dims only: batch and heads may be one dimension, and repeated heads may have been undone."""
    ours, theirs = ((x.query_shape[-2:], x.key_shape[-2:]) for x in (call, record))
    return len(theirs[0]) == len(theirs[1]) == 2 and all(
        len(a) == len(b) and all(x == y or not y.isdigit() for x, y in zip(a, b, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


def _related(path: str, name: str) -> bool:
    return path.endswith("." + name) or name.endswith("." + path) or path.startswith(name + ".")


_COVERS: tuple[Callable[[Ran, str, SiteRecord], bool], ...] = (
    # Prefill and decode are two records of one module.
    lambda call, name, record: call.path == name and _same_shape(call, record),
    lambda call, name, _: call.path == name,
    # The captured frame may be that of a submodule.
    lambda call, name, _: _related(call.path, name),
    # A graph that several layers share.
    lambda call, _, record: _same_shape(call, record),
    # A call outside submodules is recorded under a node's name.
    lambda call, name, _: not call.path and "." not in name,
)
"""When a record, under its name without a number, covers a call: the surest rule first."""
