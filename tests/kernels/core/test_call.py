"""Calls: where their launches go."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from s2o_compile.kernels.core.call import on_device


@pytest.mark.parametrize("index", [-1, 0], ids=["cpu", "accelerator"])
def test_a_tensor_of_no_cuda_device_asks_for_none(index, monkeypatch):
    """Other accelerators count from 0, too: a torch without CUDA would raise."""
    monkeypatch.setattr(torch.cuda, "current_device", None)
    with on_device(SimpleNamespace(is_cuda=False, get_device=lambda: index)):
        pass


@pytest.mark.parametrize("index", [0, 1])
def test_launches_go_to_the_device_of_a_tensor(index, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x) or contextlib.nullcontext())
    x = SimpleNamespace(is_cuda=True, get_device=lambda: index)
    with on_device(x):
        assert entered == [x] * index
