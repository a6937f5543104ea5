"""A case as tests call it: through ``s2o::attention`` or the public function, or an executor beside the definition."""

import torch

import s2o_compile
from s2o_compile.kernels import reference as definition
from tests.conftest import CUDA, assert_close, move_plan

OPERATOR = torch.ops.s2o.attention.default
DEVICES = ["cpu", CUDA]


def described(inputs, **options):
    """What a case says beside its tensors, as keywords of the operator and of ``s2o_compile.attention``."""
    mask = inputs.mask
    return {
        "causal": mask.causal,
        "causal_offset": mask.offset if mask.causal else None,
        "window": mask.window,
        "attention_chunk": mask.attention_chunk,
        "scale": inputs.scale,
        "softcap": inputs.softcap,
        "fully_masked": inputs.fully_masked,
        **options,
    }


def arguments(inputs, **options):
    """The operator's keywords: S2O at every length, and exact, unless told otherwise."""
    return described(inputs, **{"min_seq_len": 0, "tau": 0.0, **options})


def call(inputs, **options):
    """The operator on a case's inputs, with ``arguments``."""
    return OPERATOR(*inputs.tensors, inputs.mask.key_mask, inputs.sinks, **arguments(inputs, **options))


def public(inputs, **options):
    """``s2o_compile.attention`` on a case's inputs."""
    others = {"key_mask": inputs.mask.key_mask, "sinks": inputs.sinks}
    return s2o_compile.attention(*inputs.tensors, **others, **described(inputs, **options))


def define(inputs, plan, tau):
    """What the definition makes of a plan, in float64 on the CPU."""
    wide = inputs.to("cpu").to(torch.float64)
    return definition.attend(wide.call, move_plan(plan, "cpu"), tau)


def assert_like_definition(executor, inputs, plan, tau):
    """The executor's result, which is that of the definition over the same plan."""
    actual = executor.attend(inputs.call, plan, tau)
    expected = define(inputs, plan, tau)
    assert actual.output.dtype == inputs.query.dtype
    assert actual.lse.dtype == torch.float32
    assert actual.computed.tolist() == expected.computed.tolist()
    assert_close(actual, expected, inputs)
    return actual
