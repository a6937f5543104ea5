"""``package``: an exported program as an AOTInductor package, which runs where there is torch and nothing of ours."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import fx
from torch.export import ExportedProgram

import s2o_compile.kernels.ops  # noqa: F401  (defines torch.ops.s2o)
from s2o_compile.errors import PackageError
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.tuned import LONG, crossover, why_never
from s2o_compile.kernels.dispatch import WIDEST_FLOAT32
from s2o_compile.kernels.support.errors import warn
from s2o_compile.kernels.support.files import try_writing
from s2o_compile.kernels.support.torch_compat import schema_of

_SPARSE = torch.ops.s2o.attention.default
_MASKED = torch.ops.s2o.masked_attention.default
_PACKED = torch.ops.s2o.packed_attention.default
_BY_SEQUENCE = ("s2o.attention_varlen.default", "s2o.attention_paged.default")

_OWN_OPTIONS = {"joint_custom_pre_pass", "use_joint_graph_passes"}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that was written.

    Attributes:
        path: The file, for ``torch._inductor.aoti_load_package`` and ``torch::inductor::AOTIModelPackageLoader``.
        sparse: Names of the attentions that run sparse in it, from their ``min_seq_len`` on.
        dense: By name, why others that are sparse in the program run dense in the package.
        unheld_error: The largest error ceiling of the sparse ones, which a package does not measure: they go by their
            tau. None where there is none.
    """

    path: Path
    sparse: tuple[str, ...]
    dense: Mapping[str, str]
    unheld_error: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.sparse)} attentions sparse, {len(self.dense)} dense"]
        lines += [f"  - {name}: {reason}" for name, reason in self.dense.items()]
        if self.unheld_error is not None:
            lines.append(f"error {self.unheld_error:g} not held: a package measures nothing and goes by tau")
        return "\n".join(lines)


def package(program: ExportedProgram, path: str | Path, *, options: Mapping[str, Any] | None = None) -> Package:
    """Compile a program of `export` ahead of time, for the device that it was exported on.

    The result runs without this project: every sparse attention is replaced by its decomposition. It runs dense below
    ``min_seq_len``, as the program does. "auto" becomes a number here, so package on the kind of device that will run
    it. Any length that ``dynamic_shapes`` left open runs. The longest length decides every choice by length, so give
    ``Dim("n", max=...)`` a maximum.

    Args:
        program: The result of `export`, or of ``torch.export.load``.
        path: File to write, ending in ``.pt2``.
        options: Any Inductor option, but ``joint_custom_pre_pass`` and ``use_joint_graph_passes``.

    Raises:
        TypeError: The program is no ``ExportedProgram``.
        PackageError: A package cannot hold what an attention asks for. Or ``options`` holds what `package` sets itself.
            Or this torch is outside the tested range, or its Inductor cannot compile the program, or skips the pass
            that replaces s2o operators. Or the C++ compiler (environment variable CXX) makes libraries that crash.
        MissingTorchNameError: This torch lacks a private name that packages need.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"package: expected a torch.export.ExportedProgram, got {type(program).__name__}. Call "
            "s2o_compile.export(model, args) first."
        )
    path = Path(path)
    if path.suffix != ".pt2":
        raise PackageError(f"package: expected a path that ends in .pt2, got {str(path)!r}. Rename it.")
    if not path.resolve().parent.is_dir():
        raise PackageError(f"package: expected a path in a directory that exists, got {str(path)!r}. Make it first.")
    try:
        try_writing(path)  # before minutes of compilation
    except OSError as error:
        raise PackageError(f"package: expected a path that may be written, got {error}. Give another.") from error
    sparse, dense, on_cpu = [], {}, True
    unheld: list[float] = []
    asked: list[float] = []
    _check_sequences(program)
    for node in _attentions(program):
        name, call = str(node.kwargs.get("site") or node.name), _arguments(node)
        _check(name, call)
        quality = OperatorOptions(tau=tuple(call["head_tau"] or ()) or call["tau"], error=call["error"])
        on_cpu = on_cpu and call["query"].device.type == "cpu"
        if reason := _why_dense(node, call):
            dense[name] = reason
        else:
            sparse.append(name)
            if quality.ceiling is not None:
                unheld.append(quality.ceiling)
                asked += [] if quality.has_default_ceiling else [quality.ceiling]
    if asked:
        warn(
            f"package: an error budget of {max(asked):g} is not measured in a package, which attends at the tau of "
            "the budget, or at calibrated ones, and never goes on. Calibrate, and check the taus alone: "
            "s2o_compile.evaluate(model, batches, dataclasses.replace(config, tau=0.5, error=None))."
        )
    taken = sorted(_OWN_OPTIONS & set(options or {}))
    if taken and on_cpu:
        raise PackageError(
            f"package: options: expected none of {', '.join(sorted(_OWN_OPTIONS))}, which run the pass that replaces "
            f"s2o operators, got {', '.join(taken)}. Leave them out; joint_custom_post_pass is free."
        )
    # Slow to import.
    from s2o_compile.aot.inductor_workarounds import inductor_workarounds
    from s2o_compile.aot.lower_ops import DecomposeS2OOps
    from s2o_compile.kernels.support import torch_inductor

    with torch.no_grad(), inductor_workarounds():
        decompose, ours = DecomposeS2OOps(_decompositions()), {}
        if on_cpu:
            ours = {"joint_custom_pre_pass": decompose, "use_joint_graph_passes": True}
        else:  # attentions that share a trace have not been tried on a GPU yet
            program = program.run_decompositions(_decompositions())
        try:
            written = torch_inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=ours | dict(options or {})
            )
        except torch_inductor.InductorError as error:
            said = str(error).strip().partition("\n")[0]
            raise PackageError(
                f"package: expected a program that Inductor compiles, got from that of torch {torch.__version__}: "
                f"{said}. Use torch 2.13, whose Inductor compiles packages for a CPU (that of 2.11 does not), or run "
                "the program."
            ) from error
    if on_cpu and not decompose.ran:
        Path(written).unlink()
        raise PackageError(
            "package: expected Inductor to run joint_custom_pre_pass, which replaces s2o operators, got a package "
            "without. Leave Inductor's passes on (torch._inductor.config, TORCHINDUCTOR_... variables)."
        )
    _check_library(Path(written))
    return Package(path=Path(written), sparse=tuple(sparse), dense=dense, unheld_error=max(unheld, default=None))


def _check_library(written: Path) -> None:
    """Remove a package and raise PackageError where its code brings a C++ library of its own (on Linux).

    Torch has loaded one already, and two C++ libraries in one process do not share their state. Loading ended in a
    segmentation fault (std::regex in torch's loader, on a host whose compiler had nothing but libstdc++.a).
    """
    if sys.platform != "linux":
        return
    with zipfile.ZipFile(written) as archive:
        libraries = [_named(archive.open(name)) for name in archive.namelist() if name.endswith(".so")]
    if any(b"libtorch" in names and not names & {b"libstdc++.so", b"libc++.so"} for names in libraries):
        from s2o_compile.kernels.support.torch_inductor import cpp_compiler

        written.unlink()
        raise PackageError(
            "package: expected a C++ compiler that links its standard library dynamically, got "
            f"{cpp_compiler()}, which links it statically: with torch's own in the same process it "
            "would crash. Set the environment variable CXX to another compiler, such as /usr/bin/g++, and start anew."
        )


def _named(library: IO[bytes]) -> set[bytes]:
    """The C++ libraries that a library names. Read block by block, because it may hold the weights, too."""
    names, end = {b"libtorch", b"libstdc++.so", b"libc++.so"}, b""
    found: set[bytes] = set()
    while block := library.read(2**24):
        found |= {name for name in names if name in end + block}
        end = block[-16:]
    return found


def _attentions(program: ExportedProgram) -> Iterator[fx.Node]:
    """Every call of an s2o operator, in the graph and in its branches."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from (node for node in module.graph.nodes if node.target in (_SPARSE, _MASKED, _PACKED))


def _check_sequences(program: ExportedProgram) -> None:
    """Raise PackageError for attention over packed sequences or pages: their lengths are data."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if str(node.target) in _BY_SEQUENCE:
                raise PackageError(
                    f"package: {node.kwargs.get('site') or node.name}: expected attention over tensors of one length, "
                    f"got {node.target}, which has no decomposition. Run the exported program instead."
                )


def _decompositions() -> dict[Any, Any]:
    """For every operator a function of torch's own operators that computes it."""
    from s2o_compile.kernels.impl.aot import attention as decomposition  # imports torch's loops and branches

    def attention(query: torch.Tensor, *given: Any, min_seq_len: int | None = None, **keywords: Any) -> Any:  # noqa: ANN401
        shortest = crossover(query.device, query.dtype, packaged=True) if min_seq_len is None else min_seq_len
        return decomposition.attention(query, *given, min_seq_len=shortest, **keywords)

    return {_SPARSE: attention, _MASKED: decomposition.masked_attention, _PACKED: decomposition.packed_attention}


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name; tensors as fake values."""
    declared = schema_of(node.target).arguments
    given = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    given |= dict(zip((argument.name for argument in declared), node.args, strict=False)) | dict(node.kwargs)
    return {name: x.meta["val"] if isinstance(x, fx.Node) else x for name, x in given.items()}


def _check(name: str, call: Mapping[str, Any]) -> None:
    """Raise PackageError for a call that has no decomposition, and that dense attention must not replace silently."""
    device = call["query"].device.type
    own = {"cpu": "torch", "cuda": "triton"}.get(device)
    allowed = {"ranking": ("per_query",), "ranking_per": ("group",), "implementation": ("auto", own)}
    for option, expected in allowed.items():
        if call[option] not in expected:
            raise PackageError(
                f"package: {name}: {option}: expected {expected[0]!r} in a package for {device}, got {call[option]!r}. "
                f"Export with S2OConfig({option}={expected[0]!r})."
            )
    if own is None:
        raise PackageError(f"package: {name}: expected a program on cpu or cuda, got {device}. Export it there.")
    if call.get("return_lse"):
        raise PackageError(
            f"package: {name}: expected no log-sum-exp, got return_lse=True, which dense attention in a package "
            "does not have. Leave it out."
        )
    if device == "cuda" and call["query"].dtype == torch.float32 and call["query"].shape[3] > WIDEST_FLOAT32:
        raise PackageError(
            f"package: {name}: expected a head_dim of at most {WIDEST_FLOAT32} in float32 on CUDA, got "
            f"{call['query'].shape[3]}. Export the model in bfloat16 or float16."
        )


def _why_dense(node: fx.Node, call: Mapping[str, Any]) -> str:
    """Why an attention runs dense in a package, exactly; empty where it does not."""
    if node.target is _MASKED:
        return "its mask is read at run time, and what it says decides in Python"
    if node.target is _PACKED:
        return "its documents are data, and what they are decides in Python"
    if call["attention_chunk"] is not None:
        return "chunked attention cuts lengths that a package does not know"
    if call["scale"] is not None and call["scale"] <= 0:
        return "its scale is not positive"
    if len(set(call["dense_heads"] or ())) == call["key"].shape[1]:
        return "all its heads are marked dense"
    shortest, device, dtype = call["min_seq_len"], call["query"].device, call["query"].dtype
    shortest = crossover(device, dtype, packaged=True) if shortest is None else shortest
    return why_never(LONG, shortest, device, dtype)
