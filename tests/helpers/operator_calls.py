"""``s2o::attention`` as tests call it: a case's inputs, every length sparse and exact unless told otherwise."""

import torch

from tests.conftest import CUDA

OPERATOR = torch.ops.s2o.attention.default
DEVICES = ["cpu", CUDA]


def call(inputs, **options):
    """The operator on a case's inputs; S2O at every length unless told otherwise."""
    return OPERATOR(*inputs.tensors, inputs.mask.key_mask, **arguments(inputs, **options))


def arguments(inputs, **options):
    mask = inputs.mask
    offset = mask.offset if mask.causal else None
    given = {"causal": mask.causal, "causal_offset": offset, "window": mask.window, "scale": inputs.scale}
    return {**given, "min_seq_len": 0, "tau": 0.0, **options}
