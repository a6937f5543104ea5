"""Measurements by device: the length from which S2O pays, and the launches of the forward kernels.

Built-in entries go by the beginning of the device's name. Those of the user's file, which ``s2o tune`` writes and
docs/tune.md describes, go by the whole name, and win. Any other device gets defaults that are sound, not fast. Nothing
is tuned when a model runs: a tuner would time made-up indices.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.support import cpp_library
from s2o_compile.kernels.support.arguments import as_integer, shown
from s2o_compile.kernels.support.errors import TunedFileWarning, warn
from s2o_compile.kernels.support.json_text import parse_json
from s2o_compile.kernels.support.torch_compat import has_amx

FILE_VARIABLE = "S2O_TUNED"
"""Environment variable with the path of the user's file; empty, none is read."""

FORMAT = 1

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Dtypes by their names in the file."""

HEAD_DIMS = (16, 32, 64, 128, 256, 512)
"""Head dims of kernels; those between run as the next."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The launch of a forward kernel on one device, for one head dim and dtype.

    Attributes:
        key_block: Keys of one step, a power of two from 16 to 128.
        num_warps: 4, 8 or 16.
        stages: Steps that are loaded ahead, 1 to 4.
        maxnreg: Registers of a thread at most, a multiple of 8; None leaves that to the compiler.
    """

    key_block: int
    num_warps: int = 8
    stages: int = 2
    maxnreg: int | None = None

    def __post_init__(self) -> None:
        allowed = {"key_block": (16, 32, 64, 128), "num_warps": (4, 8, 16), "stages": (1, 2, 3, 4)}
        for name, values in allowed.items():
            if as_integer(getattr(self, name)) not in values:
                raise ValueError(f"{name}: expected one of {values}, got {shown(getattr(self, name))}")
        registers = self.maxnreg
        if registers is not None and as_integer(registers, least=24, most=255) is None:
            raise ValueError(f"maxnreg: expected 24 to 255 or null, got {shown(registers)}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The measurements of one device.

    Attributes:
        crossover: Key length in tokens from which S2O beats dense attention; None if it was not measured.
        crossovers: The same by dtype, which goes before it; NEVER where dense attention won at every length.
        launches: By head dim (a power of two) and dtype.
    """

    crossover: int | None = None
    crossovers: dict[torch.dtype, int] = field(default_factory=dict)
    launches: dict[tuple[int, torch.dtype], Launch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shortest = self.crossover
        if shortest is not None and as_integer(shortest, least=0) is None:
            raise ValueError(f"crossover: expected an integer >= 0 or null, got {shown(shortest)}")
        for length in self.crossovers.values():
            if as_integer(length, least=0) is None:
                raise ValueError(f'crossovers: expected integers >= 0 or "never", got {shown(length)}')
        for dim, _ in self.launches:
            if as_integer(dim) not in HEAD_DIMS:
                raise ValueError(f"head_dim: expected one of {HEAD_DIMS}, got {shown(dim)}")


# By a sweep on an H100 (torch 2.11, triton 3.6): key blocks of 32 to 128, 4 to 16 warps, 2 and 3 stages. 8 warps of at
# most 128 registers leave room for two programs on a multiprocessor: one multiplies while the other takes exponentials.
# Dims below 64, and beyond 256, are sound, and no register is spilled; they are not tuned.
_HOPPER = {
    (dim, dtype): Launch(key_block=128 if dim <= 64 else 64 if dim <= 256 else 32, maxnreg=128 if dim <= 128 else None)
    for dim in HEAD_DIMS
    for dtype in (torch.float16, torch.bfloat16)
}

NEVER = 1 << 40
"""The crossover where dense attention is faster at any length: longer than every sequence."""

LONG = 8192
"""Keys that anybody would take for a long sequence: from here on a dense call owes a reason."""

BUILT_IN = {
    # A CPU in plain torch: SDPA in bfloat16 was 1.6 to 3 times as fast at 8K and 12K where there is AMX.
    "cpu in torch with AMX": Entry(crossovers={torch.bfloat16: NEVER}),
    "cpu in torch": Entry(crossover=12288),
    # Two cores, topical input: at 4K 1.4 to 1.6 times as fast in float32, 0.8 to 0.9 in bfloat16 with AMX; at 8K 1.2.
    "cpu in C++ with AMX": Entry(crossovers={torch.bfloat16: 8192}),
    "cpu in C++": Entry(crossover=4096),
    "NVIDIA H100": Entry(crossover=16384, launches=_HOPPER),  # synthetic input (benchmarks/README.md)
    # Topics by the default: at 8K 0.97 times as fast as cuDNN, at 12K 1.34 times.
    "NVIDIA H200": Entry(crossover=12288, launches=_HOPPER),
    "NVIDIA GH200": Entry(launches=_HOPPER),
}

UNKNOWN_CROSSOVER = 16384
"""Crossover of a device that was not measured: there the index work of an H100 has paid for itself."""


def device_name(device: torch.device) -> str:
    """The name of a device in the table: a GPU's full name, the type of others."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def crossover(device: torch.device, dtype: torch.dtype, *, packaged: bool = False) -> int:
    """Key length in tokens from which S2O runs if ``min_seq_len`` is "auto", NEVER if dense attention always wins.

    Of the user's measurements and ours those of the dtype come first: SDPA's rate differs by dtype more than by device.
    A ``packaged`` program on a CPU computes in torch's operators, whose times only we measured.
    """
    in_torch = packaged and device.type == "cpu"
    entries = _entries("" if in_torch else device_name(device), _kind(device, in_torch=in_torch))
    known = [entry.crossovers[dtype] for entry in entries if dtype in entry.crossovers]
    known += [entry.crossover for entry in entries if entry.crossover is not None]
    return known[0] if known else UNKNOWN_CROSSOVER


def shortest_sparse(min_seq_len: int | str, device: torch.device, dtype: torch.dtype) -> int:
    """Key length in tokens from which S2O runs, whether ``min_seq_len`` is a number or "auto"."""
    return min_seq_len if isinstance(min_seq_len, int) else crossover(device, dtype)


SHORT_ON_CPUS = min(e.crossover for name, e in BUILT_IN.items() if name.startswith("cpu") and e.crossover is not None)
"""Keys below which S2O pays on no CPU: so short calls do not make a compiler run to know it."""


def is_short(n_keys: int, min_seq_len: int | str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether keys are fewer than `shortest_sparse` says."""
    if min_seq_len == "auto" and device.type == "cpu" and n_keys < SHORT_ON_CPUS and "cpu" not in user_entries():
        return True
    return n_keys < shortest_sparse(min_seq_len, device, dtype)


def why_never(n_keys: int, min_seq_len: int | str, device: torch.device, dtype: torch.dtype) -> str:
    """Why attention over so many keys is dense at any length, and what to do; empty where it is short, or could pay."""
    if n_keys < LONG or shortest_sparse(min_seq_len, device, dtype) < NEVER:
        return ""
    kind = "CPU" if device.type == "cpu" else device.type
    return (
        f"{str(dtype).removeprefix('torch.')} on this {kind}: SDPA is faster at any length; "
        f"S2OConfig(min_seq_len={LONG}) runs it sparse all the same"
    )


@cache
def launch(device: torch.device, dim: int, dtype: torch.dtype) -> Launch:
    """The launch of the forward kernels for head dims up to ``dim``, a power of two."""
    if device.type != "cuda":  # the interpreter runs the H100's launches
        return _HOPPER.get((dim, dtype)) or _sound(dim, dtype, None)
    for entry in _entries(device_name(device), _kind(device)):
        if (dim, dtype) in entry.launches:
            return entry.launches[dim, dtype]
    properties = torch.cuda.get_device_properties(device)
    return _sound(dim, dtype, getattr(properties, "shared_memory_per_block_optin", 64 * 1024))


def _sound(dim: int, dtype: torch.dtype, shared_bytes: int | None) -> Launch:
    """A launch whose query tile and two steps of keys and values fit in shared memory."""
    if dtype == torch.float32:  # exact products run off the tensor cores: small blocks keep the registers
        return Launch(key_block=32 if dim <= 128 else 16, stages=1)
    row = dim * dtype.itemsize
    fits = [
        Launch(key_block=keys, stages=stages)
        for stages in (2, 1)
        for keys in (64, 32, 16)
        if shared_bytes is None or (TILE_LEN + 2 * stages * keys) * row <= shared_bytes
    ]
    return fits[0] if fits else Launch(key_block=16, stages=1)


def _kind(device: torch.device, *, in_torch: bool = False) -> str:
    """The name of a device in our own table: of a CPU also what computes there, and whether it has tiles."""
    if device.type != "cpu":
        return device_name(device)
    return (
        f"cpu in {'torch' if in_torch or not cpp_library.serves(device) else 'C++'}{' with AMX' if has_amx() else ''}"
    )


def _entries(name: str, kind: str) -> list[Entry]:
    """The entries of a device, the user's own by its name first, then ours by its kind."""
    own = user_entries().get(name)
    built_in = [entry for prefix, entry in BUILT_IN.items() if kind.startswith(prefix)]
    return built_in if own is None else [own, *built_in]


def user_file() -> Path:
    """The file that ``s2o tune`` writes and the operator reads."""
    named = os.environ.get(FILE_VARIABLE)
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(named) if named else Path(cache_home) / "s2o_compile" / "tuned.json").expanduser()


@cache
def user_entries() -> dict[str, Entry]:
    """The user's entries by device name, read once; a file that cannot be used is named in a warning, and ignored."""
    named = os.environ.get(FILE_VARIABLE)
    path = None
    try:
        path = user_file()
        if named == "" or (named is None and not path.exists()):
            return {}
        return parse(path.read_bytes())
    except (OSError, ValueError, RuntimeError) as error:
        if path is not None or named is not None:  # a user without a home has no file
            warn(
                f"{path or named}: expected a file of `s2o tune`, got {error}. It is ignored. Write it anew with "
                f"`s2o tune`, delete it, or let {FILE_VARIABLE} name another.",
                TunedFileWarning,
                each_machine=True,
            )
        return {}


_forgotten = 0


def generation() -> int:
    """A number that changes when the entries may have changed."""
    return _forgotten


def forget() -> None:
    """Read the user's file again at the next call, because it was written or another one was named."""
    global _forgotten
    _forgotten += 1
    for function in (user_entries, crossover, launch):
        function.cache_clear()


def parse(text: str | bytes) -> dict[str, Entry]:
    """Entries from a file's text, or from its bytes.

    Raises:
        ValueError: It is no such file; the message says what was found.
    """
    content = parse_json(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("devices"), dict):
        raise ValueError(f'no object with "format": {FORMAT} and "devices"')
    return {name: _entry(name, fields) for name, fields in content["devices"].items()}


def _entry(name: str, fields: Any) -> Entry:  # noqa: ANN401 (whatever the file holds)
    try:
        launches = {}
        for stored in fields.get("launches", ()):
            dtype = DTYPES[stored["dtype"]]
            chosen = {key: stored[key] for key in ("key_block", "num_warps", "stages", "maxnreg")}
            launches[stored["head_dim"], dtype] = Launch(**chosen)
        crossovers = {
            DTYPES[name]: NEVER if length == "never" else length
            for name, length in fields.get("crossovers", {}).items()
        }
        return Entry(crossover=fields.get("crossover"), crossovers=crossovers, launches=launches)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an entry of {shown(name)} that is not understood ({shown(error)})") from error
    except ValueError as error:
        raise ValueError(f"in the entry of {shown(name)} {error}") from error
