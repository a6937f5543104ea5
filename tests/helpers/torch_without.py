"""Takes each private name of torch away, one a process, and tries the package without it; prints what fails as JSON.

Run as a script: it imports torch once and forks, so that every child imports the package anew.
"""

import importlib.machinery
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

os.environ["S2O_TUNED"] = ""
ROOT = Path(__file__).parents[2]
HOME = "s2o_compile.kernels.support.torch_compat"
NAMED = re.compile(r'(?:_named|_later)\(\s*"([^"]+)"|NAMES\["([^"]+)"\]')


def paths():
    """Every name by its path, out of the source: a child must not have imported the package before."""
    source = (ROOT / "kernels" / "support" / "torch_compat.py").read_text()
    found = [first or second for first, second in NAMED.findall(source)]
    functions = [f"torch.{module}.{name}" for module in ("_C._functorch", "_functorch.predispatch") for name in VMAP]
    return sorted({*found, *functions})


IN_CLASSES = ("._cdata", "._erased")
VMAP = ("_add_batch_dim", "_remove_batch_dim")


class Hiding(importlib.machinery.SourceFileLoader):
    """Loads the file of private names for a torch that lacks one of them."""

    hidden = ""

    def get_data(self, path):
        source = super().get_data(path).decode()
        if not path.endswith(".py"):
            return source.encode()
        look_up = f"    if path == {self.hidden!r}:\n        return None\n    parts = path.split"
        source = source.replace("    parts = path.split", look_up, 1)
        last = self.hidden.rpartition(".")[2]
        for holder in ("node", "x.untyped_storage()"):
            source = source.replace(f'getattr({holder}, "{last}"', f'getattr({holder}, "gone"')
        return source.encode()

    def get_code(self, fullname):
        return compile(self.get_data(self.path), self.path, "exec")


class Finder:
    """Finds that file, and no other."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != HOME:
            return None
        file = str(ROOT / "kernels" / "support" / "torch_compat.py")
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


def problem_without(path):
    """What fails without a name, empty if nothing does."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        problem = ""
        try:
            Hiding.hidden = path
            sys.meta_path.insert(0, Finder)
            try_it()
            assert path.endswith(IN_CLASSES) or sys.modules[HOME]._find(path) is None
        except BaseException as error:  # told to the parent
            problem = f"{type(error).__name__}: {error}"[:2000]
        os.write(write, problem.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        problem = answer.read()
    os.waitpid(child, 0)
    return problem


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    tried = sys.argv[1:] or paths()
    print(json.dumps({path: problem_without(path) for path in tried}))
