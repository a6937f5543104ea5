"""``s2o tune``: times launch configurations and finds the crossover length on the present device.

The results go into the user's file (``kernels/core/tuned.py``), which the operator reads once. Inputs are synthetic and
have structure (tokens come in runs of one topic). Every configuration is checked before it is timed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.cli.about import made_by
from s2o_compile.errors import OptionError
from s2o_compile.kernels import dispatch as operator
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import TILE_LEN, Plan
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.core.tuned import Launch
from s2o_compile.kernels.planner import build_plan
from s2o_compile.kernels.support.files import try_writing, writing
from s2o_compile.kernels.support.json_text import parse_json
from s2o_compile.speed.measure import UNTIMED, seconds_of

CAUSAL = AttentionMask(causal=True)
DENSITY = 0.1
TOPIC_LEN = 256
CHECKED_LEN = 1024
WORST_ERROR = 4.0
"""A configuration may be this many times as far from float64 as SDPA is, as in the tests."""

TIMED_SECONDS = 0.3

WON = 0.95
"""S2O pays where it takes at most this share of dense attention's time. Inputs that nothing can be left out of take
longer, so a tie is no gain."""

WORKERS = 8
"""Processes that compile, at most: each has a context and inputs of its own on the device."""

LONGEST_LOST = 16384
"""A dtype that loses at so many tokens runs dense at any length: longer calls were not faster either, where tried."""

Clock = Callable[[Callable[[], object]], float]
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Heads, head dim, dtype and device of the attention that is timed."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    device: torch.device

    def inputs(self, length: int) -> Inputs:
        """Query, key, value [1, H, N, D], laid out as a model's projections leave them, with topics and a sink."""
        generator = torch.Generator(self.device).manual_seed(0)
        options = {"device": self.device, "dtype": self.dtype, "generator": generator}

        def noise(heads: int) -> Tensor:
            return torch.randn(1, length, heads, self.head_dim, **options).transpose(1, 2)

        query, key, value = noise(self.heads), noise(self.kv_heads), noise(self.kv_heads)
        add_topics(query, key, generator)
        return query, key, value


def add_topics(query: Tensor, key: Tensor, generator: torch.Generator | None = None) -> None:
    """Give noise [B, H, N, D] structure that early stopping can use, in place: runs of one topic, and a sink."""
    batch, kv_heads, length, head_dim = key.shape
    topics = torch.randn(64, head_dim, device=key.device, dtype=key.dtype, generator=generator)
    topics[:, head_dim // 4 :] = 0  # trained heads, too, keep the energy of their logits in a few dimensions
    topic = torch.randint(64, (-(-length // TOPIC_LEN),), device=key.device, generator=generator)
    shared = 1.8 * topics[topic.repeat_interleave(TOPIC_LEN)[:length]]
    query += shared
    key += shared
    key[:, :, 0] = 3 * query.mean(2).view(batch, kv_heads, -1, head_dim).mean(2)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One configuration: milliseconds of the gathered and the exact kernel, or why it failed."""

    launch: Launch
    gathered_ms: float = 0.0
    exact_ms: float = 0.0
    failed: str = ""


def candidates() -> list[Launch]:
    """Configurations that ``sweep`` tries."""
    warps = ((4, None), (8, None), (8, 128), (16, None))
    return [
        Launch(key_block=keys, num_warps=number, stages=stages, maxnreg=registers)
        for keys, (number, registers), stages in itertools.product((32, 64, 128), warps, (2, 3))
    ]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call, the device's work included, after some that do not count (`UNTIMED`)."""
    device, times = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    for _ in range(UNTIMED.get(device.type, 1)):
        call()
    while len(times) < 3 or sum(times) < TIMED_SECONDS:
        times.append(seconds_of(call, device))
    return statistics.median(times) * 1e3


def cut_to_density(plan: Plan, density: float, length: int, *, causal: bool = True) -> Plan:
    """The plan with every list cut so that all passes together compute ``density`` of the visible area.

    Lists end where a tile would stop, between two chunks. ``length`` is that of the whole call, of whose queries the
    plan may hold a part.
    """
    chunks = plan.prefix_count * (kept_share(plan, density, length, causal=causal) / plan.chunk_len)
    count = torch.minimum(chunks.round().int() * plan.chunk_len, plan.prefix_count)
    return dataclasses.replace(plan, prefix_count=count)


def kept_share(plan: Plan, density: float, length: int, *, causal: bool) -> float:
    """The share of its prefix that every list of a plan keeps in `cut_to_density`."""
    own, prefix, area = float(plan.segment_len), float(length - plan.segment_len), length * density
    if causal:
        own, prefix, area = (own + TILE_LEN) / 2, prefix / 2, (length + 1) / 2 * density
    return max(area - own, 0.0) / max(prefix, 1.0)


def compile_ahead(shape: Shape, length: int, tried: Sequence[Launch]) -> None:
    """Compile the kernels of a `sweep` by processes beside each other: it then finds them in Triton's cache.

    Whatever fails here, a process that ends or lacks memory, the sweep compiles, or names what fails there, too.
    """
    workers = max(1, min(WORKERS, (os.cpu_count() or 1) // 2))
    with suppress(Exception), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        parts = [tried[number::workers] for number in range(workers)]
        list(pool.map(partial(_run_once, shape, length), parts))


def _run_once(shape: Shape, length: int, tried: Sequence[Launch]) -> None:
    calls = _calls(shape, length)
    for launch in tried:
        with launched(launch):
            for call in chain(*calls):
                with suppress(Exception):
                    call()


def _calls(shape: Shape, length: int) -> list[tuple[Callable[[], Result], Callable[[], Result]]]:
    """Both forward kernels on inputs that are checked, at a density of 1, and on those that are timed."""
    from s2o_compile.kernels.impl.triton import exact as triton_exact
    from s2o_compile.kernels.impl.triton import forward as triton_forward

    calls = []
    for n, density in ((CHECKED_LEN, 1.0), (length, DENSITY)):
        query, key, value = shape.inputs(n)
        call = AttentionCall(query=query, key=key, value=value, mask=CAUSAL, scale=shape.head_dim**-0.5)
        plan = build_plan(call, OperatorOptions(), "triton")
        plan = cut_to_density(plan, density, n) if density < 1 else plan
        calls.append((partial(triton_forward.attend, call, plan, 0.0), partial(triton_exact.attend_exact, call)))
    return calls


def sweep(shape: Shape, length: int, tried: Iterable[Launch], *, clock: Clock = milliseconds) -> Iterator[Timing]:
    """Check and time both forward kernels, under the present configuration first and then under every one of ``tried``.

    The timed calls have ``length`` tokens; ``clock`` gives the milliseconds of a call.
    """
    checked, timed = _calls(shape, length)
    inputs = shape.inputs(CHECKED_LEN)
    exact = _dense(*(x.double() for x in inputs))
    limit = WORST_ERROR * _error(_dense(*inputs), exact)
    present = tuned.launch(shape.device, max(16, 1 << (shape.head_dim - 1).bit_length()), shape.dtype)
    for launch in (present, *(other for other in tried if other != present)):
        with launched(launch):
            try:
                errors = [_error(call().output, exact) for call in checked]
                if not max(errors) <= limit:
                    yield Timing(launch=launch, failed=f"wrong: error {max(errors):.2g} beyond {limit:.2g}")
                    continue
                yield Timing(launch=launch, gathered_ms=clock(timed[0]), exact_ms=clock(timed[1]))
            except Exception as error:  # whatever a compiler or a driver raises: the others are still wanted
                yield Timing(launch=launch, failed=f"{type(error).__name__}: {error}".partition("\n")[0][:120])


def best(timings: Sequence[Timing]) -> Timing:
    """The fastest of a sweep: the product of both kernels' times is smallest.

    Raises:
        OptionError: All of them failed.
    """
    sound = [timing for timing in timings if not timing.failed]
    if not sound:
        raise OptionError(f"tune: expected some configuration to run, got {timings[0].failed} and the like.")
    return min(sound, key=lambda timing: timing.gathered_ms * timing.exact_ms)


@dataclass(frozen=True, kw_only=True)
class Length:
    """Milliseconds of one call at a length: the operator with default settings, and the fastest dense backend."""

    length: int
    s2o_ms: float
    dense_ms: float
    backend: str


def compare(shape: Shape, length: int, *, clock: Clock = milliseconds) -> Length:
    """Time the operator and every backend of SDPA that runs here."""
    inputs = shape.inputs(length)
    options = OperatorOptions(min_seq_len=0)
    s2o_ms = clock(partial(operator.run, AttentionCall.of(*inputs, causal=True), options))
    times = {}
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for backend in backends if shape.device.type == "cuda" else (SDPBackend.FLASH_ATTENTION,):
        with sdpa_kernel(backend), warnings.catch_warnings(action="ignore", category=UserWarning):
            try:
                times[backend.name] = clock(partial(_dense, *inputs))
            except RuntimeError:  # it does not take these inputs, and warnings say why at length
                continue
    if not times:
        times["SDPA"] = clock(partial(_dense, *inputs))
    name = min(times, key=times.__getitem__)
    return Length(length=length, s2o_ms=s2o_ms, dense_ms=times[name], backend=name)


def crossover(lengths: Sequence[Length]) -> int | None:
    """The shortest length at which S2O pays, by `WON`, and behind which it never loses.

    If there is none, nothing is known: None. If it lost at a longest one of `LONGEST_LOST` or more, none runs sparse.
    """
    won, longest = None, max(lengths, key=lambda entry: entry.length)
    for entry in sorted(lengths, key=lambda entry: -entry.length):
        if entry.s2o_ms >= entry.dense_ms:
            break
        won = entry.length if entry.s2o_ms <= WON * entry.dense_ms else won
    if longest.s2o_ms >= longest.dense_ms and longest.length >= LONGEST_LOST:
        return tuned.NEVER
    return won


def read(path: Path) -> dict[str, dict[str, dict[str, object]]]:
    """The content of the file, empty if there is none.

    Raises:
        OptionError: The file is there and is none of ours, or cannot be read.
    """
    try:
        text = path.read_bytes()
        tuned.parse(text)
    except FileNotFoundError:
        return {"devices": {}}
    except (OSError, ValueError) as error:
        raise OptionError(f"{path}: expected a file of `s2o tune`, got {error}. Delete it or name another.") from error
    return parse_json(text)


def try_target(path: Path) -> None:
    """Read the file and try to write it, before hours of measurement; makes its directory.

    Raises:
        OptionError: The file is there and is none of ours, or cannot be written.
    """
    read(path)
    with _target(path):
        try_writing(path)


def write(
    path: Path, device: torch.device, *, crossovers: dict[str, int], launches: dict[tuple[int, str], Timing]
) -> dict[str, object]:
    """Add the results to the file and return the device's entry; ``crossovers`` are by dtype, as of `crossover`.

    Raises:
        OptionError: The file is there and is none of ours, or cannot be written.
    """
    content = read(path)
    name = tuned.device_name(device)
    held: dict[str, Any] = content["devices"].get(name, {})
    found = [
        {"head_dim": dim, "dtype": dtype, **dataclasses.asdict(timing.launch)}
        | {"gathered_ms": round(timing.gathered_ms, 3), "exact_ms": round(timing.exact_ms, 3)}
        for (dim, dtype), timing in launches.items()
    ]
    kept = [entry for entry in held.get("launches", []) if (entry["head_dim"], entry["dtype"]) not in launches]
    lengths = {dtype: "never" if length >= tuned.NEVER else length for dtype, length in crossovers.items()}
    entry: dict[str, object] = {
        "crossover": held.get("crossover"),
        "crossovers": {**held.get("crossovers", {}), **lengths},
        "launches": kept + found,
        "about": made_by(),
    }
    devices = content["devices"] | {name: entry}
    with _target(path), writing(path) as part:
        part.write_text(json.dumps({"format": tuned.FORMAT, "devices": devices}, indent=1) + "\n", encoding="utf-8")
    tuned.forget()
    return entry


@contextmanager
def _target(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise OptionError(f"{path}: expected a file to write, got: {cause}. Name another with --output.") from error


def launched(launch: Launch) -> AbstractContextManager[object]:
    """Inside the block every forward kernel runs under this configuration."""
    return patch.object(tuned, "launch", lambda *_: launch)


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _error(output: Tensor, exact: Tensor) -> float:
    return (output - exact).abs().max().item()
