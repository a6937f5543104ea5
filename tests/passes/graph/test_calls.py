"""Which function a node calls is decided by the object, and never by a name that anybody may borrow."""

import functools
import inspect
import operator

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from s2o_compile.passes.frontends.eager import scores as score_chain
from s2o_compile.passes.frontends.flex import scalar_functions
from s2o_compile.passes.graph import calls
from s2o_compile.passes.graph.calls import function_name, is_pure, written_nodes
from s2o_compile.passes.masks import index_arithmetic, views
from tests.helpers.capture import rewritten

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


# Operators of a user's own that are called as torch's are, and compute something else.
LIKE_TORCH = {
    "softmax(Tensor x, int dim) -> Tensor": lambda x, dim: (x * x).softmax(dim),
    "matmul(Tensor x, Tensor y) -> Tensor": lambda x, y: 2 * torch.matmul(x, y),
    "tril(Tensor x) -> Tensor": lambda x: x.triu().contiguous(),
    "repeat_interleave(Tensor x, int n, int dim) -> Tensor": lambda x, n, dim: torch.cat([x, -x], dim),
    "transpose(Tensor x, int a, int b) -> Tensor": lambda x, a, b: x.mT.flip(-1).contiguous(),
    "dropout(Tensor x, float p, bool training) -> Tensor": lambda x, p, training: x * 0.5,
    "masked_fill(Tensor x, Tensor m, float fill) -> Tensor": lambda x, m, fill: x.masked_fill(~m.mT, fill),
}
OTHER_LIBRARY = torch.library.Library("s2o_test_like_torch", "DEF")
for _schema, _function in LIKE_TORCH.items():
    OTHER_LIBRARY.define(_schema)
    for _key in ("CompositeExplicitAutograd", "Meta"):
        OTHER_LIBRARY.impl(_schema.partition("(")[0], _function, _key)
OWN = torch.ops.s2o_test_like_torch
sdpa = F.scaled_dot_product_attention
USES = {
    "softmax": lambda q, k, v: OWN.softmax(q @ k.mT / 4, -1) @ v,
    "matmul": lambda q, k, v: (OWN.matmul(q, k.mT) / 4).softmax(-1) @ v,
    "matmul-of-values": lambda q, k, v: OWN.matmul((q @ k.mT / 4).softmax(-1), v),
    "tril": lambda q, k, v: sdpa(q, k, v, attn_mask=OWN.tril(torch.ones(8, 8)) > 0),
    "repeat_interleave": lambda q, k, v: sdpa(q, OWN.repeat_interleave(k[:, :2], 2, 1), v),
    "transpose": lambda q, k, v: (q @ OWN.transpose(k, -2, -1) / 4).softmax(-1) @ v,
    "dropout": lambda q, k, v: OWN.dropout((q @ k.mT / 4).softmax(-1), 0.1, False) @ v,
    "masked_fill": lambda q, k, v: (
        OWN.masked_fill(q @ k.mT, torch.ones(8, 8).tril() > 0, float("-inf")).softmax(-1) @ v
    ),
}


@pytest.mark.parametrize("attend", USES.values(), ids=USES)
def test_borrowed_names_are_not_believed(attend):
    inputs = torch.randn(3, 2, 4, 8, 16)
    rewritten(attend, *inputs.unbind(0))


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
        (F.max_pool1d, (None, 2), False),
        (F.boolean_dispatch, (None,), True),
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


def test_statistics_are_written_and_nothing_is_reshaped():
    for function in (F.batch_norm, F.instance_norm):
        node = node_of(function, None, None, None)
        assert written_nodes(node)
        assert not calls.may_reshape(node)
        assert not calls.may_alias(node)
    assert calls.may_reshape(node_of(print, None))
    assert calls.may_alias(node_of(F.dropout, None, 0.5, False))
    assert calls.may_reshape(node_of("transpose_", None, 0, 1))


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
        if known.signature is None or known.writes_any:
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
