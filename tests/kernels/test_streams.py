"""Slices of a call on two streams that always join."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from s2o_compile.kernels import streams


class Stream:
    """What a stream waits for, and nothing else."""

    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@pytest.mark.parametrize("fails", [False, True])
def test_the_other_stream_starts_behind_the_current_one_and_joins_it(fails, monkeypatch):
    current, other = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(streams, "_stream_of", lambda *_: other)
    with (
        pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext(),
        streams.side_by_side(torch.device("cuda"), 3) as turn,
    ):
        assert turn(1) is other
        assert not {turn(0), turn(2)} & {other}
        assert other.waited == [current]
        assert not current.waited
        1 / (not fails)
    assert current.waited == [other]


@pytest.mark.parametrize(("device", "pieces"), [("cpu", 3), ("cuda", 1), ("cuda", 3)])
def test_one_piece_and_a_cpu_and_a_capture_need_no_stream(device, pieces, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(streams, "_stream_of", None)
    with streams.side_by_side(torch.device(device), pieces) as turn, turn(1):
        pass
    assert streams.numbers_of_other(torch.device(device), pieces) == (0, 0)


def test_a_thread_has_one_event_beside_its_stream(monkeypatch):
    recorded = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(streams, "_stream_of", lambda *_: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=recorded.append, cuda_event=7))
    streams._event_of.cache_clear()
    for _ in range(2):
        assert streams.numbers_of_other(torch.device("cuda"), 2) == (5, 7)
    assert [stream.cuda_stream for stream in recorded] == [5]
    streams._event_of.cache_clear()
