"""Ranks of a process group in processes of their own, which start quickly: torch is imported once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["torch", "torch.distributed.tensor", "s2o_compile", "s2o_compile.distributed", "tests.helpers.ranks"]
PRELOADED += ["tests.conftest", "s2o_compile.transformers", "transformers.models.llama.modeling_llama"]
"""What ranks import, for all of them at once; what is not installed is passed over."""

TIMEOUT = 60


def run_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, seconds: int = TIMEOUT, backend: str = "gloo"
) -> list[Any]:
    """What ``function(rank, *args)`` returns on each rank, or the exception that it raises there, as text.

    The function is one of a module. A rank that ends without an answer gives None.
    """
    context = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
    if backend == "gloo":
        context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(
                target=_rank, args=(function, rank, ranks, str(Path(folder) / "store"), sends, seconds, backend, args)
            )
            for rank, (_, sends) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sends in pipes:
            sends.close()
        answers = []
        for receives, _ in pipes:
            try:
                answers.append(receives.recv() if receives.poll(5 * seconds) else None)
            except EOFError:
                answers.append(None)
        for process in processes:
            process.join(seconds)
            if process.is_alive():
                process.terminate()
    return answers


def check_ranks(function: Callable[..., Any], ranks: int, *args: Any, **options: Any) -> list[Any]:
    """The answers of all ranks; an exception of any of them is raised here."""
    answers = run_ranks(function, ranks, *args, **options)
    failed = [str(answer) for answer in answers if answer is None or isinstance(answer, Exception)]
    assert not failed, "\n".join(failed)
    return answers


def _rank(
    function: Callable[..., Any], rank: int, ranks: int, store: str, sends: Any, seconds: int, backend: str, args: Any
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )
    try:
        answer = function(rank, *args)
    except BaseException as error:  # whatever it is, the test shows it
        answer = RuntimeError(f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
    sends.send(answer)
    sends.close()
    sys.stdout.flush()
    os._exit(0)  # the others may have ended: a group that is taken down waits for them
