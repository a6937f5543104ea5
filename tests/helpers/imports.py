"""The product's modules and what each imports, read from the source.

Imports inside functions and under TYPE_CHECKING count.
"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS = ("kernels", "passes")
"""Real folders at the top, symlinks in ``s2o_compile``."""


@cache
def sources(folder):
    """The Python files of a folder and its rooms, each once: never through a symlink."""
    paths = (ROOT / folder).rglob("*.py")
    return sorted(p for p in paths if not any(parent.is_symlink() for parent in p.parents if parent != ROOT))


def product():
    return [path for folder in (*LAYERS, "s2o_compile") for path in sources(folder)]


@cache
def tree(path):
    return ast.parse(path.read_text())


def module_name(path):
    """The one name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "s2o_compile" else ("s2o_compile", *parts))


def short(path):
    """``kernels/core/mask.py``."""
    return path.relative_to(ROOT).as_posix()


def room_of(path):
    """The folder of a file: ``kernels/core``."""
    return short(path.parent)


def imported_names(path):
    """Every name that a file imports, dotted: modules, and what is taken from them."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports():
    """For each of the product's files, those that it imports. A room counts where no file of it is named."""
    files = {module_name(path): path for path in product()}
    found = {}
    for path in product():
        names = {name for name in imported_names(path) if name in files}
        plain = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
        found[path] = {files[name] for name in names - plain} - {path}
    return found


def circles(graph):
    """Sets of nodes that reach each other (Tarjan's components of more than one)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for after in graph[node]:
            if after not in index:
                visit(after)
                low[node] = min(low[node], low[after])
            elif after in stack:
                low[node] = min(low[node], index[after])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found
