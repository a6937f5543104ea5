"""What tests of transformers' models share."""

import pytest
import torch

import s2o_compile


@pytest.fixture
def prefill():
    """Paths and masks of the calls of a run."""
    with torch.no_grad(), s2o_compile.record() as recording:
        yield lambda: [(call.path, call.mask) for call in recording.calls]
