"""Sequences of the recall benchmark have the answers that a perfect look-up gives; the model reads and learns them."""

import importlib
from dataclasses import replace

import pytest
import torch


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's own modules: scripts import each other from their folder."""
    monkeypatch.syspath_prepend("benchmarks")
    return {name: importlib.import_module(f"recall_{name}") for name in ("data", "decoder", "training", "model")}


@pytest.fixture
def data(modules):
    return modules["data"]


def random_text():
    return torch.randint(256, (4096,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def make_source(data, seed=0, letters=16, symbols=64):
    return data.Source(data.Vocabulary(letters=letters, symbols=symbols), random_text(), seed=seed)


def look_up(ids, place):
    """The token behind the one earlier occurrence of the token at ``place``."""
    (earlier,) = (ids[:place] == ids[place]).nonzero().flatten().tolist()
    return ids[earlier + 1]


KINDS = {
    "training": lambda source: source.training(3, 256, longest=1024),
    "far": lambda source: source.far(3, 256, count=8),
    "far-copying": lambda source: source.far(3, 256, count=4, string=16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_up_finds_every_answer(data, kind):
    for seed in range(8):
        batch = KINDS[kind](make_source(data, seed))
        assert batch.ids.shape == batch.positions.shape == batch.answers.shape == batch.text.shape == (3, 256)
        assert (batch.ids[:, 0] == 16).all()
        assert (batch.answers.sum(-1) == batch.answers[0].sum()).all()
        assert batch.answers.any()
        for row, place in batch.answers.nonzero().tolist():
            assert look_up(batch.ids[row], place) == batch.ids[row, place + 1] > 16
        assert not (batch.answers & batch.text).any()
        assert torch.equal(batch.text[:, :-1], batch.ids[:, 1:] < 16)
        assert not batch.text[:, -1].any()


@pytest.mark.parametrize(("count", "string"), [(8, 2), (4, 16)])
def test_far_answers_are_far(data, count, string):
    batch = make_source(data).far(3, 256, count=count, string=string)
    assert batch.answers.sum(-1).tolist() == [count * (string - 1)] * 3
    for row, place in batch.answers.nonzero().tolist():
        assert place >= 192
        assert (batch.ids[row, :128] == batch.ids[row, place]).sum() == 1
    assert torch.equal(batch.positions, torch.arange(256).expand(3, 256))


def test_skips_keep_strings_together(data):
    source, longest = make_source(data), 4096
    steps = []
    for _ in range(16):
        batch = source.training(4, 256, longest=longest)
        assert batch.positions.min() >= 0
        assert batch.positions.max() < longest
        step = batch.positions.diff(dim=-1)
        assert (step[:, torch.arange(255) % 32 != 31] == 1).all()
        steps.append(step.amax(-1))
    steps = torch.cat(steps)
    assert 0.2 < (steps == 1).float().mean() < 0.8  # half of the rows skip nothing
    assert steps.max() > longest // 4


def test_the_seed_decides(data):
    first, same, other = (make_source(data, seed).training(2, 128, longest=512) for seed in (0, 0, 1))
    assert all(torch.equal(getattr(first, name), getattr(same, name)) for name in ("ids", "positions", "answers"))
    assert first.ids.shape == other.ids.shape
    assert not torch.equal(first.ids, other.ids)


def test_text_is_split(data):
    known, unknown = data.library_text("cpu")
    assert known.dtype == torch.uint8
    assert len(known) > 8 * len(unknown) > 32768 * 8


def test_orthogonal_updates(modules):
    for shape in ((2, 8, 32), (2, 32, 8)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        sizes = torch.linalg.svdvals(modules["training"].orthogonal(x))
        assert sizes.min() > 0.5
        assert sizes.max() < 1.5


def test_a_perfect_model_recalls_everything(modules):
    class Perfect(torch.nn.Module):
        def forward(self, ids):
            logits = torch.zeros(*ids.shape, 128)
            logits.scatter_(2, ids.roll(-1, 1)[..., None], 1.0)  # the next token
            return logits

    source = make_source(modules["data"])
    read = modules["model"].read(Perfect(), [source.far(1, 256, count=8) for _ in range(3)])
    assert (read["answers"], read["recall"]) == (24, 1.0)


def test_a_model_that_learns_and_is_judged(modules, capsys):
    """A few steps, all stages; the parts of a run fit together. A model learns to look up in minutes, not here."""
    settings = replace(modules["decoder"].TINY, tokens=128, width=32, hidden=64, warmup=1)
    known = random_text()
    training = modules["training"].Training(settings, (128, 1024), known, seed=0)
    assert training.stages == [(32,), (128, 1024)]
    rows = modules["model"].Rows(None)
    training.run(0.02, 0.98, rows)
    assert rows[-1]["steps"] >= 1
    assert rows[-1]["recall"].startswith(("32: 0.", "128: 0."))
    assert all(weight.isfinite().all() for weight in training.model.parameters())

    configs = {
        f"tau {tau}": modules["model"].S2OConfig(min_seq_len=1, inner_backend="eager", tau=tau) for tau in (0.0, 1.0)
    }
    source = modules["data"].Source(settings.vocabulary, known, seed=2)
    modules["model"].judge(training.model.eval(), source, 1024, 1, configs, rows)
    found = {(row["section"], row.get("quality")): row for row in rows}
    assert not [row for row in rows if "failed" in row]
    exact, early = found["recall", "tau 0.0"], found["recall", "tau 1.0"]
    assert exact["error"] < 1e-5 < early["error"]
    assert exact["lost"] == 0.0
    assert early["density"] < exact["density"]
