"""Dense against S2O on a model and its tokens: every figure is compared with its definition."""

import dataclasses
import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import Evaluation, EvaluationError, OptionError, S2OConfig
from s2o_compile.kernels import planner as rank
from s2o_compile.kernels.core import plan
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.observe import observe_attention
from s2o_compile.quality.needles import hide_needles
from tests.helpers.tiny import tiny_language_model, tiny_model, tiny_tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
CONFIG = S2OConfig(tau=4.0, min_seq_len=0, segment_len=128, inner_backend="eager")
EXACT = dataclasses.replace(CONFIG, tau=0.0)


@pytest.fixture(autouse=True)
def short_lists(monkeypatch):
    """The smallest chunks, so that a few hundred keys are enough to stop early."""
    for module in (plan, rank):
        monkeypatch.setattr(module, "default_chunk_len", lambda _: 128)


@torch.no_grad()
def both_logits(model, ids, config=CONFIG):
    """Logits [B, N, V] in float64, dense and S2O, and the sparse calls."""
    calls = []
    with observe_attention(calls.append):
        sparse = s2o_compile.optimize(model, config)(ids)
    return model(ids).double(), sparse.double(), calls


def losses(logits, ids):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def relative(difference, power, dims):
    return (difference.sum(dims) / power.sum(dims)).sqrt()


def test_next_token_figures():
    model, ids = tiny_language_model(), tiny_tokens(batch=2)
    found = s2o_compile.evaluate(model, ids, CONFIG, needles=False)
    dense, sparse, _ = both_logits(model, ids)
    p, q = (x[:, :-1].log_softmax(-1) for x in (dense, sparse))
    assert found.tokens == 2 * 699
    assert found.lengths == (700, 700)
    assert found.loss_dense == pytest.approx(losses(dense, ids).mean().item(), rel=1e-5)
    assert found.loss_s2o == pytest.approx(losses(sparse, ids).mean().item(), rel=1e-5)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-2)
    assert found.kl > 1e-6
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item() < 1
    assert found.needles is None


def test_figures_of_a_site():
    model, ids = tiny_language_model(), tiny_tokens(batch=2)
    found = s2o_compile.evaluate(model, ids, CONFIG, needles=False)
    assert [site.name for site in found.sites] == ["layers.0", "layers.1"]
    assert found.exact_sites == {}
    for site, call in zip(found.sites, both_logits(model, ids)[2], strict=True):
        exact = call.exact().double()
        difference, power = (x.square().sum(-1) for x in (call.result.output.double() - exact, exact))
        tiles = [slice(first, first + TILE_LEN) for first in range(0, 700, TILE_LEN)]
        assert site.head_error == pytest.approx(relative(difference, power, (0, 2)).tolist(), rel=1e-4)
        by_tile = [relative(difference[..., tile], power[..., tile], -1) for tile in tiles]
        assert site.worst_tile == pytest.approx(torch.stack(by_tile).max().item(), rel=1e-4)
        assert site.worst_row == pytest.approx((difference / power).sqrt().max().item(), rel=1e-4)
        assert 0 < site.error < site.worst_head < site.worst_tile < site.worst_row
        assert site.head_density == pytest.approx(call.densities(call.result).tolist())
        assert 0.3 < site.density < 1
        assert site.tile_keys == pytest.approx(call.result.computed.double().mean((0, 1)).tolist(), abs=0.05)
        assert site.tile_visible == tuple(float(min(tile.stop, 700)) for tile in tiles)


def test_batches_count_by_their_tokens():
    model, long, short = tiny_language_model(), tiny_tokens(700), tiny_tokens(300)
    joint, *alone = (s2o_compile.evaluate(model, x, CONFIG, needles=False) for x in ([long, short], long, short))
    assert (joint.tokens, joint.lengths) == (699 + 299, (700, 300))
    assert joint.loss_s2o == pytest.approx(sum(one.loss_s2o * one.tokens for one in alone) / joint.tokens)
    for site, *parts in zip(joint.sites, *(one.sites for one in alone), strict=True):
        assert site.worst_row == max(part.worst_row for part in parts)
        areas = 700 * 701, 300 * 301
        pairs = sum(part.density * area for part, area in zip(parts, areas, strict=True))
        assert site.density == pytest.approx(pairs / sum(areas))
        first, second = (part.tile_keys for part in parts)
        mean = [(a + b) / 2 for a, b in zip(first, second, strict=False)]
        assert site.tile_keys == pytest.approx((*mean, *first[len(second) :]), abs=0.1)
        assert parts[0].head_error[0] != site.head_error[0]


def test_tau_zero_is_exact():
    found = s2o_compile.evaluate(tiny_language_model(), tiny_tokens(), EXACT, needles=False)
    assert all(site.worst_row < 1e-5 and site.density > 1 for site in found.sites)
    assert found.top1_agreement == 1
    assert abs(found.loss_difference) < 1e-6
    assert abs(found.kl) < 1e-6


def test_other_taus_are_measured_on_the_same_inputs():
    model, ids = tiny_language_model(), tiny_tokens()
    found = s2o_compile.evaluate(model, ids, CONFIG, needles=False, taus=(0.0, 0.3, 4.0))
    for site in found.sites:
        exact, middle, same = site.curve
        assert (exact.tau, middle.tau, same.tau) == (0.0, 0.3, 4.0)
        assert exact.error < 1e-5 < middle.error < same.error == site.error
        assert exact.density > middle.density > same.density == site.density
    other = s2o_compile.evaluate(model, ids, dataclasses.replace(CONFIG, tau=0.3, error=None), needles=False)
    assert other.sites[0].error == found.sites[0].curve[1].error  # the first layer has the same inputs
    assert other.sites[1].error != found.sites[1].curve[1].error


def test_padding_does_not_count():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model, ids = transformers.LlamaForCausalLM(config).eval(), tiny_tokens(400, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :100] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = s2o_compile.evaluate(model, batch, EXACT, needles=False)
    with torch.no_grad():
        logits = model(**batch).logits.double()
    real = torch.cat([losses(logits[:1], ids[:1]), losses(logits[1:, 100:], ids[1:, 100:])])
    assert found.tokens == len(real) == 399 + 299
    assert found.loss_dense == pytest.approx(real.mean().item(), rel=1e-5)
    assert found.loss_s2o == pytest.approx(found.loss_dense, rel=1e-5)
    with pytest.raises(EvaluationError, match=r"without padding, to hide needles in.*needles=False"):
        s2o_compile.evaluate(model, {name: x.repeat(1, 5) for name, x in batch.items()}, EXACT)

    names = [site.name for site in s2o_compile.explain(model, ids, config=CONFIG).sites]
    assert [site.name for site in found.sites] == names == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    marked = dataclasses.replace(CONFIG, dense_heads={names[0]: (0, 1), names[1]: (1,)})
    found = s2o_compile.evaluate(model, ids, marked, needles=False)
    assert found.exact_sites == {names[0]: "ran dense"}
    (site,) = found.sites
    assert site.name == names[1]
    assert max(site.head_error[2:]) < 1e-5 < min(site.head_error[:2])


class TestJSON:
    def test_reads_back_equal(self):
        config = dataclasses.replace(CONFIG, dense_heads={"layers.0": (1,)})
        found = s2o_compile.evaluate(tiny_language_model(), tiny_tokens(1920), config, taus=(1.0,))
        assert found.needles is not None
        assert Evaluation.from_json(found.to_json()) == found
        assert json.loads(found.to_json())["config"]["dense_heads"] == {"layers.0": [1]}

    @pytest.mark.parametrize("text", ["no json", "[]", '{"format": 1}', '{"format": 2}', '{"format": 1, "config": {}}'])
    def test_anything_else_is_refused(self, text):
        with pytest.raises(OptionError, match="expected the JSON of `s2o evaluate --json` in format 1, got"):
            Evaluation.from_json(text)


def test_table():
    found = s2o_compile.evaluate(tiny_language_model(), tiny_tokens(1920), CONFIG)
    lines = str(found).splitlines()[1:]  # behind the header
    assert lines[0].split() == ["site", "density", "error", "worst", "head", "worst", "tile", "worst", "row"]
    assert lines[2].startswith(f"layers.0  {found.sites[0].density:.3f}    {found.sites[0].error:.2%}")
    assert lines[4] == (
        f"2 of 2 attention sites ran sparse; mean density {found.density:.3f}, mean error {found.error:.2%}"
    )
    assert lines[5].startswith(f"next token, 1919 of them: loss {found.loss_dense:.4f} dense, {found.loss_s2o:.4f} S2O")
    assert lines[6].startswith("24 needles of 40 tokens: loss on their repeats")


def test_every_step_is_announced():
    steps = []

    @contextmanager
    def progress(name):
        steps.append(name)
        yield

    s2o_compile.evaluate(tiny_language_model(), tiny_tokens(1920), CONFIG, progress=progress)
    names = "batch 1 of 1", "batch 1 of 1, with needles"
    assert steps == [f"{name}: {how}" for name in names for how in ("S2O", "dense")]


class Recall(nn.Module):
    """Looks up what followed the present token when it stood before: one attention, nothing learned."""

    def __init__(self, vocabulary=4096, dim=64):
        super().__init__()
        signs = torch.randint(2, (vocabulary, dim), generator=torch.Generator().manual_seed(0))
        self.register_buffer("table", 2.0 * signs - 1)

    def forward(self, ids):
        value = self.table[ids]
        key = nn.functional.pad(value, (0, 0, 1, -1))  # of the token before
        found = scaled_dot_product_attention(4 * value[:, None], key[:, None], value[:, None], is_causal=True)
        return found[:, 0] @ self.table.T / 4


class TestOldNames:
    """Needles were called planted strings."""

    def test_the_keyword(self):
        with pytest.warns(DeprecationWarning, match="planted is now called needles") as caught:
            found = s2o_compile.evaluate(tiny_language_model(), tiny_tokens(), CONFIG, planted=False)
        assert found.needles is None
        assert [Path(warning.filename).name for warning in caught] == ["test_evaluate.py"]

    def test_the_flag(self, monkeypatch):
        pytest.importorskip("typer")
        from typer.testing import CliRunner

        from s2o_compile.cli import evaluate as command
        from s2o_compile.cli import main as cli

        monkeypatch.setattr(command, "load", lambda *_: (tiny_language_model(), None))
        monkeypatch.setattr(command, "tokenize", lambda _, __, tokens, ___: tiny_tokens(tokens))
        with pytest.warns(DeprecationWarning, match="--no-planted is now called --no-needles"):
            done = CliRunner().invoke(cli.app, ["evaluate", "--tokens", "1920", "--no-planted", "--device", "cpu"])
        assert done.exit_code == 0
        assert "next token" in done.stdout
        assert "needles" not in done.stdout

    def test_the_field(self):
        found = s2o_compile.evaluate(tiny_language_model(), tiny_tokens(1920), CONFIG)
        with pytest.warns(DeprecationWarning, match=r"Evaluation\.planted is now called needles"):
            assert found.planted is found.needles is not None
        fields = json.loads(found.to_json())
        recall = fields.pop("needles")
        recall |= {"strings": recall.pop("count"), "string_len": recall.pop("length")}
        with pytest.warns(DeprecationWarning, match="planted is now called needles"):
            assert Evaluation.from_json(json.dumps(fields | {"planted": recall})) == found
        with pytest.warns(DeprecationWarning, match="planted is now called needles"):
            assert Evaluation.from_json(json.dumps(fields | {"planted": None})).needles is None


class TestNeedles:
    def test_needles_stand_twice(self):
        ids = tiny_tokens(2400, batch=2)
        text = hide_needles(ids, seed=3, needles=5, needle_len=40)
        assert ((text.ids != ids).sum(1) <= 2 * 5 * 40).all()
        assert (text.first.sum(1) == 5 * 39).all()
        assert (text.repeated.sum(1) == 5 * 39).all()
        assert not text.first[:, 1200:].any()
        assert not text.repeated[:, :1200].any()
        for row in range(2):
            first, repeated = (text.ids[row][marks[row]].view(5, 39) for marks in (text.first, text.repeated))
            assert sorted(first.tolist()) == sorted(repeated.tolist())
            assert not torch.equal(first, repeated)  # in another order
        assert not torch.equal(text.ids[0], text.ids[1])

    def test_a_seed_decides(self):
        ids = tiny_tokens(1920)
        same, other = (hide_needles(ids, seed=seed) for seed in (0, 1))
        assert torch.equal(hide_needles(ids, seed=0).ids, same.ids)
        assert not torch.equal(other.ids, same.ids)

    def test_what_sparse_attention_does_not_reach_is_lost(self):
        model, ids = Recall().eval(), tiny_tokens(2048, vocabulary=4096)
        lost = dataclasses.replace(CONFIG, tau=1e6, error=None, ranking="mean_query")
        exact, sparse = (s2o_compile.evaluate(model, ids, config).needles for config in (EXACT, lost))
        assert (exact.count, exact.length) == (24, 40)
        assert exact.loss_s2o == pytest.approx(exact.loss_dense, rel=1e-4)
        assert exact.loss_dense == sparse.loss_dense < sparse.loss_s2o - 1
        assert sparse.loss_s2o < sparse.loss_first

    def test_too_short(self):
        message = "at least 1920 tokens, which hold 24 needles of 40 twice, got 1919.*needles=False"
        with pytest.raises(EvaluationError, match=message):
            s2o_compile.evaluate(tiny_language_model(), tiny_tokens(1919), CONFIG)


class NoLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny_language_model()

    def forward(self, ids):
        return (self.model(ids),)


class Pooled(NoLogits):
    def forward(self, ids):
        return self.model(ids).mean(1)


class NoAttention(NoLogits):
    def forward(self, ids):
        return self.model.head(self.model.tokens(ids))


class Biased(NoLogits):
    def forward(self, ids):
        x = self.model.tokens(ids)[:, None]
        bias = torch.arange(ids.shape[1]) * 0.01
        return self.model.head(scaled_dot_product_attention(x, x, x, bias[None, :].expand(ids.shape[1], -1))[:, 0])


def compiled(model):
    model.compile(backend="eager")
    return model


TINY = tiny_language_model()
WRONG = {
    "compiled": (torch.compile(TINY, backend="eager"), tiny_tokens(), "got a compiled one. Give the original"),
    "compiled-in-place": (compiled(tiny_language_model()), tiny_tokens(), "got a compiled one. Give the original"),
    "function": (lambda ids: ids, tiny_tokens(), "uncompiled torch.nn.Module, got function"),
    "training": (tiny_language_model().train(), tiny_tokens(), r"eval mode, got one in training mode. Call model.eval"),
    "tuple": (NoLogits().eval(), tiny_tokens(), r"logits \[1, 700, vocabulary\].* got tuple. Wrap the model"),
    "pooled": (Pooled().eval(), tiny_tokens(), r"logits \[1, 700, vocabulary\].* got \(1, 50\). Wrap the model"),
    "no-attention": (NoAttention().eval(), tiny_tokens(), "to run sparse, got none of 0: no attention was captured"),
    "unproven": (Biased().eval(), tiny_tokens(), r"to run sparse, got none of 1: .*explain\(model, \*inputs\)"),
    "nothing": (TINY, [], "at least one batch of token ids, got none"),
    "floats": (tiny_model(), torch.randn(1, 700, 32), r"token ids int64 \[B, N\].*got torch.float32 \(1, 700, 32\)"),
    "no-ids": (TINY, {"attention_mask": tiny_tokens()}, "mappings with input_ids, got none"),
    "4-D-mask": (
        TINY,
        {"input_ids": tiny_tokens(), "attention_mask": torch.ones(1, 1, 700, 700)},
        r"an attention_mask \(1, 700\), as input_ids, got \(1, 1, 700, 700\)",
    ),
}


@pytest.mark.filterwarnings("ignore:none of 1 attentions could be rewritten")
@pytest.mark.parametrize(("model", "batches", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_evaluated(model, batches, message):
    with pytest.raises(EvaluationError, match="^evaluate: expected .*" + message):
        s2o_compile.evaluate(model, batches, CONFIG, needles=False)


@pytest.mark.parametrize(
    ("config", "length", "message"),
    [
        (S2OConfig(min_seq_len=701), 700, "701 tokens, got 700 in batch 2: all attention would .*min_seq_len=128"),
        (CONFIG, 127, "128 tokens, the queries of one tile, got 127 in batch 2: shorter attention runs dense"),
    ],
    ids=["own", "tile"],
)
def test_batches_that_would_run_dense(config, length, message):
    with pytest.raises(EvaluationError, match=f"evaluate: expected batches of at least {message}"):
        s2o_compile.evaluate(TINY, [tiny_tokens(2000), tiny_tokens(length)], config, needles=False)


def test_auto_takes_the_crossover_of_the_device():
    with pytest.raises(EvaluationError, match=r"at least 4096 tokens, got 700 in batch 1.*min_seq_len='auto' on cpu"):
        s2o_compile.evaluate(TINY, tiny_tokens(), needles=False)


def test_a_model_that_calls_the_operator_itself():
    class Direct(NoLogits):
        def forward(self, ids):
            x = self.model.tokens(ids)[:, None]
            y = s2o_compile.attention(x, x, x, causal=True, config=CONFIG)
            return self.model.head(y[:, 0])

    found = s2o_compile.evaluate(Direct().eval(), tiny_tokens(), CONFIG, needles=False)
    assert [site.name for site in found.sites] == [""]
    assert found.kl > 1e-6
    assert "s2o_compile.attention" in str(found)


DOCS = Path(__file__).parents[2] / "docs" / "evaluate.md"


def test_the_documentation_runs(capsys):
    snippets = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    snippets = [snippet for snippet in snippets if "evaluate_tasks" not in snippet]  # in tasks/test_tasks.py
    assert len(snippets) == 2
    model, ids = tiny_language_model(), tiny_tokens(1920)
    names = {"torch": torch, "model": model, "batches": [ids], "ids": ids, "fast": s2o_compile.optimize(model, CONFIG)}
    for snippet in snippets:
        exec(snippet, names)
    said = capsys.readouterr().out
    assert str(names["evaluation"]) in said
    assert said.count("layers.1") == 2
