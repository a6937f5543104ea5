"""The ranks of one process group: exchanges between them, and what they must agree on before.

Every failure is an error on every rank that takes part: a rank that cannot go on tells the others at the next
agreement. A rank that has ended is seen by the backend, at the latest after the time-out of the process group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2o_compile.kernels.support.arguments import shown
from s2o_compile.kernels.support.errors import InputError, RankError

_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

FAILED = "failed"
"""The fact of a rank that has failed before an agreement."""


class Ranks:
    """A process group and this process's place in it.

    Attributes:
        group: The process group.
        rank: This process in it.
        size: How many there are.
    """

    def __init__(self, mesh: Any, who: str) -> None:  # noqa: ANN401 (checked here)
        """Of a mesh with one dimension, or of a process group; ``who`` asks, for messages."""
        remedy = 'Pass one dimension of a DeviceMesh, such as mesh["cp"], or a process group.'
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                who,
                expected="an initialised process group",
                got="none",
                remedy="Start the script with torchrun, and call torch.distributed.init_process_group first.",
            )
        if isinstance(mesh, dist.DeviceMesh):
            if mesh.ndim != 1:
                raise InputError(who, expected="a mesh of one dimension", got=f"{mesh.ndim}", remedy=remedy)
            mesh = mesh.get_group()
        if not isinstance(mesh, dist.ProcessGroup):
            raise InputError(who, expected="a DeviceMesh or a process group", got=shown(mesh), remedy=remedy)
        self.group, self.rank, self.size = mesh, dist.get_rank(mesh), dist.get_world_size(mesh)
        if self.rank < 0:
            raise InputError(who, expected="a group that this process is in", got="another", remedy=remedy)
        self._needs_cuda = dist.get_backend(mesh) == "nccl"

    @property
    def device(self) -> torch.device:
        """Where small exchanges happen."""
        return torch.device("cuda", torch.cuda.current_device()) if self._needs_cuda else torch.device("cpu")

    def check_device(self, x: Tensor, name: str) -> None:
        """Raise InputError unless the backend can send a tensor."""
        if self._needs_cuda and not x.is_cuda:
            raise InputError(
                f"device of {name}",
                expected="CUDA tensors, which NCCL exchanges",
                got=x.device,
                remedy="Move the model and its inputs to this rank's GPU, or make the process group with gloo.",
            )

    def agree(self, what: str, facts: Mapping[str, object] | Exception) -> None:
        """Raise on every rank unless all of them state the same facts; an exception is the news that a rank has failed.

        Costs two numbers a rank and a wait for the device.

        Raises:
            RankError: They differ, or another rank has failed; the message says which.
        """
        failed = isinstance(facts, Exception)
        text = f"{FAILED}: {facts}" if failed else repr(sorted((name, str(fact)) for name, fact in facts.items()))
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
        mine = torch.tensor([number, failed], device=self.device)
        stated = mine.new_empty(self.size * 2)
        with self._exchanging(what):
            _all_gather(stated, mine, self.group)
            numbers = stated.view(-1, 2).tolist()
            if all(other == [number, 0] for other in numbers):
                return
            texts: list[Any] = [None] * self.size
            dist.all_gather_object(texts, (failed, text if failed else dict(facts)), self.group)  # pyright: ignore
        if failed:
            raise facts  # as it was, on the rank that it is of
        raise RankError(_difference(what, texts))

    @contextmanager
    def checking(self, what: str) -> Iterator[None]:
        """A block of checks ahead of an agreement: an InputError in it fails the agreement on the other ranks."""
        try:
            yield
        except InputError as error:
            self.agree(what, error)

    def gather(self, sends: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Numbers of every rank, of one shape [...] -> [W, ...], once the function that comes with it has waited."""
        received = sends.new_empty(self.size, *sends.shape)
        with self._exchanging("gathering keys and values"):
            work = _all_gather(received.view(-1), sends.reshape(-1), self.group, async_op=True)

        def wait() -> None:
            with self._exchanging("gathering keys and values"):
                work.wait()  # pyright: ignore[reportOptionalMemberAccess]

        return received, wait

    def all_to_all(self, sends: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """A flat tensor for each rank -> one of these sizes from each."""
        received = sends[0].new_empty(sum(sizes))
        with self._exchanging("exchanging heads and positions"):
            own = [x.numel() for x in sends]
            dist.all_to_all_single(received, torch.cat(list(sends)), list(sizes), own, self.group)
        return list(received.split(list(sizes)))

    def objects(self, mine: object) -> list[Any]:
        """Something small of every rank, by pickle."""
        found: list[Any] = [None] * self.size
        with self._exchanging("gathering reports"):
            dist.all_gather_object(found, mine, self.group)
        return found

    @contextmanager
    def _exchanging(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of every backend: a closed connection, a time-out, an abort
            first = str(error).partition("\n")[0]
            raise RankError(
                f"{what}: expected all {self.size} ranks to take part, got {type(error).__name__}: {first}. A rank has "
                "ended, hangs, or called something else: look at the first error in the logs of the other ranks."
            ) from error


def _difference(what: str, texts: Sequence[tuple[bool, Any]]) -> str:
    failed = [f"rank {rank} ({text})" for rank, (has_failed, text) in enumerate(texts) if has_failed]
    if failed:
        return f"{what}: expected every rank to come this far, got {'; '.join(failed)}. Mend that, and start again."
    facts = [stated for _, stated in texts]
    named = [name for name in facts[0] if len({str(stated.get(name)) for stated in facts}) > 1]
    named = named or sorted(set().union(*facts))
    each = "; ".join(
        f"rank {rank}: {', '.join(f'{name} {stated.get(name)}' for name in named)}" for rank, stated in enumerate(facts)
    )
    return f"{what}: expected the same on every rank, got {each}. Call it with the same arguments everywhere."
