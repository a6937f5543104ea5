"""Which function a node calls is decided by the object, and never by a name that anybody may borrow."""

import functools
import inspect
import operator

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from s2o_compile.passes import (
    calls,
    index_arithmetic,
    scalar_functions,
    score_chain,
    views,
)
from s2o_compile.passes.calls import function_name, is_pure, written_nodes
from tests.capture import rewritten

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore")]

NAMES = sorted(
    {
        *(
            "softmax",
            "matmul",
            "bmm",
            "mm",
            "baddbmm",
            "tril",
            "triu",
            "where",
            "masked_fill",
            "cat",
            "repeat_interleave",
        ),
        *("nan_to_num", "dropout", "logical_not", "log", "abs", "isnan", "full", "ones", "zeros", "stack", "pad"),
        *index_arithmetic._HANDLERS,
        *views.VIEWS,
        *score_chain._FLOORS,
        *scalar_functions._ELEMENTWISE,
    }
    - {"and", "or", "not"}
)
LIBRARY = torch.library.Library("s2o_test_borrowed", "DEF")
for _name in NAMES:
    LIBRARY.define(f"{_name}(Tensor x, Tensor? y=None, int dim=-1) -> Tensor")
BORROWED = torch.ops.s2o_test_borrowed


def implement(name, function):
    """Lets an operator of the user's namespace compute something."""
    library = torch.library.Library("s2o_test_borrowed", "IMPL")
    for key in ("CompositeExplicitAutograd", "Meta"):
        library.impl(name, function, key)
    return library


def node_of(target, *args, value=None, **kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(4, 4) if value is None else value
    args = tuple(x if arg is None else arg for arg in args)
    if isinstance(target, str):
        return graph.call_method(target, args, kwargs)
    return graph.call_function(target, args, kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_of_a_users_own_has_no_name(name):
    packet = getattr(BORROWED, name)
    assert function_name(node_of(packet, None)) == function_name(node_of(packet.default, None)) == ""


WRAPPED = (F.softmax, torch.matmul, torch.tril, torch.einsum, operator.le, torch.Tensor.masked_fill)


@pytest.mark.parametrize("function", WRAPPED, ids=lambda function: function.__name__)
def test_a_function_that_wraps_torchs_has_no_name(function):
    @functools.wraps(function)
    def wrapped(*args):
        return function(*args)

    wrapped.__name__, wrapped.__module__ = function.__name__, getattr(function, "__module__", "torch") or "torch"
    node = node_of(wrapped, None)
    assert function_name(node) == ""
    assert written_nodes(node)
    assert not is_pure(node)


def test_a_method_that_somebody_replaced_has_no_name(monkeypatch):
    assert function_name(node_of("softmax", None, -1)) == "softmax"
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: self)
    monkeypatch.setattr(torch.Tensor, "split", lambda self, size: (self,))
    for name in ("softmax", "split"):
        node = node_of(name, None, 1)
        assert function_name(node) == ""
        assert written_nodes(node)


def test_a_method_of_something_else_has_no_name():
    assert function_name(node_of("softmax", None, value=object())) == ""


def squared(x, y=None, dim=-1):
    return (x * x).softmax(dim)


def softmax(q, k, v):
    return BORROWED.softmax(q @ k.mT / 4) @ v


def matmul(q, k, v):
    return (BORROWED.matmul(q, k.mT) / 4).softmax(-1) @ v


def tril(q, k, v):
    mask = BORROWED.tril(torch.ones(q.shape[2], k.shape[2])) > 0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def arange(q, k, v):
    index = BORROWED.arange(torch.arange(k.shape[2]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=index <= index[:, None])


def repeated(q, k, v):
    k = BORROWED.repeat_interleave(k[:, :2])
    return F.scaled_dot_product_attention(q, k, v)


def transposed(q, k, v):
    return (q @ BORROWED.transpose(k) / 4).softmax(-1) @ v


def dropout(q, k, v):
    return BORROWED.dropout((q @ k.mT / 4).softmax(-1)) @ v


USES = {
    softmax: squared,
    matmul: lambda x, y, dim=-1: 2 * torch.matmul(x, y),
    tril: lambda x, y=None, dim=-1: x.triu().contiguous(),
    arange: lambda x, y=None, dim=-1: x.flip(0),
    repeated: lambda x, y=None, dim=-1: torch.cat([x, -x], 1),
    transposed: lambda x, y=None, dim=-1: x.mT.flip(-1).contiguous(),
    dropout: lambda x, y=None, dim=-1: x * 0.5,
}
_OPERATORS = {"repeated": "repeat_interleave", "transposed": "transpose"}


@pytest.mark.parametrize("attend", USES, ids=lambda attend: attend.__name__)
def test_borrowed_names_are_not_believed(attend):
    name = _OPERATORS.get(attend.__name__, attend.__name__)
    library = implement(name, USES[attend])
    try:
        rewritten(attend, *torch.randn(3, 2, 4, 8, 16).unbind(0))
    finally:
        library._destroy()


@pytest.mark.parametrize(
    ("target", "args", "written"),
    [
        (torch.softmax, (None, -1), False),
        (torch.ops.aten.softmax.int, (None, -1), False),
        (torch.ops.aten.relu_, (None,), True),
        (torch.ops.aten.add.out, (None, 1), False),  # where out= is missing there is nothing to write to
        (F.relu, (None,), False),
        (F.relu, (None, True), True),
        (F.dropout, (None, 0.5, False, True), True),
        (F.dropout, (None, 0.5, False), False),
        (F.embedding, (0, None, None, 1.0), True),
        (F.batch_norm, (None, None, None), True),
        (print, (None,), True),
        (operator.setitem, (None, 0, 1), True),
        (operator.call, (print, None), True),
        (getattr, (None, "mT"), False),
        ("add_", (None, 1), True),
        ("apply_", (None, abs), True),
    ],
)
def test_what_is_written(target, args, written):
    assert bool(written_nodes(node_of(target, *args))) == written


def test_random_numbers_are_kept():
    assert is_pure(node_of(torch.exp, None))
    for target in (torch.bernoulli, F.dropout, torch.rand_like, F.gumbel_softmax):
        assert not is_pure(node_of(target, None)), target


def tensors_for(parameters):
    """Arguments for a Python function of torch's, as far as ones will do."""
    given = {}
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            given[name] = torch.rand(2, 4, 4)
    return given


def test_torchs_python_functions_write_nothing_unless_a_switch_is_on():
    """What is known of them is tried on all of them that take tensors of ones."""
    tried = 0
    for function, known in calls._functions().items():
        if known.signature is None:
            continue
        given = tensors_for(known.signature.parameters)
        before = {name: x.clone() for name, x in given.items()}
        try:
            function(**given)
        except Exception:
            continue
        tried += 1
        for name, x in given.items():
            torch.testing.assert_close(x, before[name], msg=f"{function.__name__} writes {name}")
    assert tried > 40
