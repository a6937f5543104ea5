"""The order of the passes: every step is timed, and S2O_DUMP shows what each of them changed."""

import logging
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import s2o_compile
from s2o_compile.errors import DumpError
from s2o_compile.passes import dump, pipeline
from tests.helpers.capture import EXACT, heads

SDPA = "torch._C._nn.scaled_dot_product_attention("
STEPS = [name for name, _ in pipeline.STEPS]


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def captured(function, *inputs):
    """The Dynamo graph of a function, untouched by the passes."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    (gm,) = graphs
    return gm


def attention_graph():
    return captured(attend, heads(), heads(), heads())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "not there" / "dumps"
    monkeypatch.setenv(dump.VARIABLE, str(folder))
    return folder


def test_every_step_is_timed_and_logged(caplog):
    seconds = {}
    with caplog.at_level(logging.INFO, logger="s2o_compile.passes.pipeline"):
        pipeline.run(attention_graph(), EXACT, step_seconds=seconds)
    assert list(seconds) == STEPS
    assert all(spent >= 0 for spent in seconds.values())
    (message,) = (message for message in caplog.messages if "attentions rewritten" in message)
    assert all(name in message for name in STEPS)


def test_recordings_hold_the_seconds_of_each_step():
    with s2o_compile.record() as recording, torch.no_grad():
        compiled = torch.compile(attend, backend="s2o", options={"s2o.inner_backend": "eager"})
        for length in (40, 48):
            torch._dynamo.reset()
            compiled(*(heads(length=length) for _ in range(3)))
    assert recording.report.graphs == 2
    assert list(recording.step_seconds) == STEPS
    assert recording.report.pass_seconds == recording.pass_seconds == sum(recording.step_seconds.values()) > 0


def test_nothing_is_written_without_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv(dump.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    pipeline.run(attention_graph(), EXACT)
    monkeypatch.setenv(dump.VARIABLE, "")
    pipeline.run(attention_graph(), EXACT)
    assert not list(tmp_path.iterdir())


def test_the_files_hold_the_graph_before_and_after_a_step(folder):
    gm = attention_graph()
    before = gm.print_readable(print_output=False)
    pipeline.run(gm, EXACT)
    step = STEPS.index("rewrite") + 1
    names = [f"graph000_step{step}_rewrite_{when}.txt" for when in ("after", "before")]
    assert sorted(path.name for path in folder.iterdir()) == names  # no other step changes this graph
    after, kept = ((folder / name).read_text() for name in names)
    assert kept == before
    assert SDPA in kept
    assert "s2o.attention" not in kept
    assert after == gm.print_readable(print_output=False)
    assert "s2o.attention" in after
    assert SDPA not in after


def test_steps_that_open_and_close_a_call_show_what_they_did(folder):
    layer = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x = torch.randn(2, 40, 64)
    gm = captured(lambda x: layer(x, x, x, need_weights=False)[0], x)
    assert all(record.rewritten for record in pipeline.run(gm, EXACT))
    texts = {path.stem.split("_", 2)[2]: path.read_text() for path in folder.iterdir()}
    assert sorted(texts) == [f"{step}_{when}" for step in ("close", "open", "rewrite") for when in ("after", "before")]
    calls = "nn.functional.multi_head_attention_forward(", "aten.scaled_dot_product_attention.default("
    shows = {name: tuple(call in text for call in calls) for name, text in texts.items()}
    assert shows == {
        "open_before": (True, False),
        "open_after": (True, True),
        "rewrite_before": (True, True),
        "rewrite_after": (True, False),
        "close_before": (True, False),
        "close_after": (False, False),
    }


def test_graphs_are_numbered_and_files_of_earlier_runs_stay(folder):
    folder.mkdir(parents=True)
    earlier = folder / "graph001_step4_rewrite_before.txt"
    earlier.write_text("earlier")
    for _ in range(2):
        pipeline.run(attention_graph(), EXACT)
    pipeline.run(captured(lambda x: x + 1, torch.ones(3)), EXACT)  # no step changes it
    assert {path.name[:8] for path in folder.iterdir()} == {"graph000", "graph001", "graph002"}
    assert earlier.read_text() == "earlier"
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize("broken", ["a file", "under a file"])
def test_a_folder_that_cannot_be_made_is_named(broken, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    given = str(file if broken == "a file" else file / "below")
    monkeypatch.setenv(dump.VARIABLE, given)
    gm = attention_graph()
    before = gm.print_readable(print_output=False)
    with pytest.raises(DumpError, match=r"expected a folder that can be made and written to, got .* Name another") as e:
        pipeline.run(gm, EXACT)
    assert str(e.value).startswith(f"S2O_DUMP={given}: ")
    assert gm.print_readable(print_output=False) == before


def test_a_folder_that_cannot_be_written_to_is_named(folder, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DumpError, match="No space left"):
        pipeline.run(attention_graph(), EXACT)


def test_a_compilation_that_fails_for_the_folder_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(dump.VARIABLE, str(tmp_path / "file"))
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match=r"S2O_DUMP=.*expected a folder"):
        torch.compile(attend, backend="s2o", options={"s2o.inner_backend": "eager"})(heads(), heads(), heads())
