"""The tasks, made from a seed: one needle, several needles, variables that are tracked, common words.

They follow RULER (arXiv:2404.06654), with its questions and beginnings of answers. A prompt is plain text that the
model goes on with, so models with and without a chat format are asked alike. Two things differ. The filler is a set of
plain sentences, or a text of the user's. In the list of words a common word fills a thirtieth of any length, ten times
as much as any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

NEEDLES = 4
"""Needles of the task with several."""

HOPS = 4
"""Assignments between the first variable and the last one."""

COMMON = 5
"""Common words that are asked for."""

COMMON_SHARE, OTHERS = 30, 10
"""Entries of the list for one of a common word, and entries of a common word for one of any other."""

FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
    "A cart rolled down the road to the mill.",
    "Nobody had opened the window since the winter.",
    "The letter lay on the table next to a cup of tea.",
    "Two boats left the harbour before the rain came.",
    "She counted the steps, and then counted them again.",
    "The clock in the hall was a little late, as always.",
    "In the evening they sat by the fire and said little.",
    "A dog barked somewhere behind the hills.",
    "The baker had sold all of the bread by noon.",
    "Snow covered the path to the old bridge.",
    "He read the sign twice and turned left.",
)
"""Sentences without a number or a name, from which the filler is drawn."""

FIRST = """
amber ancient bitter brave bright broken calm careful clever cold cosmic crimson curious distant eager early faint
gentle golden hidden hollow humble icy little mellow narrow patient quiet rapid silver velvet wooden
"""
SECOND = """
anchor basket bridge candle canyon castle desert engine falcon feather garden hammer harbor island kettle ladder lantern
magnet meadow mirror orchard pebble pillow planet rabbit saddle spider tunnel valley violin wagon window
"""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question.

    Attributes:
        prompt: Text, question, and the beginning of the answer.
        answer: The rest of the answer, as the loss is measured on it. It begins with a space.
        expected: Strings that the model's own answer should contain.
    """

    prompt: str
    answer: str
    expected: tuple[str, ...]


Fill = Callable[[int], Sample]
"""Makes the sample with so many units of filler: sentences, or entries of a list."""

Task = Callable[[Random, Sequence[str]], Fill]
"""Draws a question by random numbers; the sentences are its filler."""


def sentences(text: str) -> list[str]:
    """A text, cut behind its sentences and lines."""
    return [unit for unit in re.split(r"(?<=[.!?])\s+|\n+", text) if unit.strip()]


def hidden_numbers(random: Random, filler: Sequence[str], count: int) -> Fill:
    """Numbers stand somewhere in the text, each with a name of its own, and are asked for."""
    keys = random.sample(compounds(), count)
    numbers = tuple(str(random.randrange(1_000_000, 10_000_000)) for _ in keys)
    needles = [f"One of the special magic numbers for {key} is: {n}." for key, n in zip(keys, numbers, strict=True)]
    hide = _hider(random, random.sample(needles, count), filler)
    what, be = ("number", "is") if count == 1 else ("numbers", "are")
    asked = f"the special magic {what} for {_series(keys)} mentioned in the provided text"

    def fill(amount: int) -> Sample:
        return Sample(
            prompt=(
                "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will "
                f"quiz you about the numbers afterwards.\n{hide(amount)}\nWhat {be} {asked}? The{asked[3:]} {be}"
            ),
            answer=f" {_series(numbers)}",
            expected=numbers,
        )

    return fill


def variables(random: Random, filler: Sequence[str]) -> Fill:
    """A number is assigned to a variable, that one to another, and so on: all variables that hold it are asked for."""
    example, asked = (_Chain(random) for _ in range(2))
    hide = _hider(random, asked.assignments, filler, shuffled=False)

    def fill(amount: int) -> Sample:
        task = "Memorize and track the chain of variable assignment hidden in the following text.\n"
        return Sample(
            prompt=(
                f"{task}{' '.join(example.assignments)}\n{example.question} {' '.join(example.names)}\n\n"
                f"{task}{hide(amount)}\n{asked.question}"
            ),
            answer=f" {' '.join(asked.names)}",
            expected=asked.names,
        )

    return fill


class _Chain:
    def __init__(self, random: Random) -> None:
        self.names = tuple("".join(random.sample(LETTERS, 5)) for _ in range(HOPS + 1))
        number = random.randrange(10_000, 100_000)
        held = (str(number), *(f"VAR {name}" for name in self.names))
        self.assignments = [f"VAR {name} = {value}." for name, value in zip(self.names, held, strict=False)]
        self.question = (
            f"Question: Find all variables that are assigned the value {number} in the text above. Answer: According "
            f"to the chain of variable assignment in the text above, {len(self.names)} variables are assigned the "
            f"value {number}, they are:"
        )


def common_words(random: Random, _filler: Sequence[str]) -> Fill:
    """A numbered list of words, a few of which stand there much more often than all others: these are asked for."""
    words = compounds()
    random.shuffle(words)
    common, others, seed = words[:COMMON], words[COMMON:], random.random()

    def fill(amount: int) -> Sample:
        often = max(2, amount // COMMON_SHARE)
        rarely = max(1, often // OTHERS)
        entries = common * often
        left = max(0, amount - len(entries))
        entries += (others[: -(-left // rarely)] * rarely)[:left]
        Random(seed).shuffle(entries)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))
        first = sorted(common, key=entries.index)
        return Sample(
            prompt=(
                "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
                f"ones that appear most often.\n{listed}\nQuestion: What are the {COMMON} most common words in the "
                f"above list? Answer: The top {COMMON} words that appear most often in the list are:"
            ),
            answer="".join(f" {number}. {word}" for number, word in enumerate(first, 1)),
            expected=tuple(first),
        )

    return fill


TASKS: dict[str, Task] = {
    "needle": partial(hidden_numbers, count=1),
    "needles": partial(hidden_numbers, count=NEEDLES),
    "variables": variables,
    "words": common_words,
}
"""By the names of the reports."""


def compounds() -> list[str]:
    """A thousand words that no text has by itself, such as amber-anchor."""
    return [f"{first}-{second}" for first in FIRST.split() for second in SECOND.split()]


def _hider(
    random: Random, hidden: Sequence[str], filler: Sequence[str], *, shuffled: bool = True
) -> Callable[[int], str]:
    """Makes text of so many sentences with others hidden in it, at places that are the same shares of any length."""
    depths, seed = sorted(random.random() for _ in hidden), random.random()
    start = random.randrange(len(filler))

    def text(amount: int) -> str:
        if filler is FILLER:
            units = Random(seed).choices(filler, k=amount)
        else:
            units = [filler[(start + place) % len(filler)] for place in range(amount)]
        for depth, sentence in reversed(list(zip(depths, hidden, strict=True))):
            units.insert(int(depth * (amount + 1)), sentence)
        return " ".join(units)

    return text


def _series(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
