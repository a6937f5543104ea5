"""Modules that a model reaches by other ways than its submodules: hooks, bound methods, containers and closures."""

import functools
from collections import OrderedDict, defaultdict, deque, namedtuple

import pytest
import torch
from torch import nn

import s2o_compile
from s2o_compile import S2OConfig
from tests.helpers.tiny import TinyAttention, tiny_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
Held = namedtuple("Held", "drop")
WAYS = {
    "partial": lambda model: functools.partial(model.drop),
    "partial of a method": lambda model: functools.partial(model.helper),
    "method": lambda model: model.drop.forward,
    "closure": lambda model: lambda x: model.drop(x),
    "closure of a method": lambda model: (lambda helper: lambda x: helper(x))(model.helper),
    "list": lambda model: [model.drop],
    "tuple": lambda model: (model.drop,),
    "named tuple": lambda model: Held(model.drop),
    "deque": lambda model: deque([model.drop], maxlen=3),
    "dict": lambda model: {"drop": model.drop},
    "ordered": lambda model: OrderedDict(drop=model.drop),
    "default": lambda model: defaultdict(list, drop=model.drop),
}


class Dropped(nn.Module):
    """Attention and a dropout that it reaches past its submodules."""

    def __init__(self, way):
        super().__init__()
        self.attention, self.drop = TinyAttention(), nn.Dropout(0.5)
        object.__setattr__(self, "way", WAYS[way](self))

    def helper(self, x):
        return self.drop(x)

    def forward(self, x):
        x, way = self.attention(x), self.way
        if isinstance(way, dict):
            way = way["drop"]
        elif isinstance(way, (list, tuple, deque)):
            way = way[0]
        return way(x)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_mode_reaches_modules_past_the_submodules(way):
    model, x = Dropped(way).train(), tiny_input()
    fast = s2o_compile.optimize(model, EXACT).eval()
    found = fast(x)
    assert model.drop.training
    torch.testing.assert_close(found, model.eval()(x))


class Measured(nn.Module):
    """A hook bound to the module sets what its forward uses."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, torch.ones(())
        self.register_forward_pre_hook(self.measure)

    def measure(self, _, inputs):
        self.gain = 1 / inputs[0].abs().max()

    def forward(self, x):
        return self.gain * (x if self.inner is None else self.inner(x))


@pytest.mark.parametrize("inner", [None, nn.Identity()], ids=["leaf", "parent"])
@torch.no_grad()
def test_a_bound_hook_is_bound_to_the_copy(inner):
    model = nn.Sequential(TinyAttention(), Measured(inner)).eval()
    fast = s2o_compile.optimize(model, EXACT)
    for factor in (1, 3):
        x = factor * tiny_input()
        found = fast(x)
        assert model[1].gain == 1, "the original was measured"
        torch.testing.assert_close(found, model(x))
        model[1].gain = torch.ones(())


class Slotted(nn.Module):
    __slots__ = ("factor",)

    def __init__(self):
        super().__init__()
        self.factor = 2.0

    def forward(self, x):
        return self.factor * x


class Table(nn.Module, dict):
    __hash__ = nn.Module.__hash__

    def forward(self, x):
        return x + self["offset"]


@torch.no_grad()
def test_modules_that_hold_more_than_attributes_are_shared():
    table = Table()
    table["offset"] = 0.5
    model, x = nn.Sequential(TinyAttention(), Slotted(), table).eval(), tiny_input()
    fast = s2o_compile.optimize(model, EXACT)
    torch.testing.assert_close(fast(x), model(x))
    assert s2o_compile.status(fast).sparse == 1
    assert fast[1] is model[1]
    assert fast[2] is table


def test_nothing_is_made_anew_for_nothing():
    from s2o_compile.capture.rebound import rebound

    def outer(filled):
        def empty():
            return filled, unfilled

        if filled > 3:
            unfilled = 4
        return empty

    rows = [1], (1,), Held(1), deque([1]), {"a": 1}, OrderedDict(a=1)
    for value in (*rows, functools.partial(len, "a"), outer(3), outer(4)):
        assert rebound(value, {id(nn.Linear): nn.Identity()}) is value
