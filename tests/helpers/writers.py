"""Ways to write into a tensor in place, and attentions into which one of them is put at every place it can hurt.

A pass that overlooks a write reads keys, scores, probabilities or masks as they were before it, or as they are after
it. Each way here is one that a pass may overlook: by keyword, by module, in a list, through a view, behind a schema.
"""

import inspect
import operator
from functools import partial

import numpy
import torch
from torch import nn
from torch.nn import functional as F

INF = float("-inf")

# Operators of a user's own. What they write is said by their schemas alone.
LIBRARY = torch.library.Library("s2o_test_writers", "DEF")
LIBRARY.define("double(Tensor(a!) x) -> ()")
LIBRARY.define("flip(Tensor(a!) x) -> ()")
LIBRARY.define("double_behind(float factor, *, Tensor(a!) x) -> ()")
LIBRARY.define("double_all(Tensor(a!)[] xs) -> ()")
LIBRARY.define("double_both(Tensor(a!) x, *, Tensor(b!) y) -> ()")
LIBRARY.define("double_and_sum(Tensor(a!) x) -> Tensor")
for key in ("CompositeExplicitAutograd", "Meta"):
    LIBRARY.impl("double", lambda x: _nothing(x.mul_(2)), key)
    LIBRARY.impl("flip", lambda x: _nothing(x.logical_not_()), key)
    LIBRARY.impl("double_behind", lambda factor, *, x: _nothing(x.mul_(factor)), key)
    LIBRARY.impl("double_all", lambda xs: _nothing([x.mul_(2) for x in xs]), key)
    LIBRARY.impl("double_both", lambda x, *, y: _nothing((x.mul_(2), y.mul_(2))), key)
    LIBRARY.impl("double_and_sum", lambda x: x.mul_(2).sum(), key)
OWN = torch.ops.s2o_test_writers


def _nothing(written):
    return None


@torch.compiler.allow_in_graph
def leaf(x):
    """A Python function that Dynamo puts into the graph as it is."""
    x.mul_(2)
    return x.shape[0]


@torch.compiler.allow_in_graph
def leaf_not(x):
    x.logical_not_()
    return x.shape[0]


def numpy_product(x):
    array = x.detach().numpy()
    numpy.multiply(array, 2, out=array)


def numpy_statement(x):
    array = x.detach().numpy()
    array *= 2


def statement(x):
    x *= 2


def item(x):
    x[..., :1] = 0.5


def under_vmap(x):
    torch.vmap(lambda row: row.mul_(2))(x)


def renormalised(x, max_norm=0.1):
    F.embedding(torch.zeros(1, dtype=torch.long), x.flatten(0, -2), max_norm=max_norm)


def statistics(x):
    row = x.flatten()
    F.batch_norm(torch.ones(2, row.shape[0]), row, torch.ones_like(row), training=True)


def statistics_of_torch(x):
    row = x.flatten()
    torch.batch_norm(torch.ones(2, row.shape[0]), None, None, row, torch.ones_like(row), True, 0.5, 1e-5, False)


def checkpointed(x):
    torch.utils.checkpoint.checkpoint(lambda x: x.mul_(2), x, use_reentrant=False)


WRITERS = {
    "mul_": lambda x: x.mul_(2),
    "statement": statement,
    "item": item,
    "copy_": lambda x: x.copy_(x * 2),
    "masked_fill_": lambda x: x.masked_fill_(x > 0, 0.1),
    "index_put_": lambda x: x.index_put_((torch.tensor([0]),), torch.tensor(0.5)),
    "index_fill_": lambda x: x.index_fill_(-1, torch.tensor([0]), 0.5),
    "method-of-the-class": lambda x: torch.Tensor.mul_(x, 2),
    "dunder": lambda x: x.__imul__(2),
    "relu_": torch.relu_,
    "relu_-by-keyword": lambda x: torch.relu_(input=x),
    "init": lambda x: nn.init.constant_(x, 0.5),
    "view": lambda x: x.view(-1)[:2].mul_(3),
    "transposed": lambda x: x.mT.mul_(2),
    "detached": lambda x: x.detach().mul_(2),
    "data": lambda x: x.data.mul_(2),
    "split": lambda x: [part.mul_(2) for part in x.split(1)],
    "out": lambda x: torch.mul(x, 2, out=x),
    "out-of-another": lambda x: torch.full_like(x, 0.25).sin_() is torch.clamp(x * 2, max=1, out=x),
    "out-pair": lambda x: torch.sort(x * 2, -1, out=(x, torch.empty_like(x, dtype=torch.long))),
    "out-overload": lambda x: torch.ops.aten.mul.out(x, x, out=x),
    "out-packet": lambda x: torch.ops.aten.mul(x, x, out=x),
    "normalize-out": lambda x: F.normalize(x * 1, dim=-1, out=x),
    "foreach": lambda x: torch._foreach_mul_([x], 2.0),
    "foreach-of-views": lambda x: torch._foreach_add_(list(x.unbind(0)), 1.0),
    "foreach-of-a-tuple": lambda x: torch._foreach_mul_(x.split(1), 2.0),
    "foreach-copy": lambda x: torch._foreach_copy_([x], [x * 2]),
    "custom-packet": lambda x: OWN.double(x),
    "custom-overload": lambda x: OWN.double.default(x),
    "custom-keyword": lambda x: OWN.double(x=x),
    "custom-behind": lambda x: OWN.double_behind(3.0, x=x),
    "custom-both": lambda x: OWN.double_both(x, y=torch.ones(2)),
    "custom-other": lambda x: OWN.double_both(torch.ones(2), y=x),
    "custom-list": lambda x: OWN.double_all([x]),
    "custom-list-overload": lambda x: OWN.double_all.default([x]),
    "custom-that-returns": lambda x: OWN.double_and_sum(x),
    "leaf": leaf,
    "numpy-out": numpy_product,
    "numpy-statement": numpy_statement,
    "vmap": under_vmap,
    "embedding-max-norm": renormalised,
    "embedding-max-norm-0": partial(renormalised, max_norm=0),
    "embedding-bag-max-norm": lambda x: F.embedding_bag(
        torch.zeros(1, 1, dtype=torch.long), x.flatten(0, -2), max_norm=0.0
    ),
    "dropout-that-is-off": lambda x: F.dropout(x, 0.5, False).mul_(2),
    "nn.Dropout-that-is-off": lambda x: nn.Dropout().eval()(x).add_(1),
    "dlpack": lambda x: torch.from_dlpack(torch.to_dlpack(x)).mul_(2),
    "batch-norm": statistics,
    "batch-norm-of-torch": statistics_of_torch,
    "checkpoint": checkpointed,
}
"""By name, functions that change a floating tensor of two dimensions or more, and return nothing of use."""

_REQUIRED = {"threshold": (0.1, 0.2), "dropout1d": None, "dropout2d": None, "dropout3d": None}
for name in dir(F):
    function = getattr(F, name)
    arguments = _REQUIRED.get(name, ())
    if inspect.isfunction(function) and arguments is not None and not name.startswith("_"):
        parameters = inspect.signature(function).parameters
        if "inplace" in parameters:
            off = {"training": False} if "training" in parameters else {}
            WRITERS[f"F.{name}"] = lambda x, f=function, a=arguments, o=off: f(x, *a, inplace=True, **o)
for module in (nn.ReLU, nn.ReLU6, nn.ELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Hardtanh, nn.Mish, nn.CELU):
    WRITERS[f"nn.{module.__name__}"] = module(inplace=True)


BOOL_WRITERS = {
    "not_": lambda x: x.logical_not_(),
    "item": lambda x: x[..., :1].logical_not_(),
    "fill_": lambda x: x.fill_(True),
    "or": lambda x: torch.logical_or(x, x.flip(-1), out=x),
    "statement": lambda x: operator.ixor(x, x.flip(-1)),
    "copy": lambda x: torch._foreach_copy_([x], [~x]),
    "custom": lambda x: OWN.flip(x),
    "numpy": lambda x: numpy.logical_not(array := x.numpy(), out=array),
    "leaf": leaf_not,
}
"""The same for bool tensors."""

INTEGER_WRITERS = {
    "add_": lambda x: x.add_(3),
    "statement": statement,
    "item": lambda x: x[..., :1].fill_(3),
    "foreach": lambda x: torch._foreach_add_([x], 2),
    "out": lambda x: torch.add(x, 1, out=x),
    "flip": lambda x: x.copy_(x.flip(-1)),
    "custom": lambda x: OWN.double(x),
}
"""And for tensors of positions."""


def causal(q, k):
    return torch.arange(k.shape[-2]) <= torch.arange(q.shape[-2])[:, None] + (k.shape[-2] - q.shape[-2])


def scores(write, q, k, v):
    s = q @ k.mT / 4
    write(s)
    return s.softmax(-1) @ v


def masked_scores(write, q, k, v):
    s = (q @ k.mT / 4).masked_fill(~causal(q, k), INF)
    write(s)
    return s.softmax(-1) @ v


def product(write, q, k, v):
    s = q @ k.mT
    write(s)
    return (s / 4 + torch.zeros(q.shape[-2], k.shape[-2]).masked_fill(~causal(q, k), INF)).softmax(-1) @ v


def queries(write, q, k, v):
    s = q @ k.mT / 4
    write(q)
    return s.softmax(-1) @ v


def keys(write, q, k, v):
    s = q @ k.mT / 4
    write(k)
    return s.softmax(-1) @ v


def probabilities(write, q, k, v):
    p = (q @ k.mT / 4).softmax(-1)
    write(p)
    return p @ v


def repeated_keys(write, q, k, v):
    few, more = k[:, :1] * 1.0, v * 1.0
    many = few.expand(-1, q.shape[1], -1, -1).contiguous()
    write(few)
    return F.scaled_dot_product_attention(q, many, more, is_causal=True)


def repeated_values(write, q, k, v):
    few = v[:, :2] * 1.0
    many = few.repeat_interleave(q.shape[1] // 2, 1)
    write(few)
    return F.scaled_dot_product_attention(q, k, many)


def additive_mask(write, q, k, v):
    mask = torch.zeros(q.shape[-2], k.shape[-2]).masked_fill(~causal(q, k), INF)
    write(mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def additive_mask_later(write, q, k, v):
    mask = torch.zeros(q.shape[-2], k.shape[-2]).masked_fill(~causal(q, k), -1e30)
    s = q @ k.mT + mask
    write(mask)
    return s.softmax(-1) @ v


def two_sites(write, q, k, v):
    mask = torch.zeros(q.shape[-2], k.shape[-2]).masked_fill(~causal(q, k), -1e30)
    first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    write(mask)
    return first + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def factor(write, q, k, v):
    scale = torch.full((q.shape[1], 1, 1), 0.25)
    s = q @ k.mT
    s = s * scale
    write(scale)
    return s.softmax(-1) @ v


def sinks(write, q, k, v):
    sink = torch.linspace(0, 1, q.shape[1]).view(-1, 1)
    s = q @ k.mT / 4
    joined = torch.cat([s, sink[None, :, :, None].expand(q.shape[0], -1, s.shape[2], -1)], -1)
    write(sink)
    return joined.softmax(-1)[..., :-1] @ v


PLACES = (
    *(scores, masked_scores, product, queries, keys, probabilities, repeated_keys, repeated_values),
    *(additive_mask, additive_mask_later, two_sites, factor, sinks),
)
"""Attentions of q, k, v [B, H, N, D] that let a function write at one place."""
