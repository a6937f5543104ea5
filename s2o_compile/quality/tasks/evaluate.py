"""``evaluate_tasks``: a model solves tasks of long context densely and through S2O."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from s2o_compile.api import Watch, watched
from s2o_compile.capture.compiled_copy import compiled_copy
from s2o_compile.config import S2OConfig, config_or_default, unknown_name
from s2o_compile.errors import EvaluationError, OptionError
from s2o_compile.kernels.support.arguments import as_integer, shown
from s2o_compile.kernels.support.torch_compat import dtype_of
from s2o_compile.quality.batches import Progress, TokenBatch, check_lengths, check_model, nothing_sparse
from s2o_compile.quality.evaluate import device_name, model_name
from s2o_compile.quality.logits import LogitsReader
from s2o_compile.quality.tasks.samples import FILLER, TASKS, Sample, sentences
from s2o_compile.quality.tasks.scores import TaskScore, TaskScores
from s2o_compile.recording import record

CALLER = "evaluate_tasks"

SAMPLES = 4
"""Questions of a task at a length, by default."""

SPARE_TOKENS = 16
"""Tokens that an answer may be longer than the expected one."""


@torch.no_grad()
def evaluate_tasks(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    lengths: Iterable[int] = (4096,),
    config: S2OConfig | None = None,
    *,
    tasks: Iterable[str] = tuple(TASKS),
    samples: int = SAMPLES,
    seed: int = 0,
    text: str | None = None,
    progress: Progress | None = None,
) -> TaskScores:
    """Let a causal language model solve tasks in the manner of RULER, densely and through S2O, and compare.

    The tasks are "needle" (a number hidden in a text), "needles" (four numbers), "variables" (assignments that are
    followed) and "words" (the most common words of a list). A prompt is as long as its length allows, the answer
    included. Each question is judged twice. The model's own greedy answer scores by the share of the expected strings
    that stand in it as whole words: its prompt is read through S2O, its tokens attend densely, as in ``generate()`` of
    an optimized model. And the expected answer is read behind the prompt, all of it through S2O, for its loss.

    Each prompt is read four times, twice densely and twice through S2O. Nothing is compiled behind the passes. Dynamo
    is reset: code compiled before is compiled anew at its next call. The same seed asks the same questions.

    Args:
        model: A causal model of transformers in eval mode, not compiled.
        tokenizer: Its tokenizer: called with a text, it returns an object with ``input_ids``, a list of int. It has
            ``decode``.
        lengths: Tokens of a prompt with its answer, one or more.
        config: Quality and implementation; None for the defaults.
        tasks: Names of tasks.
        samples: Questions of a task at a length.
        seed: Seed of the questions.
        text: Filler between what is hidden; None for plain sentences. A text that is too short is repeated.
        progress: Called with the name of every step; returns a context manager around it.

    Raises:
        OptionError: No such task, or a length, a number of samples, a seed, a text or a configuration that is none.
        EvaluationError: Nothing would run sparse, a length has no room for a question, or the model cannot be used.
    """
    config, progress = config_or_default(config, CALLER), progress or nullcontext
    check_model(CALLER, model)
    _check_generates(model)
    asked, wanted = _checked_options(lengths, tasks, samples, seed, text)
    filler = FILLER if text is None else sentences(text)
    device = next(model.parameters()).device
    questions = {
        (name, length): [
            _question(tokenizer, name, length, Random(f"{seed} {name} {length} {number}"), filler, device)
            for number in range(samples)
        ]
        for name in wanted
        for length in asked
    }
    batches = [question.whole for group in questions.values() for question in group]
    prompts = [question.prompt for group in questions.values() for question in group]
    check_lengths(CALLER, prompts, config, dtype_of(model))
    scores = []
    with watched(config) as watch, LogitsReader(CALLER, model, batches[0]) as reader:
        judge = _Judge(model, watch, reader, tokenizer)
        for (name, length), group in questions.items():
            with progress(f"{name}, {length} tokens"):
                figures, sampled = zip(*(judge.of(question) for question in group), strict=True)
            densities = [density for one in sampled for density in one]
            score_dense, score_s2o, loss_dense, loss_s2o = (
                sum(values) / samples for values in zip(*figures, strict=True)
            )
            scores.append(
                TaskScore(
                    task=name,
                    length=length,
                    samples=samples,
                    score_dense=score_dense,
                    score_s2o=score_s2o,
                    loss_dense=loss_dense,
                    loss_s2o=loss_s2o,
                    density=sum(densities) / len(densities),
                )
            )
    return TaskScores(
        model=model_name(model), device=device_name(device), config=config, seed=seed, scores=tuple(scores)
    )


@dataclass(frozen=True, kw_only=True)
class Question:
    """A sample in tokens.

    Attributes:
        sample: Its text.
        prompt: Ids [1, P].
        whole: Ids [1, P + A], the expected answer behind the prompt.
    """

    sample: Sample
    prompt: TokenBatch
    whole: TokenBatch

    @property
    def answer_len(self) -> int:
        """Tokens of the expected answer."""
        return self.whole.ids.shape[1] - self.prompt.ids.shape[1]


class _Judge:
    def __init__(self, model: Any, watch: Watch, reader: LogitsReader, tokenizer: Any) -> None:  # noqa: ANN401
        self._model, self._watch, self._reader, self._tokenizer = model, watch, reader, tokenizer
        self._sparse = compiled_copy(model, watch.backend)

    def of(self, question: Question) -> tuple[tuple[float, ...], list[float]]:
        """Scores and then losses of a question, dense and S2O, and densities of the sparse calls."""
        with record() as recording:
            loss_s2o = self._loss(question, self._sparse)
            if all(call.path != "s2o" for call in recording.calls):
                raise nothing_sparse(CALLER, self._watch.recording.report)
            score_s2o = self._score(question, self._sparse)
        figures = self._score(question, self._model), score_s2o, self._loss(question, self._model), loss_s2o
        return figures, [call.density for call in recording.calls if call.path == "s2o"]

    def _loss(self, question: Question, model: nn.Module) -> float:
        """Mean loss on the expected answer."""
        first = question.prompt.ids.shape[1]
        places = torch.arange(first, first + question.answer_len, device=question.whole.ids.device)
        logits = self._reader.read(model, question.whole).at(0, places - 1).float()
        return nn.functional.cross_entropy(logits, question.whole.ids[0, places]).item()

    def _score(self, question: Question, model: nn.Module) -> float:
        """Share of the expected strings in the greedy answer, of which a model reads the prompt."""
        answer = self._tokenizer.decode(self._answer(question, model), skip_special_tokens=True)
        expected = question.sample.expected
        return sum(_stands_in(one, answer) for one in expected) / len(expected)

    def _answer(self, question: Question, model: nn.Module) -> list[int]:
        """Ids of the greedy answer: this model reads the prompt, the dense one goes on from its cache."""
        ids, limit = question.prompt.ids, question.answer_len + SPARE_TOKENS
        best, cache = self._reader.next_token(model, question.prompt)
        ids = torch.cat([ids, best], 1)
        if limit > 1 and not _ends(self._model, best):
            ids = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **cache,
                max_new_tokens=limit - 1,
                do_sample=False,
                num_beams=1,
            )
        return ids[0, question.prompt.ids.shape[1] :].tolist()


def _stands_in(expected: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", answer) is not None


def _ends(model: Any, token: Tensor) -> bool:  # noqa: ANN401 (a transformers model)
    end = model.generation_config.eos_token_id
    return token.item() in (end if isinstance(end, (list, tuple)) else [end])


def _check_generates(model: Any) -> None:  # noqa: ANN401 (a transformers model)
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "generation_config"):
        raise EvaluationError(
            f"{CALLER}: expected a causal model of transformers, which answers by generate(), got "
            f"{type(model).__name__} without it. s2o_compile.evaluate takes other models."
        )


def _checked_options(
    lengths: Iterable[int], tasks: Iterable[str], samples: int, seed: int, text: str | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Lengths and names of tasks, each once and in the order given."""
    asked = tuple(lengths) if isinstance(lengths, Iterable) else (lengths,)
    wrong = [length for length in asked if as_integer(length, least=1) is None]
    if wrong or not asked:
        got = shown(wrong[0]) if wrong else "none"
        raise OptionError(f"{CALLER}: expected lengths in tokens, such as (4096, 8192), got {got}. Give some.")
    wanted = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        raise OptionError(f"{CALLER}: {unknown_name('task', unknown[0] if unknown else '', tuple(TASKS))}")
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0)):
        if as_integer(value, least=least) is None:
            raise OptionError(
                f"{CALLER}: expected {name}, an integer of at least {least}, got {shown(value)}. Give one."
            )
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise OptionError(f"{CALLER}: expected a text with words, got {shown(text)}. Give one, or None for our own.")
    return tuple(dict.fromkeys(map(int, asked))), tuple(dict.fromkeys(wanted))


def _question(
    tokenizer: Callable[..., Any], name: str, length: int, random: Random, filler: Sequence[str], device: torch.device
) -> Question:
    """The question with the most filler that fits into a length."""
    fill = TASKS[name](random, filler)

    def tokens(amount: int) -> tuple[Sample, list[int], list[int]]:
        sample = fill(amount)
        return sample, _ids(tokenizer, sample.prompt), _ids(tokenizer, sample.answer, add_special_tokens=False)

    def size(amount: int) -> int:
        _, prompt, answer = tokens(amount)
        return len(prompt) + len(answer) + SPARE_TOKENS

    least = size(0)
    if least > length:
        raise EvaluationError(
            f"{CALLER}: expected a length of at least {least} tokens for the task {name!r}, got {length}. Give greater "
            "lengths."
        )
    low, high = 0, 1
    while size(high) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= length else (low, middle)
    sample, prompt, answer = tokens(low)
    first, whole = (torch.tensor([ids], device=device) for ids in (prompt, prompt + answer))
    return Question(
        sample=sample,
        prompt=TokenBatch(ids=first, keywords={}),
        whole=TokenBatch(ids=whole, keywords={}),
    )


def _ids(tokenizer: Callable[..., Any], text: str, **options: bool) -> list[int]:
    return tokenizer(text, verbose=False, **options).input_ids
