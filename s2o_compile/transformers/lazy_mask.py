"""A mask of transformers kept as a description. It becomes N x N numbers only if somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2o_compile.kernels.support.torch_compat import NoTorchFunction, make_wrapper_tensor, tree_map_only, version_of
from s2o_compile.passes.graph.rejected import Rejected
from s2o_compile.transformers.mask_functions import ProvenMask, prove_function
from s2o_compile.transformers.snapshots import snapshot

Value = TypeVar("Value")


class _Once(Generic[Value]):
    """A property of a mask, computed once. ``functools.cached_property`` takes a lock, which Dynamo cannot trace."""

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute, self._name = compute, compute.__name__

    def __get__(self, mask: Tensor, _: type) -> Value:
        value = self._compute(mask)
        setattr(mask, self._name, value)  # found before this property from now on
        return value


_OUTSIDE = frozenset({Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point})
"""Methods that need no data. Attributes that are no tensors need none either."""


class LazyMask(Tensor):
    """[B, 1, Nq, Nk], bool (True: may be attended) or added to the scores.

    It is made from copies of its arguments (`snapshot`), so that later changes of them do not count. Arguments that
    cannot be copied make the mask itself, at once.

    Layers of a model share it and its proof. Any operation on it makes the mask and works on that, so models can slice,
    invert or merge it. ``make`` is ``sdpa_mask`` or ``eager_mask`` of transformers, and takes the arguments of a mask
    interface.
    """

    _make: Callable[..., Tensor | None]
    _arguments: dict[str, Any] | Rejected
    _version_made: int | None

    @staticmethod
    def __new__(
        cls: type[LazyMask], make: Callable[..., Tensor | None], arguments: dict[str, Any], dtype: torch.dtype
    ) -> LazyMask:
        """A tensor without data."""
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        self = make_wrapper_tensor(cls, shape, dtype=dtype, device=arguments["device"])
        self._make, self._arguments = make, snapshot(arguments)
        if isinstance(self._arguments, Rejected):
            self.made = self._from(arguments)
        return self

    @_Once
    def made(self) -> Tensor:
        """The mask itself."""
        assert not isinstance(self._arguments, Rejected)
        return self._from(self._arguments)

    def _from(self, arguments: dict[str, Any]) -> Tensor:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        # Tensors of inference mode do not count who writes into them.
        with torch.inference_mode(False), torch.no_grad():
            mask = self._make(**arguments | skips)
        assert mask is not None
        self._version_made = version_of(mask)
        return mask

    @property
    def holds(self) -> bool:
        """Whether the description is still that of the mask: nobody who looked into it wrote into it."""
        return "made" not in vars(self) or version_of(self.made) == self._version_made is not None

    @_Once
    def or_none(self) -> Tensor | None:
        """The mask, or None where it hides nothing, or where SDPA's ``is_causal`` says the same (`skips_to_causal`)."""
        return self.made if isinstance(self._arguments, Rejected) else self._make(**self._arguments)

    @property
    def skips_to_causal(self) -> bool:
        """Whether None means causal. A module's own ``is_causal`` may differ from the mask that its model asks for."""
        given = self._arguments
        return self.dtype is torch.bool and not isinstance(given, Rejected) and given.get("allow_is_causal_skip", True)

    @property
    def fully_masked(self) -> str:
        """The output of a query that sees no key. A finite number added to all of its scores leaves the mean."""
        return "zeros" if self.dtype is torch.bool else "mean"

    @_Once
    def proven(self) -> ProvenMask | Rejected:
        """The mask as the operator knows it, or why it is none of the operator's. May wait for the device."""
        given = self._arguments
        if isinstance(given, Rejected):
            return given
        if given.get("use_vmap"):
            return Rejected("its function may mean something else for tensors than for single positions")
        queries = int(given.get("q_offset", 0)), self.shape[2]
        keys = int(given.get("kv_offset", 0)), self.shape[3]
        mask = prove_function(given["mask_function"], batch=self.shape[0], queries=queries, keys=keys)
        padding = given.get("attention_mask")
        if isinstance(mask, Rejected) or padding is None:
            return mask
        stop = keys[0] + keys[1]
        shown = pad(padding.bool(), (0, max(stop - padding.shape[1], 0)))[:, keys[0] : stop]
        return mask if shown.all() else replace(mask, mask=replace(mask.mask, key_mask=shown))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 (as torch passes them)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (what the operation returns)
        """The operation on the mask itself, made here: below, under the dispatcher, no vmap can be run."""
        if func is Tensor.contiguous and len(args) == 1 and not kwargs:
            return args[0]  # as a contiguous tensor does; generate() asks it of every mask
        if func in _OUTSIDE or getattr(func, "__name__", "") == "__get__":
            with NoTorchFunction():
                found = func(*args, **kwargs or {})
            if not isinstance(found, Tensor):
                return found
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (what the operation returns)
        """The same for operations that come from C++."""
        made = tree_map_only(cls, lambda mask: mask.made, (args, kwargs or {}))
        return func(*made[0], **made[1])

    def __repr__(self) -> str:
        return f"LazyMask({tuple(self.shape)}, device={str(self.device)!r})"
