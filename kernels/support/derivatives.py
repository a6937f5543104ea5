"""Who takes derivatives of a call: gradients, tangents, transforms of ``torch.func``, a forward that is run again.

``requires_grad`` shows the gradients of plain autograd alone. A tangent (``dual_level``, ``torch.func.jvp``) needs no
grad mode. Under ``vmap`` a tensor hides the gradients of the levels below. In the forward of an ``autograd.Function``
nothing requires a gradient, until a reentrant checkpoint runs it again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2o_compile.kernels.support import torch_compat


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether derivatives of a function of these tensors are wanted, or may be once it is run again.

    In doubt they are: somebody may differentiate by other tensors alone.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    if torch.compiler.is_compiling():  # each level of a transform that is traced asks the operator
        return in_forward_mode()
    return in_forward_mode() or bool(_levels()) or may_run_again()


def in_forward_mode() -> bool:
    """Whether a level of forward-mode derivatives is open, or this torch does not say."""
    return getattr(forward_ad, torch_compat.forward_level, 0) >= 0


def is_taken(*values: object) -> bool:
    """Whether a derivative by one of these is taken for sure: it carries a tangent, or a transform tracks it.

    Each level of nested transforms calls an operator by itself, and asks here for itself.
    """
    transformed = torch_compat.interpreter_stack() is not None
    if not transformed and not in_forward_mode():
        return False
    tracked = transformed and torch.is_grad_enabled()
    return has_tangent(*values) or (tracked and any(isinstance(x, Tensor) and x.requires_grad for x in values))


def has_tangent(*values: object) -> bool:
    """Whether one of these is a tensor that carries a tangent at the current level."""
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x, level=0).tangent is not None for x in values)


def may_run_again() -> bool:
    """Whether the forward of an ``autograd.Function`` runs: there both modes are off, under ``no_grad`` but one."""
    return not (torch.is_grad_enabled() or torch_compat.forward_mode_enabled() or torch.is_inference_mode_enabled())


def every_derivative(*, forward: bool = False) -> AbstractContextManager[object]:
    """A block in which SDPA has the derivatives that are taken, ``forward`` ones if that is known.

    Its fused kernels have one backward, and no derivative in forward mode. Its plain kernel holds all Nq x Nk scores.
    """
    levels = () if torch.compiler.is_compiling() else _levels()
    several = forward or in_forward_mode() or "Jvp" in levels or len(levels) > 1
    return sdpa_kernel(SDPBackend.MATH) if several else nullcontext()


def _levels() -> tuple[str, ...]:
    """The levels of ``torch.func`` that differentiate, "Grad" or "Jvp", outermost first."""
    kinds = torch_compat.TransformType
    names = {} if kinds is None else {kinds.Grad: "Grad", kinds.Jvp: "Jvp"}
    stack = torch_compat.interpreter_stack() or ()
    return tuple(names[level.key()] for level in stack if level.key() in names)
