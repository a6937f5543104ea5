"""Takes each private name of torch away, one a process, and tries the package without it; prints what fails as JSON.

Run as a script: it imports torch once and forks, so that every child imports the package anew. A rehearsal without
anything hidden says which names the import, the operator and compiled attentions never look up. Those cannot matter to
them: one child does this part for all of them, and forks again to hide each from `export` and `package`.
"""

import gc
import importlib
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import ClassVar

os.environ["S2O_TUNED"] = ""
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "kernels" / "support"
HOMES = ("torch_compat.py", "torch_compile.py", "torch_inductor.py")
HOME = "s2o_compile.kernels.support.torch_compat"
NAMED = re.compile(
    r'(?:_named|_later|_on_use|_attribute)\(\s*"([^"]+)"|NAMES\["([^"]+)"\]|^    "(torch\.[\w.]+)",$', re.MULTILINE
)
VMAP = ("_add_batch_dim", "_remove_batch_dim")
ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")


def paths():
    """Every name by its path, out of the sources: a child must not have imported the package before."""
    sources = "".join((FOLDER / name).read_text() for name in HOMES)
    found = [next(filter(None, groups)) for groups in NAMED.findall(sources)]
    functions = [f"torch.{module}.{name}" for module in ("_C._functorch", "_functorch.predispatch") for name in VMAP]
    functions += [f"torch.{module}._make_dual" for module in ("_functorch.predispatch", "_VF")]
    return sorted({*found, *functions, *(f"torch._higher_order_ops.triton_kernel_wrap.{name}" for name in ANALYSES)})


class Hiding(importlib.machinery.SourceFileLoader):
    """Loads the file of private names for a torch that lacks one of them."""

    hidden = ""
    looked_up: ClassVar[set[str]] = set()

    def get_data(self, path):
        source = super().get_data(path).decode()
        if not path.endswith(".py"):
            return source.encode()
        look_up = "    try:\n        return pkgutil.resolve_name(path)"
        assert look_up in source
        hide = "    __loader__.looked_up.add(path)\n    if path == __loader__.hidden:\n        return None\n"
        source = source.replace(look_up, hide + look_up, 1)
        last = 'path.rpartition(".")[2]'
        assert f"return {last}" in source
        gone = f'__loader__.looked_up.add(path)\n    return "gone" if path == __loader__.hidden else {last}'
        return source.replace(f"return {last}", gone).encode()

    def get_code(self, fullname):
        return compile(self.get_data(self.path), self.path, "exec")


class Finder:
    """Finds that file, and no other."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != HOME:
            return None
        file = str(FOLDER / "torch_compat.py")
        return importlib.util.spec_from_file_location(fullname, loader=Hiding(fullname, file))


def attend(q, k, v, pad):
    import torch

    index = torch.arange(k.shape[2])
    mask = (index <= index[:, None]) & pad[:, None, None]
    first = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.mT / 4
    scores += torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(q.dtype).min)
    second = scores.softmax(-1) @ v
    k.mul_(2)
    return first + second, torch.nn.functional.scaled_dot_product_attention(q, k, v)


def try_it():
    """The operator, an attention that gradients flow through, and a compiled function at two lengths."""
    import torch

    import s2o_compile
    from s2o_compile import S2OConfig

    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = torch.randn(3, 1, 2, 160, 16).unbind(0)
    exact = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
    near = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(
        s2o_compile.attention(q, k, v, causal=True, config=exact), sdpa(q, k, v, is_causal=True), **near
    )
    learned = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(s2o_compile.attention(learned, k, v, causal=True).sum(), learned)
    (expected,) = torch.autograd.grad(sdpa(learned, k, v, is_causal=True).sum(), learned)
    torch.testing.assert_close(gradient, expected, **near)
    module = type("Attend", (torch.nn.Module,), {"forward": lambda self, *inputs: attend(*inputs)})()
    compiled = s2o_compile.optimize(module, exact)
    for length in (160, 180, 190):
        inputs = torch.randn(3, 1, 2, length, 16).unbind(0)
        pad = torch.rand(1, length) > 0.1
        pad[:, 0] = True
        with torch.no_grad():
            actual = compiled(*(x.clone() for x in inputs), pad)
            expected = attend(*(x.clone() for x in inputs), pad)
        torch.testing.assert_close(actual, expected, **near)


class Reached(Exception):
    """Raised where Inductor would compile."""


def try_to_package(path):
    """`export` and `package`, but for Inductor itself: they work, or name what is missing."""
    import torch

    import s2o_compile

    def forward(_, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    module = type("Attend", (torch.nn.Module,), {"forward": forward})()
    inputs = tuple(torch.randn(3, 1, 2, 160, 16).unbind(0))
    try:
        program = s2o_compile.export(module, inputs)
        from s2o_compile.kernels.support import torch_inductor

        def reached(*_, **__):
            raise Reached  # noqa: TRY301

        kept = torch_inductor.aoti_compile_and_package
        if not isinstance(kept, sys.modules[HOME].Missing):
            torch_inductor.aoti_compile_and_package = reached
        with tempfile.TemporaryDirectory() as folder:
            s2o_compile.package(program, Path(folder) / "model.pt2")
    except s2o_compile.MissingTorchNameError as error:
        assert f"a torch with {path}, got" in str(error)  # noqa: PT017
        assert sys.modules[HOME].NAMES[path] in str(error)  # noqa: PT017
    except Reached:
        names = sys.modules[HOME]
        assert path not in names._NEEDED or names.NAMES[path] != "packages"
    else:
        raise AssertionError("compiled")


def in_a_child(function, *arguments):
    """What a function returns in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            with os.fdopen(write, "w") as answer:
                json.dump(function(*arguments), answer)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        result = answer.read()
    os.waitpid(child, 0)
    return json.loads(result)


def rehearse():
    """The names that are looked up before anything is packaged, and every module that is imported to the end."""
    try_it()
    looked_up = [*Hiding.looked_up]
    try_to_package("")
    return looked_up, [name for name in sys.modules if name.partition(".")[0] not in ("s2o_compile", "__main__")]


def problem_without(path):
    """The problem without a name, empty if there is none."""
    Hiding.hidden = path
    try:
        if HOME not in sys.modules:
            try_it()
        try_to_package(path)
        names = sys.modules[HOME]
        assert path in names.ATTRIBUTES or names._find(path) is None
    except BaseException as error:  # told to the parent
        return f"{type(error).__name__}: {error} {traceback.format_exc()[-1500:]}"
    return ""


def problems_in_packages(tried):
    """The same of names that only `export` and `package` could look up."""
    try_it()
    assert Hiding.looked_up.isdisjoint(tried)
    return {path: in_a_child(problem_without, path) for path in tried}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    sys.meta_path.insert(0, Finder)
    tried = sys.argv[1:] or paths()
    early, modules = in_a_child(rehearse)
    for name in modules:
        importlib.import_module(name)
    gc.freeze()
    problems = {path: in_a_child(problem_without, path) for path in tried if path in early}
    problems |= in_a_child(problems_in_packages, [path for path in tried if path not in early])
    print(json.dumps(problems))
