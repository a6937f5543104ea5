"""Tasks of long context: what is asked, what fits, how answers and losses are judged, and the table."""

import dataclasses
import json
import re
from random import Random

import pytest
import torch
from torch import nn

import s2o_compile
from s2o_compile import EvaluationError, OptionError, S2OConfig, TaskScores
from s2o_compile.quality.tasks import evaluate as module
from s2o_compile.quality.tasks.samples import COMMON, FILLER, HOPS, NEEDLES, TASKS, compounds, sentences
from s2o_compile.quality.tasks.scores import TaskScore
from tests.helpers.tiny import Characters, tiny_language_model

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
CONFIG = S2OConfig(tau=4.0, min_seq_len=0, segment_len=128, inner_backend="eager")
EXACT = dataclasses.replace(CONFIG, tau=0.0)
LENGTH = 1600


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def sample_of(name, amount=400, seed=0, filler=FILLER):
    return TASKS[name](Random(seed), filler)(amount)


class TestSamples:
    @pytest.mark.parametrize(("name", "count"), [("needle", 1), ("needles", NEEDLES)])
    def test_needles_are_hidden_once_and_asked_for(self, name, count):
        sample = sample_of(name)
        assert len(sample.expected) == count
        text, question = sample.prompt.rsplit("\n", 1)
        hidden = dict(re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", text))
        assert sorted(hidden.values()) == sorted(sample.expected)
        asked = sorted(hidden, key=question.index)
        assert tuple(hidden[key] for key in asked) == sample.expected
        assert not any(number in question for number in sample.expected)
        assert re.findall(r"\d+", sample.answer) == list(sample.expected)

    def test_needles_lie_anywhere(self):
        depths = []
        for seed in range(40):
            sample = sample_of("needle", seed=seed)
            depths.append(sample.prompt.index(sample.expected[0]) / len(sample.prompt))
        assert min(depths) < 0.2
        assert max(depths) > 0.8

    def test_variables_hold_one_number(self):
        sample = sample_of("variables")
        example, text = sample.prompt.split("\n\n")
        text, question = text.rsplit("\n", 1)
        chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)
        names = tuple(name for name, _ in chain)
        assert names == sample.expected
        assert len(names) == HOPS + 1
        assert [value for _, value in chain] == [re.search(r"the value (\d+)", question)[1], *names[:-1]]
        assert sample.answer.split() == list(names)
        assert not set(re.findall(r"VAR (\w+)", example)) & set(names)

    @pytest.mark.parametrize("amount", [0, 100, 3000])
    def test_common_words_stand_most_often(self, amount):
        sample = sample_of("words", amount)
        entries = re.findall(r"\d+\. (\S+)", sample.prompt)
        counts = {word: entries.count(word) for word in set(entries)}
        common = {counts[word] for word in sample.expected}
        others = [count for word, count in counts.items() if word not in sample.expected]
        assert len(sample.expected) == COMMON
        assert len(entries) == max(amount, 2 * COMMON)
        assert len(common) == 1
        assert max(others, default=0) <= min(common) / (10 if amount == 3000 else 2)
        assert re.findall(r"\d\. (\S+)", sample.answer) == list(sample.expected)

    def test_words_are_a_thousand(self):
        assert len(set(compounds())) == 1024

    @pytest.mark.parametrize("name", TASKS)
    def test_a_seed_decides(self, name):
        assert sample_of(name) == sample_of(name)
        assert sample_of(name) != sample_of(name, seed=1)
        assert sorted(sample_of(name).expected) == sorted(sample_of(name, amount=50).expected)

    def test_a_text_is_the_filler(self):
        text = "The first sentence. A second one?\nAnd the last line"
        units = sentences(text)
        assert units == ["The first sentence.", "A second one?", "And the last line"]
        prompt = sample_of("needle", 40, filler=units).prompt
        assert prompt.count("A second one?") in (13, 14)
        assert "grass" not in prompt


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_fills_its_length(name):
    tokenizer, cpu = Characters(), torch.device("cpu")
    question = module._question(tokenizer, name, 5000, Random(1), FILLER, cpu)
    total = question.whole.ids.shape[1] + module.SPARE_TOKENS
    assert 5000 - 80 < total <= 5000
    assert torch.equal(question.whole.ids[:, : question.prompt.ids.shape[1]], question.prompt.ids)
    assert (
        Characters().decode(question.whole.ids[0].tolist(), skip_special_tokens=True).endswith(question.sample.answer)
    )


@pytest.mark.slow
def test_losses_answers_and_scores():
    model, tokenizer = tiny_llama(), Characters()
    found = s2o_compile.evaluate_tasks(model, tokenizer, [LENGTH], CONFIG, tasks=["needle"], samples=2)
    (score,) = found.scores
    assert (score.task, score.length, score.samples) == ("needle", LENGTH, 2)
    assert 0.1 < score.density < 1
    answers, dense, sparse = [], [], []
    fast = s2o_compile.optimize(model, CONFIG)
    for number in range(2):
        question = module._question(
            tokenizer, "needle", LENGTH, Random(f"0 needle {LENGTH} {number}"), FILLER, torch.device("cpu")
        )
        prompt, whole = question.prompt.ids, question.whole.ids
        limit = whole.shape[1] - prompt.shape[1] + module.SPARE_TOKENS
        with torch.no_grad():
            for one, losses in ((model, dense), (fast, sparse)):
                logits = one(whole).logits[0, prompt.shape[1] - 1 : -1].double()
                losses.append(nn.functional.cross_entropy(logits, whole[0, prompt.shape[1] :]).item())
                ids = one.generate(prompt, max_new_tokens=limit, do_sample=False, attention_mask=prompt.ne(-1))
                answers.append(ids[0, prompt.shape[1] :].tolist())
    assert tokenizer.decoded == [answers[at] for at in (1, 0, 3, 2)]
    assert score.loss_dense == pytest.approx(sum(dense) / 2, rel=1e-5)
    assert score.loss_s2o == pytest.approx(sum(sparse) / 2, rel=1e-5)
    assert score.loss_s2o != score.loss_dense


@pytest.mark.parametrize(
    ("answers", "shares"),
    [
        (["{0}, {1}, {2} and {3}."] * 2, (1.0, 1.0)),
        (["{0}, {1}", "none"], (0.5, 0.0)),
        (["9{0} {1}0 {2}x {3}", "{3},{2}"], (0.25, 0.5)),
    ],
    ids=["all", "half-and-none", "whole-words"],
)
def test_an_answer_scores_by_its_strings(answers, shares, monkeypatch):
    said = iter(answers)
    tokenizer = Characters()

    def score(self, question, model):
        tokenizer.decode = lambda *_, **__: next(said).format(*question.sample.expected)
        return scored(self, question, model)

    scored = module._Judge._score
    monkeypatch.setattr(module._Judge, "_score", score)
    found = s2o_compile.evaluate_tasks(tiny_llama(), tokenizer, [LENGTH], CONFIG, tasks=["needles"], samples=1)
    assert (found.scores[0].score_s2o, found.scores[0].score_dense) == shares


def test_an_answer_may_end_at_once(monkeypatch):
    model, tokenizer = tiny_llama(), Characters()
    first = []

    def next_token(self, *args):
        best, cache = original(self, *args)
        first.append(best.item())
        return torch.zeros_like(best), cache

    original = module.LogitsReader.next_token
    monkeypatch.setattr(module.LogitsReader, "next_token", next_token)
    s2o_compile.evaluate_tasks(model, tokenizer, [LENGTH], CONFIG, tasks=["needle"], samples=1)
    assert tokenizer.decoded == [[0], [0]]


@pytest.mark.slow
def test_tau_zero_is_dense_and_a_seed_decides():
    model, names = tiny_llama(), ("variables", "words")
    steps = []

    class Step:
        def __init__(self, name):
            steps.append(name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    first, again, other = (
        s2o_compile.evaluate_tasks(
            model, Characters(), lengths, EXACT, tasks=asked, samples=1, seed=seed, progress=Step
        )
        for asked, lengths, seed in ((names, (LENGTH, 1500), 0), (names[1:], [1500], 0), (names[1:], [1500], 1))
    )
    assert first.scores[-1:] == again.scores
    assert again.scores != other.scores
    asked = [(name, length) for name in names for length in (LENGTH, 1500)]
    assert [(score.task, score.length) for score in first.scores] == asked
    assert steps[:4] == [f"{name}, {length} tokens" for name, length in asked]
    for score in first.scores:
        assert score.loss_s2o == pytest.approx(score.loss_dense, abs=1e-5)
        assert score.score_s2o == score.score_dense
        assert score.density >= 1


def scores():
    def score(task, length, dense, s2o):
        return TaskScore(
            task=task,
            length=length,
            samples=4,
            score_dense=dense,
            score_s2o=s2o,
            loss_dense=0.25,
            loss_s2o=0.5,
            density=s2o / 2,
        )

    found = (score("needle", 100, 1.0, 0.5), score("needle", 200, 1.0, 0.25), score("words", 100, 0.5, 0.0))
    return TaskScores(model="tiny", device="cpu", config=CONFIG, seed=3, scores=found)


def test_table_and_means():
    lines = [line.split() for line in str(scores()).splitlines()]
    assert " ".join(lines[0]) == "task tokens answers dense S2O loss dense S2O density"
    assert lines[2] == ["needle", "100", "100%", "50%", "0.250", "0.500", "0.250"]
    assert lines[5] == ["mean", "100", "75%", "25%", "0.250", "0.500", "0.125"]
    assert lines[6][:4] == ["mean", "200", "100%", "25%"]
    assert [score.samples for score in scores().means()] == [8, 4]


class TestJSON:
    def test_reads_back_equal(self):
        assert TaskScores.from_json(scores().to_json()) == scores()
        assert json.loads(scores().to_json())["kind"] == "tasks"

    @pytest.mark.parametrize(
        "text",
        ["no json", "[]", '{"format": 1}', '{"format": 1, "kind": "tasks"}', '{"format": 1, "kind": "tasks", "x": 1}'],
    )
    def test_anything_else_is_refused(self, text):
        with pytest.raises(OptionError, match="expected the JSON of `s2o evaluate --tasks --json` in format 1, got"):
            TaskScores.from_json(text)

    @pytest.mark.parametrize("changed", [{"format": 2}, {"kind": "evaluation"}])
    def test_another_format_is_refused(self, changed):
        text = json.dumps(json.loads(scores().to_json()) | changed)
        with pytest.raises(OptionError, match="expected the JSON of `s2o evaluate --tasks --json`"):
            TaskScores.from_json(text)

    def test_an_evaluation_is_none(self):
        with pytest.raises(OptionError, match="expected the JSON of `s2o evaluate --tasks --json`"):
            TaskScores.from_json('{"format": 1, "sites": []}')


TINY = tiny_llama()
WRONG = {
    "no-lengths": ({"lengths": ()}, OptionError, r"expected lengths in tokens, such as \(4096, 8192\), got none"),
    "text-length": ({"lengths": ("4k",)}, OptionError, "expected lengths in tokens.* got '4k'"),
    "zero": ({"lengths": [0]}, OptionError, "expected lengths in tokens.* got 0"),
    "one-length": ({"lengths": "4"}, OptionError, "got the text '4'"),
    "unknown": ({"tasks": ["neddle"]}, OptionError, "unknown task 'neddle'.*Did you mean 'needle'"),
    "no-task": ({"tasks": ()}, OptionError, "unknown task ''.*Choose one of them"),
    "samples": ({"samples": 0}, OptionError, "expected samples, an integer of at least 1, got 0"),
    "seed": ({"seed": 0.5}, OptionError, "expected seed, an integer of at least 0, got 0.5"),
    "text": ({"text": " \n"}, OptionError, "expected a text with words, got"),
    "short": ({"lengths": [300]}, EvaluationError, r"at least \d+ tokens for the task 'needle', got 300"),
    "dense": ({"config": S2OConfig(min_seq_len=1601)}, EvaluationError, "at least 1601 tokens, got 15.*run dense"),
    "no-generate": ({"model": tiny_language_model()}, EvaluationError, "answers by generate.*TinyLanguageModel"),
    "training": ({"model": tiny_llama().train()}, EvaluationError, "eval mode"),
}


@pytest.mark.parametrize(("changed", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_asked(changed, error, message):
    given = {"model": TINY, "tokenizer": Characters(), "lengths": [LENGTH], "config": CONFIG} | changed
    with pytest.raises(error, match="^evaluate_tasks: .*" + message):
        s2o_compile.evaluate_tasks(given.pop("model"), given.pop("tokenizer"), **given)


def test_nothing_sparse():
    config = dataclasses.replace(CONFIG, dense_heads={f"model.layers.{n}.self_attn": (0, 1) for n in range(2)})
    with pytest.raises(EvaluationError, match="evaluate_tasks: expected some attention to run sparse, got none of 2"):
        s2o_compile.evaluate_tasks(TINY, Characters(), [LENGTH], config, samples=1)
