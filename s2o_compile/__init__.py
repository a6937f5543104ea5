"""s2o_compile: long prompts made fast by a compiler pass.

model = s2o_compile.optimize(model)               # wrap
model = torch.compile(model, backend="s2o")       # or as a backend, found by entry point
print(s2o_compile.explain(model, input_ids))      # what was rewritten, and why the rest was not
print(s2o_compile.status(model))                  # what ran sparse so far, and what did not
print(s2o_compile.evaluate(model, input_ids))     # what it costs in quality
print(s2o_compile.bench(model, input_ids))        # how much faster it is, and from which length on
config = s2o_compile.calibrate(model, batches, error=0.02)  # what keeps a budget on your own text
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from itertools import pairwise
from typing import TYPE_CHECKING


def _leave(*_: object) -> None:
    os._exit(130)


# The command line loads for seconds: Ctrl-C ends it there and then. `s2o_compile.__main__` takes the handler back.
_IS_COMMAND = os.path.basename((sys.argv or [""])[0]) == "s2o" or ("-m", __name__) in pairwise(sys.orig_argv)
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)

import torch

from s2o_compile.api import explain, optimize, status
from s2o_compile.config import S2OConfig
from s2o_compile.errors import (
    AttentionImplementationWarning,
    DenseExportWarning,
    DenseGradientWarning,
    DumpError,
    EvaluationError,
    ExportError,
    ImplementationUnavailableError,
    InputError,
    LoadingError,
    MissingTorchNameError,
    NothingRewrittenWarning,
    OptionError,
    PackageError,
    RankError,
    S2OError,
    TensorRTUnavailableError,
    TunedFileWarning,
    UnknownSiteWarning,
    UntestedTorchWarning,
    UnusedWeightsWarning,
    WholeLogitsWarning,
)
from s2o_compile.functional import attention
from s2o_compile.kernels.support.errors import warn
from s2o_compile.kernels.support.torch_compat import FIRST_TESTED, LAST_TESTED, TESTED, torch_release
from s2o_compile.planning import S2OPlan, plan
from s2o_compile.recording import Recording, record
from s2o_compile.report import Report, Site, Status

if TYPE_CHECKING:
    from s2o_compile.aot.export import export
    from s2o_compile.aot.package import Package, package
    from s2o_compile.quality.calibrate import calibrate
    from s2o_compile.quality.evaluate import evaluate
    from s2o_compile.quality.evaluation import Evaluation
    from s2o_compile.quality.tasks.evaluate import evaluate_tasks
    from s2o_compile.quality.tasks.scores import TaskScores
    from s2o_compile.speed.bench import bench
    from s2o_compile.speed.benchmark import Benchmark
    from s2o_compile.varlen import PrefillCache, attention_paged, attention_varlen

if not FIRST_TESTED <= torch_release() <= LAST_TESTED:
    warn(
        f"s2o_compile: expected torch {TESTED}, got {torch.__version__}, which is untested. Install a torch of that "
        "range if something fails.",
        UntestedTorchWarning,
        each_machine=True,
    )

_LOADED_ON_FIRST_USE = {
    "Benchmark": "speed.benchmark",
    "Evaluation": "quality.evaluation",
    "Package": "aot.package",
    "PrefillCache": "varlen",
    "TaskScores": "quality.tasks.scores",
    "attention_paged": "varlen",
    "attention_varlen": "varlen",
    "bench": "speed.bench",
    "calibrate": "quality.calibrate",
    "evaluate": "quality.evaluate",
    "evaluate_tasks": "quality.tasks.evaluate",
    "export": "aot.export",
    "package": "aot.package",
}

__version__ = "0.1.0"
__all__ = [
    "AttentionImplementationWarning",
    "Benchmark",
    "DenseExportWarning",
    "DenseGradientWarning",
    "DumpError",
    "Evaluation",
    "EvaluationError",
    "ExportError",
    "ImplementationUnavailableError",
    "InputError",
    "LoadingError",
    "MissingTorchNameError",
    "NothingRewrittenWarning",
    "OptionError",
    "Package",
    "PackageError",
    "PrefillCache",
    "RankError",
    "Recording",
    "Report",
    "S2OConfig",
    "S2OError",
    "S2OPlan",
    "Site",
    "Status",
    "TaskScores",
    "TensorRTUnavailableError",
    "TunedFileWarning",
    "UnknownSiteWarning",
    "UntestedTorchWarning",
    "UnusedWeightsWarning",
    "WholeLogitsWarning",
    "attention",
    "attention_paged",
    "attention_varlen",
    "bench",
    "calibrate",
    "evaluate",
    "evaluate_tasks",
    "explain",
    "export",
    "optimize",
    "package",
    "plan",
    "record",
    "status",
]


def __getattr__(name: str) -> object:
    if name not in _LOADED_ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LOADED_ON_FIRST_USE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
