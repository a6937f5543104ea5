"""How `recall_model.py` trains: by Muon, on rows that grow as the model succeeds.

Rows of 32 tokens come first. There every earlier token has a good share of attention that is still even, and looking up
is learned in a few hundred steps. Rows of 64 took more than 900 (two cores, the tiny model).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Sequence

import torch
from recall_data import Batch, Source
from recall_decoder import Answered, Decoder, Mixer, Projections, Settings, answer
from results_file import Rows
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

EVERY = 50
"""Steps between two looks at recall."""

FACTS = 64
"""Pairs of a row whose recall is judged."""

PASSED = 0.95
"""Recall from which a stage has been learned."""

GROWTH = 4
"""A stage's length over that of the stage before."""

STAGE_SHARE = 0.2
"""Share of the time after which a stage ends anyway; not the first, where attention learns to look up at all."""

COOLDOWN = 0.2
"""Share of the time in which the learning rate falls to zero at the end."""

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
"""SDPA's kernels, the first that takes the call: never one that writes all scores down."""

TEXT_WEIGHT = 0.2
"""Weight of the loss on text beside that on answers."""


class Muon:
    """Momentum whose update of a matrix is orthogonalised (Keller Jordan); matrices of one shape go together."""

    def __init__(self, matrices: Iterable[nn.Parameter], *, momentum: float = 0.95) -> None:
        self._groups: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            self._groups.setdefault(matrix.shape, []).append(matrix)
        self._momentum = momentum
        self._means = {shape: torch.zeros_like(torch.stack(group)) for shape, group in self._groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update all matrices from their gradients."""
        for shape, group in self._groups.items():
            gradient, mean = torch.stack([matrix.grad for matrix in group]), self._means[shape]  # pyright: ignore
            mean.lerp_(gradient, 1 - self._momentum)
            update = orthogonal(gradient.lerp(mean, self._momentum)) * max(1.0, shape[0] / shape[1]) ** 0.5
            for matrix, change in zip(group, update.to(mean.dtype), strict=True):
                matrix.add_(change, alpha=-rate)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the orthogonal factor of matrices [K, M, N], by Newton-Schulz iterations; all singular values near 1."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(steps):
        product = x @ x.mT
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return x.mT if tall else x


class Training:
    """A model while it learns.

    Args:
        settings: Model and training.
        lengths: The lengths that it shall master, ascending; the last stage mixes them.
        text: Bytes to train on. Their device is the model's.
        seed: Of weights and sequences.
    """

    def __init__(self, settings: Settings, lengths: Sequence[int], text: Tensor, *, seed: int) -> None:
        torch.manual_seed(seed)
        self._on_gpu = text.device.type == "cuda"
        self.settings, self.lengths = settings, tuple(lengths)
        self.model = Decoder(settings, torch.bfloat16 if self._on_gpu else torch.float32).to(text.device)
        matrices = [weight for weight in self.model.blocks.parameters() if weight.ndim == 2]
        known = {id(weight) for weight in matrices}
        others = [weight for weight in self.model.parameters() if id(weight) not in known]
        self._muon, self._adam = Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
        self._source, self._random = Source(settings.vocabulary, text, seed=seed), random.Random(seed)
        self._tests = Source(settings.vocabulary, text, seed=seed + 1)
        self.stages = [*self._shorter(), self.lengths]
        if self._on_gpu:  # attention is one kernel already, and all else sees the same shapes at every length
            for module in self.model.modules():
                if isinstance(module, Projections | Mixer):
                    module.compile(dynamic=False)

    def _shorter(self) -> list[tuple[int]]:
        """Lengths of the stages before the last."""
        found, length = [], self.settings.first_length
        while length < self.lengths[0]:
            found.append((length,))
            length *= GROWTH
        return found

    def run(self, minutes: float, target: float, rows: Rows) -> None:
        """Train until the time is up, or until every length recalls ``target`` and the learning rate has fallen.

        Raises:
            RuntimeError: The loss is not finite.
        """
        start = time.perf_counter()
        self._deadline, self._cooldown = start + 60 * minutes, 60 * minutes * COOLDOWN
        stage, stage_start, step, mastered, reached = 0, start, 0, None, {}
        while time.perf_counter() < self._deadline:
            self._step(step, stage)
            step += 1
            if step % EVERY:
                continue
            reached = self.recall(self.stages[stage])
            now = time.perf_counter()
            shown, loss = self._shown(reached), self._loss.item()
            print(f"  {now - start:.0f} s, step {step}: {shown}, loss {loss:.3f}", flush=True)
            if not math.isfinite(loss):
                raise RuntimeError("training: expected a finite loss, got none. Try another --seed.")
            if mastered is None and reached.get(self.lengths[0], 0.0) >= PASSED:
                mastered = now - start
            if stage + 1 < len(self.stages):
                passed = min(reached.values()) >= PASSED
                if passed or (stage > 0 and now - stage_start > 60 * minutes * STAGE_SHARE):
                    self._tell(rows, "stage passed" if passed else "stage given up", step, now - start, reached)
                    stage, stage_start = stage + 1, now
            elif min(reached.values()) >= target:
                self._deadline = min(self._deadline, now + self._cooldown)
        what = f"{self.lengths[0]} tokens recalled {PASSED:.0%}: " + (
            f"after {mastered:.0f} s" if mastered else "never"
        )
        self._tell(rows, f"end; {what}", step, time.perf_counter() - start, self.recall(self.stages[stage], batches=8))

    def recall(self, lengths: Sequence[int], batches: int = 2) -> dict[int, float]:
        """Recall of far keys at each length, on training's text."""
        found = {}
        for length in lengths:
            right, answers = 0, 0
            for _ in range(batches):
                batch = self._tests.far(self._rows(length), length, count=FACTS)
                answered = self._answer(batch)  # with gradients, as the code is compiled for
                right, answers = right + answered.right.item(), answers + answered.answers.item()
            found[length] = right / answers
        return found

    def _answer(self, batch: Batch) -> Answered:
        if not self._on_gpu:
            return answer(self.model, batch, positions=batch.positions)
        with sdpa_kernel(KERNELS, set_priority=True):
            return answer(self.model, batch, positions=batch.positions)

    def _rows(self, length: int) -> int:
        return max(1, self.settings.tokens // length)

    def _step(self, step: int, stage: int) -> None:
        lengths = self.stages[stage]
        (length,) = self._random.choices(lengths, [1 / length for length in lengths])
        longest = self.lengths[-1] if stage else length  # looking up is learned at true positions first
        batch = self._source.training(self._rows(length), length, longest=longest)
        answered = self._answer(batch)
        loss = answered.answer_loss / answered.answers + TEXT_WEIGHT * answered.text_loss / answered.texts.clamp(min=1)
        loss.backward()
        left = (self._deadline - time.perf_counter()) / self._cooldown
        rate = max(0.0, min(1.0, (step + 1) / self.settings.warmup, left))
        for group in self._adam.param_groups:
            group["lr"] = rate * self.settings.other_rate
        self._muon.step(rate * self.settings.matrix_rate)
        self._adam.step()
        self.model.zero_grad()
        self._loss = loss.detach()

    def _tell(self, rows: Rows, what: str, step: int, seconds: float, reached: dict[int, float]) -> None:
        told = {"what": what, "seconds": round(seconds, 1), "steps": step, "recall": self._shown(reached)}
        rows.measure("training", told, dict)

    @staticmethod
    def _shown(reached: dict[int, float]) -> str:
        return ", ".join(f"{length}: {recall:.3f}" for length, recall in reached.items())
