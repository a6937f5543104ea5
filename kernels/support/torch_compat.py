"""Private names of torch, each with a stand-in for a torch that lacks it.

Only this file, ``torch_compile.py`` and ``torch_inductor.py`` may name one (``test_torch_compat.py``). A stand-in
never guesses: it leaves an attention dense, or takes the longer public way. A name without a stand-in is a `Missing`,
whose first use raises `MissingTorchNameError` with the feature that needs it. So a torch without one of these names
costs that feature, and never the import of this package.
"""

from __future__ import annotations

import pkgutil
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from s2o_compile.kernels.support.errors import S2OError

FIRST_TESTED, LAST_TESTED = (2, 11), (2, 15)
TESTED = "{}.{} to {}.{}".format(*FIRST_TESTED, *LAST_TESTED)
"""The range of torch that this package was tested with, as numbers and in words."""

LAST_PACKAGED = (2, 13)
"""The newest torch that writes packages. Later ones write branches in another way, which no workaround was made for."""


def torch_release() -> tuple[int, int]:
    """Major and minor version of the torch that is installed."""
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


class MissingTorchNameError(S2OError, RuntimeError):
    """A feature needs a name of torch that is not public, and this torch does not have it."""

    def __init__(self, path: str, feature: str) -> None:
        super().__init__(
            f"{feature}: expected a torch with {path}, got torch {torch.__version__} without it. Install a version of "
            f"torch that s2o_compile was tested with ({TESTED}), or do without this feature."
        )


class Missing:
    """Stands for a name that is not there. Calling it, reading it or deriving from it raises MissingTorchNameError."""

    def __init__(self, path: str, feature: str) -> None:
        self._error = path, feature

    def __call__(self, *_: object, **__: object) -> Any:  # noqa: ANN401 (it never returns)
        """Raises MissingTorchNameError."""
        raise MissingTorchNameError(*self._error)

    __mro_entries__ = __instancecheck__ = __call__

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (it never returns)
        if name.startswith("__"):
            raise AttributeError(name)
        return self()


NAMES: dict[str, str] = {}
"""Every private name by its path, and the feature that it serves."""

ATTRIBUTES: set[str] = set()
"""Those of them that only objects have, not their classes."""

_NEEDED: list[str] = []
"""Those of them without a stand-in."""


def require(feature: str) -> None:
    """Raise MissingTorchNameError if this torch lacks a name that a feature cannot do without."""
    for path in _NEEDED:
        if NAMES[path] == feature and _find(path) is None:
            raise MissingTorchNameError(path, feature)


def _find(path: str) -> Any:  # noqa: ANN401 (anything of torch's)
    """The object at a path, or None."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None


def _attribute(path: str, feature: str) -> str:
    """The name of an attribute, which `getattr` looks up with a default."""
    NAMES[path] = feature
    ATTRIBUTES.add(path)
    return path.rpartition(".")[2]


def _on_use(path: str, feature: str, *stand_in: Any) -> Callable[[], Any]:  # noqa: ANN401 (anything of torch's)
    """A function that gives what `_named` gives, looked up at its first call: its module takes long to import."""
    NAMES[path] = feature
    if not stand_in:
        _NEEDED.append(path)

    found: list[Any] = []

    def look_up() -> Any:  # noqa: ANN401 (anything of torch's)
        if not found:
            here = _find(path)
            found.append(here if here is not None else stand_in[0] if stand_in else Missing(path, feature))
        return found[0]

    return look_up


def _named(path: str, feature: str, *stand_in: Any) -> Any:  # noqa: ANN401 (anything of torch's)
    """The object at a path; else the stand-in, or a `Missing` if there is none."""
    return _on_use(path, feature, *stand_in)()


def _later(path: str, feature: str, *stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is looked up at its first call: its module takes long to import."""
    look_up = _on_use(path, feature, *stand_in)

    def call(*args: Any, **keywords: Any) -> Any:  # noqa: ANN401 (as torch's own)
        return look_up()(*args, **keywords)

    return call


class _Nothing:
    """A class without instances, for types that are not there."""


# Fake tensors: values of a captured graph without data.
_REWRITING = "rewriting captured graphs"
FakeTensor = _named("torch._subclasses.fake_tensor.FakeTensor", _REWRITING, _Nothing)
FakeTensorMode = _named("torch._subclasses.fake_tensor.FakeTensorMode", "tracing mask functions")


def is_fake(x: object) -> bool:
    """Whether a tensor has no data, as while something is traced."""
    return isinstance(x, FakeTensor)


# The mode that traces a call of some tensors, or None.
fake_mode_of: Callable[[Sequence[Any]], Any] = _named(
    "torch._guards.detect_fake_mode",
    "sparse FlexAttention in graphs",
    lambda tensors: next((x.fake_mode for x in tensors if is_fake(x)), None),
)

# Symbolic sizes. Without a name of these, what is not a plain number is not known.
_SIZES = "proofs for symbolic lengths"


def _stand_in_unbacked(value: Any) -> list[Any]:  # noqa: ANN401 (a tensor or a symbolic number)
    sizes = value.shape if isinstance(value, Tensor) else (value,)
    return [size for size in sizes if not isinstance(size, int | float)]


statically_known_true = _later(
    "torch.fx.experimental.symbolic_shapes.statically_known_true", _SIZES, lambda condition: condition is True
)
free_unbacked_symbols = _later(
    "torch.fx.experimental.symbolic_shapes.free_unbacked_symbols", _SIZES, _stand_in_unbacked
)
sympy_max = _on_use("torch.utils._sympy.functions.Max", _SIZES, None)
sympy_min = _on_use("torch.utils._sympy.functions.Min", _SIZES, None)
value_ranges = _on_use("torch.utils._sympy.value_ranges.ValueRanges", _SIZES, None)
bound_sympy = _on_use("torch.utils._sympy.value_ranges.bound_sympy", _SIZES, None)

# Kinds of operators: of the public objects that they are the classes of.
OpOverload: Any = type(torch.ops.aten.add.Tensor)
OpOverloadPacket: Any = type(torch.ops.aten.add)
HigherOrderOperator = _named("torch._ops.HigherOrderOperator", _REWRITING, _Nothing)
flex_attention_operator = getattr(torch.ops.higher_order, "flex_attention", None)

# Functions that stand in captured graphs.
scaled_dot_product_attention = _named(
    "torch._C._nn.scaled_dot_product_attention", _REWRITING, torch.nn.functional.scaled_dot_product_attention
)
VARLEN_OPERATOR = "torch_attn::_varlen_attn"
"""What ``torch.nn.attention.varlen.varlen_attn`` calls; a torch that calls another one keeps such attention dense."""
nn_functions = _named("torch._C._nn", "knowing torch's own functions", types.SimpleNamespace())
tensor_methods = _named("torch._tensor", "knowing the methods of tensors", types.SimpleNamespace())
encoder_layer = _named("torch._transformer_encoder_layer_fwd", "nn.TransformerEncoderLayer's fast path", None)
_VMAP = "masks that are made under torch.vmap"
vmap_functions: tuple[Any, ...] = tuple(
    function
    for module in ("torch._C._functorch", "torch._functorch.predispatch")
    for name in ("_add_batch_dim", "_remove_batch_dim")
    if (function := _named(f"{module}.{name}", _VMAP, None)) is not None
)
data_of = _named("torch._C._autograd._get_data_attr", "reading x.data in graphs", None)


def _stand_in_leaves(tree: Any) -> list[Any]:  # noqa: ANN401 (any nest)
    if not isinstance(tree, tuple | list | dict):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in _stand_in_leaves(part)]


_OPENING = "opening nn.MultiheadAttention and exported programs"
tree_leaves: Callable[[Any], list[Any]] = _named("torch.utils._pytree.tree_leaves", _REWRITING, _stand_in_leaves)
tree_flatten: Callable[[Any], Any] = _named("torch.utils._pytree.tree_flatten", _OPENING)
tree_unflatten: Callable[..., Any] = _named("torch.utils._pytree.tree_unflatten", _OPENING)
make_fx = _named("torch.fx.experimental.proxy_tensor.make_fx", _OPENING)


_COUNTING = "counting the attentions that a model runs"


class _NoDispatchMode:
    """The class of modes where torch has none of that name: it has subclasses, but no instance."""

    __init__ = Missing("torch.utils._python_dispatch.TorchDispatchMode", _COUNTING)


TorchDispatchMode = _named("torch.utils._python_dispatch.TorchDispatchMode", _COUNTING, _NoDispatchMode)
in_dispatch_mode: Callable[[], bool] = _named(
    "torch.utils._python_dispatch.any_torch_dispatch_mode_on_stack",
    "compiling a model whose first call is under a mode, such as a FLOP counter",
    lambda: False,
)

# The kinds of tensors: those that are made of others, and those of the transforms of ``torch.func``.
is_wrapper: Callable[[object], bool] = _named(
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
    "tensor subclasses",
    lambda x: hasattr(type(x), "__tensor_flatten__"),
)
is_transformed: Callable[[Tensor], bool] = _named(
    "torch._C._functorch.is_functorch_wrapped_tensor",
    _VMAP,
    lambda x: _storage_of(x) is None,  # every transform's tensors hide theirs
)
_unwrapped = _named("torch._C._functorch.get_unwrapped", _VMAP, None)


def dtype_of(module: nn.Module | None) -> torch.dtype:
    """The dtype of a module's first floating parameter; float32 if there is none."""
    parameters = () if module is None else module.parameters()
    return next((x.dtype for x in parameters if x.is_floating_point()), torch.float32)


def tensors_within(x: Any) -> list[Tensor]:  # noqa: ANN401 (a tensor made of others)
    """The tensors that a wrapper is made of; a DTensor names its mesh beside them."""
    parts = (getattr(x, name) for name in x.__tensor_flatten__()[0])
    return [part for part in parts if isinstance(part, Tensor)]


def storages(x: Tensor) -> Iterator[int | None]:
    """Numbers of the storages that a tensor lies in; None for one that cannot be told."""
    while _unwrapped is not None and is_transformed(x):
        x = _unwrapped(x)
    if is_wrapper(x):
        for part in tensors_within(x):
            yield from storages(part)
        return
    yield _storage_of(x)


_CDATA = _attribute("torch.UntypedStorage._cdata", "seeing writes through views")


def _storage_of(x: Tensor) -> int | None:
    try:
        return getattr(x.untyped_storage(), _CDATA, None)
    except (NotImplementedError, RuntimeError):  # sparse tensors, and those of transforms
        return None


_ERASED = _attribute("torch.fx.Node._erased", _REWRITING)


def is_erased(node: fx.Node) -> bool:
    """Whether a node was taken out of its graph."""
    erased = getattr(node, _ERASED, None)
    return all(node is not other for other in node.graph.nodes) if erased is None else erased


_BASE = _attribute("torch.Tensor._base", "counting attentions behind views")


def is_held_by_module(meta: Mapping[str, Any]) -> bool:
    """Whether an input of Dynamo's graph is a tensor of a module, by its metadata; False if torch does not say."""
    return (meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") == "unguarded"


def base_of(x: Tensor) -> Tensor | None:
    """The tensor that a view looks at; None for a tensor of its own."""
    return getattr(x, _BASE, None)


_VERSION = _attribute("torch.Tensor._version", "reusing a transformers mask that was looked at")


def version_of(x: Tensor) -> int | None:
    """A count of the writes into a tensor, or None; tensors of inference mode have none."""
    return None if x.is_inference() else getattr(x, _VERSION, None)


make_wrapper_tensor = _named("torch.Tensor._make_wrapper_subclass", "transformers' masks as descriptions")
tree_map_only = _named("torch.utils._pytree.tree_map_only", "transformers' masks as descriptions")
NoTorchFunction = _named("torch._C.DisableTorchFunctionSubclass", "transformers' masks as descriptions")

_BUFFERS = _attribute("torch.nn.Module._buffers", "protecting the buffers of a model that cannot be copied")


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own table of buffers."""
    return getattr(module, _BUFFERS, {})


_SCHEMA = _attribute("torch._ops.OpOverload._schema", _REWRITING)


def schema_of(operator: Any) -> Any:  # noqa: ANN401 (an operator and its FunctionSchema)
    """The schema of an operator.

    Raises:
        MissingTorchNameError: Operators have none.
    """
    schema = getattr(operator, _SCHEMA, None)
    if schema is None:
        raise MissingTorchNameError("torch._ops.OpOverload._schema", _REWRITING)
    return schema


def returns_views(operator: Any) -> bool:  # noqa: ANN401 (an operator)
    """Whether an operator only looks at its arguments' memory in another shape."""
    aliases = [returned.alias_info for returned in schema_of(operator).returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


# FlexAttention and packages.
_PACKAGES = "packages"
cond = _later("torch._higher_order_ops.cond.cond_op", _PACKAGES)
while_loop = _later("torch._higher_order_ops.while_loop.while_loop_op", _PACKAGES)
map_loop = _later("torch._higher_order_ops.map.map_impl", _PACKAGES)
dispatch_functionalize = _later("torch._subclasses.functional_tensor.dispatch_functionalize", _PACKAGES)
indexing_by_tensors = _later(
    "torch._dynamo._trace_wrapped_higher_order_op.TransformGetItemToIndex", "sparse flex_attention with own functions"
)


@contextmanager
def dynamo_options(**options: object) -> Iterator[None]:
    """Inside, Dynamo has these options, as far as it knows them."""
    config = _find("torch._dynamo.config")
    known = {name: value for name, value in options.items() if hasattr(config, name)}
    with config.patch(**known) if known and hasattr(config, "patch") else nullcontext():
        yield


NAMES["torch._dynamo.config.patch"] = "fewer compilations of FlexAttention, and hooks of compiled models"

# Derivatives that no ``requires_grad`` shows (``derivatives.py``).
_DERIVATIVES = "derivatives in forward mode and of transforms"
forward_level = _attribute("torch.autograd.forward_ad._current_level", _DERIVATIVES)
interpreter_stack = _named("torch._C._functorch.get_interpreter_stack", _DERIVATIVES, lambda: None)
TransformType = _named("torch._C._functorch.TransformType", _DERIVATIVES, None)
make_dual_functions: tuple[Any, ...] = tuple(
    function
    for module in ("torch._functorch.predispatch", "torch._VF")
    if (function := _named(f"{module}._make_dual", _DERIVATIVES, None)) is not None
)
forward_mode_enabled: Callable[[], bool] = _named("torch._C._is_fwd_grad_enabled", _DERIVATIVES, lambda: True)

# The dispatcher. Without a name of these every call of an operator goes the public way, which is slower.
_SHORT_CUTS = "calls of the operator without the dispatcher"
DispatchKey = _named("torch._C.DispatchKey", _SHORT_CUTS, None)
DispatchKeySet = _named("torch._C.DispatchKeySet", _SHORT_CUTS, None)
below_autograd: Callable[[], AbstractContextManager[Any]] | None = _named(
    "torch._C._AutoDispatchBelowAutograd", _SHORT_CUTS, None
)
after_autograd = _named("torch._C._after_autograd_keyset", _SHORT_CUTS, None)
any_requires_grad = _named("torch._C._any_requires_grad", _SHORT_CUTS, None)
eval_frame_callback = _named("torch._C._dynamo.eval_frame.get_eval_frame_callback", _SHORT_CUTS, None)
torch_functions = _named("torch._C._len_torch_function_stack", _SHORT_CUTS, None)
any_autocast = _named("torch._C._is_any_autocast_enabled", _SHORT_CUTS, None)
profiler_enabled = _named("torch.autograd._profiler_enabled", _SHORT_CUTS, None)
included_keys = _named("torch._C._dispatch_tls_local_include_set", _SHORT_CUTS, None)
keys_of = _named("torch._C._dispatch_keys", _SHORT_CUTS, None)

_HAS_AMX = _named("torch.cpu._is_amx_tile_supported", "bfloat16 in tiles on a CPU", lambda: False)


@cache
def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (AMX), several times as fast as float32."""
    return bool(_HAS_AMX())
