"""Names the function that a node calls, and the tensors that the call may write to.

A name proves nothing: a user's operator may be called ``softmax``, and ``relu(x, inplace=True)`` writes. So a function
is known only if it *is* torch's or Python's own, the same object. Its operator's schema says which arguments it writes.
Any other function may write to every tensor that it can reach through its arguments.
"""

from __future__ import annotations

import builtins
import inspect
import math
import operator
import sys
import types
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.backends import cuda
from torch.nn import functional as F

from s2o_compile.kernels.support.dtensors import is_dtensor
from s2o_compile.kernels.support.torch_compat import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    data_of,
    flex_attention_operator,
    free_unbacked_symbols,
    nn_functions,
    tensor_methods,
    tree_leaves,
    vmap_functions,
)
from s2o_compile.passes.graph.nodes import value_of

VARLEN_FUNCTION = "flash_attn_varlen_func"
_VARLEN_MODULES = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface")

_C_FUNCTION = types.BuiltinFunctionType
_SYNONYMS = {
    **{"less_equal": "le", "less": "lt", "greater_equal": "ge", "greater": "gt", "not_equal": "ne"},
    **dict.fromkeys(("bitwise_and", "logical_and", "iand"), "and"),
    **dict.fromkeys(("bitwise_or", "logical_or", "ior"), "or"),
    **dict.fromkeys(("bitwise_not", "logical_not", "not", "inv"), "invert"),
    **dict.fromkeys(("multiply", "imul"), "mul"),
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    **{"iadd": "add", "subtract": "sub", "negative": "neg", "absolute": "abs"},
}

# Python's functions that write: into their first argument, every one of them.
_PYTHON_WRITES = frozenset(
    {
        *("iadd", "isub", "imul", "iand", "ior", "ixor", "itruediv", "ifloordiv", "imod", "ipow"),
        *("ilshift", "irshift", "imatmul", "iconcat", "setitem", "delitem"),
    }
)
# Of the other ones, those that call something else, which may write.
_CALLERS = frozenset({"call", "attrgetter", "itemgetter", "methodcaller"})
_OPERATORS = frozenset(name.strip("_") for name in operator.__all__) - _CALLERS
_BUILTINS = (
    *("getattr", "len", "tuple", "list", "bool", "int", "float"),
    *("max", "min", "sum", "abs", "round", "pow", "divmod"),
)

# What ``torch.nn.attention.bias.CausalBias`` asks about SDPA's kernels.
_ABOUT_KERNELS = (
    "SDPAParams",
    "is_flash_attention_available",
    "can_use_flash_attention",
    "can_use_efficient_attention",
)

# Methods without an operator of their name that ask a tensor what it is, cast it, or copy it.
_PLAIN_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size"),
    *("get_device", "type", "new_tensor", "tolist", "as_subclass"),
    *("bool", "byte", "char", "short", "int", "long", "half", "float", "double", "bfloat16", "cfloat", "cdouble"),
    *("__bool__", "__int__", "__float__", "__index__", "__len__", "__contains__"),
    *("split", "unflatten", "norm", "unique", "unique_consecutive", "stft", "istft"),
)
_OF_SHARDS = ("from_local", "redistribute", "to_local", "full_tensor")
"""Methods of DTensors that write nothing."""
_SWITCHES = ("inplace", "max_norm", "out")
"""Parameters of torch's Python functions that make them write: embedding renormalises its table under ``max_norm``."""
_EFFECTS = ("assert", "check", "print", "item", "tolist", "nonzero")
_STATISTICS = ("batch_norm", "instance_norm")
"""Python functions that write statistics, by the mode that they are called in."""
_CALLING = "triplet_margin_with_distance_loss"
"""The Python function that calls one of the user's."""
_DRAWS = ("dropout", "gumbel", "rrelu", "fractional", "attention")
"""In the names of Python functions that draw random numbers."""


@dataclass(frozen=True)
class _Known:
    """A function of torch's or Python's own.

    Attributes:
        name: As torch or Python calls it, operators without their namespace.
        schemas: Of the overloads of its operator; empty if it has none.
        signature: Of a Python function with switches, else None.
        writes_first: Whether it writes to its first argument, where no schema says so.
        writes_any: Whether it may write to each of its arguments.
    """

    name: str
    schemas: tuple[torch.FunctionSchema, ...] = ()
    signature: inspect.Signature | None = None
    writes_first: bool = False
    writes_any: bool = False


def function_name(node: fx.Node) -> str:
    """The function that a node calls, by one name: ``le`` for ``operator.le``, ``torch.less_equal``, ``Tensor.__le__``.

    Empty for anything but a call of Python's or torch's own functions, and for those that give a tensor another shape
    in place: its node has that shape from the start. Other in-place variants lose their underscore too: ask `Mutations`
    first.
    """
    known = _known(node)
    if known is None or _reshapes(known):
        return ""
    name = known.name.strip("_")
    return _SYNONYMS.get(name, name)


def written_nodes(node: fx.Node) -> list[fx.Node]:
    """The argument nodes whose tensors a node writes to; all that it may write to if its function is unknown."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return []
    target = node.target
    if isinstance(target, OpOverload):  # in any namespace: the schema is its author's word
        return _by_schema(node, target._schema)
    if target is flex_attention_operator:
        return []  # Dynamo refuses functions that write to what they capture
    if is_varlen_function(target):
        return []  # its results are new
    known = _known(node)
    if known is None and isinstance(target, OpOverloadPacket):
        known = _Known("", schemas_of(target))
    if known is None or known.writes_any:
        return node.all_input_nodes
    if known.writes_first:
        return _nodes(node.args[:1])
    if known.signature is not None:
        return node.all_input_nodes if _is_switched(node, known.signature) else []
    return _by_schemas(node, known.schemas)


def may_reshape(node: fx.Node) -> bool:
    """Whether a node that writes to a tensor may give it another shape, other strides or another storage."""
    if isinstance(node.target, OpOverload):
        return torch.Tag.inplace_view in node.target.tags
    if node.op == "call_module" or isinstance(node.target, HigherOrderOperator):
        return False  # Dynamo lets none of them
    known = _known(node)
    return known is None or _reshapes(known)


def may_alias(node: fx.Node) -> bool:
    """Whether a node's value may lie where its arguments lie, although its fake value does not say so.

    Dropout that is off returns its argument, and an unknown function may.
    """
    if node.op == "call_module" and node.graph.owning_module is not None:
        module = node.graph.owning_module.get_submodule(str(node.target))
        return "Dropout" in type(module).__name__ or not type(module).__module__.startswith("torch.nn.")
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, OpOverload | OpOverloadPacket | HigherOrderOperator):
        return "dropout" in str(node.target)
    known = _known(node)
    return (known is None and not is_varlen_function(node.target)) or (known is not None and "dropout" in known.name)


def is_varlen_function(target: object) -> bool:
    """Whether a function is flash-attn's own over packed sequences, which a graph may hold as it is."""
    if getattr(target, "__name__", "") != VARLEN_FUNCTION:
        return False
    return any(getattr(sys.modules.get(module), VARLEN_FUNCTION, None) is target for module in _VARLEN_MODULES)


def is_pure(node: fx.Node) -> bool:
    """Whether a node can go if nobody reads its value: it has no effect.

    Random numbers and checks count as effects. So do results whose size depends on data.
    """
    if node.op == "get_attr":
        return True
    known = _known(node)
    if known is None or written_nodes(node) or known.name.strip("_").startswith(_EFFECTS):
        return False
    tags = {tag for schema in known.schemas for tag in _tags(schema.name, schema.overload_name)}
    draws = known.signature is not None and any(part in known.name for part in _DRAWS)
    if draws or torch.Tag.nondeterministic_seeded in tags:
        return False
    sized = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return not any(free_unbacked_symbols(leaf) for leaf in tree_leaves(value_of(node)) if isinstance(leaf, sized))


def _reshapes(known: _Known) -> bool:
    return any(torch.Tag.inplace_view in _tags(schema.name, schema.overload_name) for schema in known.schemas)


def _known(node: fx.Node) -> _Known | None:
    if moves_shards(node):
        return _Known("redistribute")
    if node.op == "call_method":
        value, name = value_of(node.args[0]) if node.args else None, str(node.target)
        # A subclass may have a method of its own by that name.
        own = getattr(type(value), name, None) is getattr(torch.Tensor, name, None)
        return _method(name) if isinstance(value, torch.Tensor) and own else None
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, OpOverload):
        packet = target.overloadpacket
        return _Known(packet.__name__, (target._schema,)) if target.namespace == "aten" else None
    if isinstance(target, OpOverloadPacket):
        name = target.__name__
        return _Known(name, schemas_of(target)) if getattr(torch.ops.aten, name, None) is target else None
    return _functions().get(target) if isinstance(target, Hashable) else None


def moves_shards(node: fx.Node) -> bool:
    """Whether a node makes a DTensor of a local tensor, or the other way round, or places its shards anew."""
    if node.op == "call_method":
        return is_dtensor(value_of(node.args[0]) if node.args else None) and str(node.target) in _OF_SHARDS
    if node.op != "call_function":
        return False
    name, module = (str(getattr(node.target, x, "")) for x in ("__name__", "__module__"))
    # Some versions of torch wrap each of them in a function of Dynamo's.
    return module.startswith("torch.") and (
        name in [f"prim_{method}" for method in _OF_SHARDS]
        or (name == "from_local" and module.startswith("torch.distributed.tensor"))
    )


@cache
def _functions() -> dict[object, _Known]:
    """Everything that is known, by the object that is called."""
    found: dict[object, _Known] = {}
    for name in operator.__all__:
        function = getattr(operator, name)
        if isinstance(function, _C_FUNCTION) and name not in _CALLERS:
            found[function] = _Known(name, writes_first=name in _PYTHON_WRITES)
    found |= {getattr(builtins, name): _Known(name) for name in _BUILTINS}
    found |= {f: _Known(f.__name__) for f in vars(math).values() if isinstance(f, _C_FUNCTION)}
    for name in ("sym_max", "sym_min", "sym_not", "sym_int", "sym_float", "sym_ite", "sym_sqrt", "sym_sum"):
        found |= {getattr(torch, name): _Known(name)} if hasattr(torch, name) else {}
    for name in _ABOUT_KERNELS:
        found |= {getattr(cuda, name): _Known(name)} if hasattr(cuda, name) else {}
    for module in (torch, F, nn_functions, torch.special, torch.linalg, torch.fft):
        for name in dir(module):
            function = getattr(module, name, None)
            if isinstance(function, _C_FUNCTION) and (schemas := _operator(function.__name__)):
                found[function] = _Known(function.__name__, schemas)
    for module, names in ((F, dir(F)), (torch.functional, torch.functional.__all__)):
        for name in names:
            function = getattr(module, name)
            if not isinstance(function, types.FunctionType) or function.__name__ != name:
                continue
            # max_pool1d and its kin are made by boolean_dispatch: one of two functions, by return_indices.
            dispatched = function.__module__ == F.__name__ and function.__globals__ is F.boolean_dispatch.__globals__
            own = function.__globals__ is vars(module) or dispatched
            if own and not name.startswith("__") and not name.endswith("_") and name != _CALLING:
                signature = inspect.signature(function)
                found[function] = _Known(name, signature=signature, writes_any=name in _STATISTICS)
    for name in dir(torch.Tensor):
        known = _method(name)
        if known is not None:
            found[getattr(torch.Tensor, name)] = known
    found |= {function: _Known(function.__name__) for function in vmap_functions}
    return found | ({} if data_of is None else {data_of: _Known("data")})


def _method(name: str) -> _Known | None:
    """A method of plain tensors, if it is torch's own."""
    function = getattr(torch.Tensor, name, None)
    return _method_by_object(name, function) if callable(function) else None


@cache
def _method_by_object(name: str, function: object) -> _Known | None:
    c_implemented = isinstance(function, types.MethodDescriptorType | types.WrapperDescriptorType)
    if not c_implemented and getattr(function, "__globals__", None) is not vars(tensor_methods):
        return None  # put there by somebody else
    plain = name.strip("_")
    if name in _PLAIN_METHODS:
        return _Known(name)
    if name.startswith("__") and name.endswith("__"):
        arithmetic = plain in _OPERATORS or (plain.startswith("r") and plain[1:] in _OPERATORS)
        return _Known(name, writes_first=plain in _PYTHON_WRITES) if arithmetic else None
    return _Known(name, schemas) if c_implemented and (schemas := _operator(name)) else None


def _operator(name: str) -> tuple[torch.FunctionSchema, ...]:
    """The schemas of torch's operator of a name, empty if there is none."""
    packet = None if name.startswith("__") else getattr(torch.ops.aten, name, None)
    return () if packet is None else schemas_of(packet)


@cache
def schemas_of(operator: Any) -> tuple[torch.FunctionSchema, ...]:  # noqa: ANN401 (an OpOverload or a packet)
    """The schemas of an operator's overloads."""
    if isinstance(operator, OpOverload):
        return (operator._schema,)
    return tuple(getattr(operator, name)._schema for name in operator.overloads())


@cache
def _tags(name: str, overload: str) -> tuple[torch.Tag, ...]:
    namespace, _, name = name.partition("::")
    return tuple(getattr(getattr(getattr(torch.ops, namespace), name), overload or "default").tags)


def _by_schema(node: fx.Node, schema: torch.FunctionSchema) -> list[fx.Node]:
    """The arguments that one overload writes; keywords have the names of its schema."""
    passed = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    written = [argument.name for argument in schema.arguments if _writes(argument)]
    return _nodes([passed[name] for name in written if name in passed])


def _by_schemas(node: fx.Node, schemas: tuple[torch.FunctionSchema, ...]) -> list[fx.Node]:
    """The arguments that any overload may write; keywords may have other names than the schema's."""
    keywords, places = {"out"}, set()
    for schema in schemas:
        writes = [(at, argument) for at, argument in enumerate(schema.arguments) if _writes(argument)]
        keywords |= {argument.name for _, argument in writes if argument.kwarg_only}
        places |= {at for at, argument in writes if not argument.kwarg_only}
    written = _nodes([value for name, value in node.kwargs.items() if name in keywords])
    if not places:
        return written
    # A keyword may go by another name than its schema's (input, self): then any argument is meant.
    return _nodes([node.args[at] for at in places]) + written if max(places) < len(node.args) else node.all_input_nodes


def _writes(argument: Any) -> bool:  # noqa: ANN401 (an argument of a schema)
    """Whether a schema's argument is written to. Running statistics are, although old schemas do not say so."""
    written = argument.alias_info is not None and argument.alias_info.is_write
    return written or argument.name.startswith("running_")


def _is_switched(node: fx.Node, signature: inspect.Signature) -> bool:
    """Whether a Python function of torch's is called so that it writes, or in a way that is not understood."""
    try:
        passed = signature.bind(*node.args, **node.kwargs).arguments
    except TypeError:
        return True
    switches = [passed.get(name) for name in _SWITCHES]
    return not all(value is None or value is False for value in switches)  # max_norm=0 is on


def _nodes(values: Any) -> list[fx.Node]:  # noqa: ANN401 (any nest of arguments)
    found: list[fx.Node] = []
    fx.map_arg(values, found.append)
    return found
