"""The result of tasks: scores by task and length, their JSON, and a table to read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from s2o_compile.config import S2OConfig
from s2o_compile.errors import OptionError
from s2o_compile.kernels.support.arguments import as_integer, shown
from s2o_compile.kernels.support.json_text import parse_json
from s2o_compile.quality.from_json import as_type
from s2o_compile.report import table

FORMAT, KIND = 1, "tasks"
HEADER = ("task", "tokens", "answers dense", "S2O", "loss dense", "S2O", "density")


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task at one length, means over samples.

    Attributes:
        task: Its name.
        length: Tokens that a prompt and its answer fill, at most.
        samples: Questions behind the means.
        score_dense: Share of the expected strings in the answers of the model as it is.
        score_s2o: The same, prompts read through S2O.
        loss_dense: Loss on the expected answers in nats a token, of the model as it is.
        loss_s2o: The same, prompts and answers read through S2O.
        density: Computed over visible query-key pairs, mean over sparse attentions.
    """

    task: str
    length: int
    samples: int
    score_dense: float
    score_s2o: float
    loss_dense: float
    loss_s2o: float
    density: float


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Dense against S2O on tasks.

    Attributes:
        model: Name of the model.
        device: Where it ran.
        config: How attention was made sparse.
        seed: Seed of the questions.
        scores: By task and length, in the order in which they were asked.
    """

    model: str
    device: str
    config: S2OConfig
    seed: int
    scores: tuple[TaskScore, ...]

    def means(self) -> tuple[TaskScore, ...]:
        """Means over the tasks, a score for every length. Its ``samples`` are those of all tasks."""
        found = []
        for length in dict.fromkeys(score.length for score in self.scores):
            own = [score for score in self.scores if score.length == length]
            names = ("score_dense", "score_s2o", "loss_dense", "loss_s2o", "density")
            means = {name: sum(getattr(score, name) for score in own) / len(own) for name in names}
            samples = sum(score.samples for score in own)
            found.append(TaskScore(task="mean", length=length, samples=samples, **means))
        return tuple(found)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Cells below `HEADER`: tasks one after the other, each over its lengths, and the means last."""
        for score in (*self.scores, *self.means()):
            answers = (f"{share:.0%}" for share in (score.score_dense, score.score_s2o))
            losses = (f"{score.loss_dense:.3f}", f"{score.loss_s2o:.3f}")
            yield score.task, str(score.length), *answers, *losses, f"{score.density:.3f}"

    def to_json(self) -> str:
        """JSON text that ``from_json`` reads back to equal scores."""
        return json.dumps({"format": FORMAT, "kind": KIND} | asdict(self), default=dict)

    @classmethod
    def from_json(cls, text: str | bytes) -> TaskScores:
        """Scores from the text of ``to_json``; OptionError for any other text."""
        try:
            return as_type(cls, _fields(text), "tasks")
        except ValueError as error:
            raise OptionError(
                f"tasks: expected the JSON of `s2o evaluate --tasks --json` in format {FORMAT}, got {error}. Evaluate "
                "again and give the new file."
            ) from error

    def __str__(self) -> str:
        return "\n".join(table(HEADER, list(self.rows())))


def _fields(text: str | bytes) -> dict[str, object]:
    fields = parse_json(text)
    kind = (as_integer(fields.pop("format", None)), fields.pop("kind", None)) if isinstance(fields, dict) else ()
    if kind != (FORMAT, KIND):
        raise ValueError(shown(text))
    return fields
