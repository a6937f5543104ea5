"""Names of sites: the path of the module that holds an attention, from the model on.

Dynamo writes as source code of the captured frame where it found a module: ``L['self'].model.layers.0``, behind a
decorator ``L['args'][0].model.layers.0``, in a function ``G['net'].model.layers.0``. The first module on that way is
the model, which knows the paths of its modules. So a site has one name, however its model is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from s2o_compile.kernels.support.torch_compile import captured_frame, names_of_modules, wraps_one_module

_STEP = re.compile(r"\[(['\"]?)(?P<key>[^\]]*)\1\]|\.?(?P<name>[^.\[\]]+)")


def module_paths(nodes: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """The path of each node's module, such as ``model.layers.0.self_attn``; the node's own name outside modules.

    If the nodes belong to several models, as in a function that calls two, paths begin with the name of the model.

    Args:
        nodes: To each the path from its module to the one that it stands for, which is "" for most.
    """
    frame, known = captured_frame(), {}
    found = {node: _path(node, frame, known) for node in nodes}
    models = {model for model, path in found.values() if model or path}
    return {
        node: ".".join(part for part in (model if len(models) > 1 else "", path, nodes[node]) if part) or node.name
        for node, (model, path) in found.items()
    }


def module_at(key: str, source: str) -> nn.Module | None:
    """The module that an entry of Dynamo's stack of modules is about, by its key and source; None if nobody knows."""
    models = _models(_steps(source), captured_frame())  # one may hold another in a plain list, unregistered
    modules = (module for _, model in models for module in model.modules())
    return next((module for module in modules if str(id(module)) == key.partition("@")[0]), None)


def unique_names(names: Sequence[str]) -> list[str]:
    """Names made unique: a module that attends twice becomes ``attn`` and ``attn#2``."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def _path(node: fx.Node, frame: Mapping[str, Any], known: dict[nn.Module, dict[str, str]]) -> tuple[str, str]:
    """The name of the model that a node belongs to, and the path of the node's module in it.

    ``known`` keeps the paths of each model's modules by their ids, which are Dynamo's keys of the stack.
    """
    stack = {key: entry for key, entry in (node.meta.get("nn_module_stack") or {}).items() if isinstance(entry, tuple)}
    if not stack:
        return "", ""
    key, (source, _) = list(stack.items())[-1]
    steps = _steps(source)
    if steps[:1] not in (["L"], ["G"]):  # a path already, as torch.export writes it
        wrappers = {len(_steps(path)) for path, kind in stack.values() if wraps_one_module(kind)}
        return "", ".".join(step for at, step in enumerate(steps) if at not in wrappers)
    count, model = _model(steps, frame)
    if model is not None and model not in known:
        known[model] = {str(id(module)): name for module, name in names_of_modules(model).items()}
    path = None if model is None else known[model].get(key.partition("@")[0])
    return _title(steps[:count]), ".".join(steps[count:]) if path is None else path


def _model(steps: Sequence[str], frame: Mapping[str, Any]) -> tuple[int, nn.Module | None]:
    """The number of steps to the first module, and that module; the variable and None if nobody knows its value."""
    return next(_models(steps, frame), (min(2, len(steps)), None))


def _models(steps: Sequence[str], frame: Mapping[str, Any]) -> Iterator[tuple[int, nn.Module]]:
    """The modules that the steps lead through, outermost first, each with the number of steps to it."""
    found: Any = frame
    for count, step in enumerate(steps, 1):
        try:
            is_table = isinstance(found, Mapping | Sequence)
            found = found[int(step) if step.isdigit() else step] if is_table else getattr(found, step)
        except Exception:  # whatever objects of users raise: a name is no reason to fail
            return
        if isinstance(found, nn.Module):
            yield count, found


def _title(model: Sequence[str]) -> str:
    """The last name on the way to a model, with its place in a list."""
    return ".".join(model[max(at for at, step in enumerate(model) if not step.isdigit()) :])


def _steps(source: str) -> list[str]:
    return [match["name"] if match["key"] is None else match["key"] for match in _STEP.finditer(source)]
