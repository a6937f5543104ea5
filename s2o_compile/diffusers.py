"""S2O in diffusers models that are not compiled: in the place of diffusers' "native" attention backend.

    with s2o_compile.diffusers.native_attention(S2OConfig(tau=0.25)):
        image = pipeline(prompt)

diffusers' dispatcher knows its backends by an enumeration of its own, to which no name can be added, so
``set_attention_backend("s2o")`` cannot be had. Its "native" backend, the default, is plain SDPA: inside the block it is
S2O where attention is long, and SDPA everywhere else. Models that are compiled need none of this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from s2o_compile.config import S2OConfig, config_or_default
from s2o_compile.errors import ImplementationUnavailableError
from s2o_compile.functional import attention
from s2o_compile.kernels.core.validation import sizes_of
from s2o_compile.kernels.dispatch import is_short

_ARGUMENTS = {
    *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    *("return_lse", "_parallel_config"),
}


@contextmanager
def native_attention(config: S2OConfig | None = None) -> Iterator[None]:
    """Inside the ``with`` block diffusers' "native" attention backend runs S2O, for every model in the process.

    Args:
        config: Quality and implementation; None for the defaults. Sites have no names here, so ``dense_heads`` and
            ``site_tau`` change nothing.

    Raises:
        OptionError: The configuration is no S2OConfig.
        ImplementationUnavailableError: This version of diffusers dispatches attention in another way.
    """
    backends, name = _registry()
    native = backends[name]
    backends[name] = _sparse(native, config_or_default(config, "native_attention"))
    try:
        yield
    finally:
        backends[name] = native


def _registry() -> tuple[dict[Any, Callable[..., Tensor]], object]:
    """Diffusers' table of backends, and the name of the native one."""
    from diffusers.models import attention_dispatch

    try:
        backends, name = attention_dispatch._AttentionBackendRegistry._backends, attention_dispatch.AttentionBackendName
        arguments = inspect.signature(backends[name.NATIVE]).parameters.keys()
    except (AttributeError, KeyError) as error:
        raise _unknown(f"{type(error).__name__}: {error}") from error
    if arguments != _ARGUMENTS:
        raise _unknown(f"its arguments {', '.join(arguments)}")
    return backends, name.NATIVE


def _unknown(got: str) -> ImplementationUnavailableError:
    return ImplementationUnavailableError(
        f'diffusers: expected the "native" attention backend as diffusers 0.36 to 0.42 have it, got {got}. Compile the '
        'model instead: torch.compile(model, backend="s2o").'
    )


def _sparse(native: Callable[..., Tensor], config: S2OConfig) -> Callable[..., Tensor]:
    @wraps(native)
    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **given: Any) -> Tensor:  # noqa: ANN401
        """The backend, for [B, Nq, H, D], [B, Nk, H, D] and [B, Nk, H, Dv]."""
        heads_first = [x.transpose(1, 2) for x in (query, key, value)]
        others = (given.get(name) for name in ("dropout_p", "return_lse", "_parallel_config"))
        if (
            torch.compiler.is_compiling()
            or any(others)
            or sizes_of(*heads_first) is None
            or is_short(query, query.shape[1], key.shape[1], config.min_seq_len)
            or (attn_mask is not None and (given.get("is_causal") or not config.read_masks))
        ):
            return native(query, key, value, attn_mask, **given)
        mask: dict[str, Any] = {"attn_mask": attn_mask}
        if attn_mask is None:
            causal = bool(given.get("is_causal"))
            mask = {"causal": causal, "causal_offset": 0 if causal else None}
        elif attn_mask.shape == (query.shape[0], key.shape[1]):  # as the native one reads it
            mask = {"key_mask": attn_mask} if attn_mask.dtype is torch.bool else {"attn_mask": attn_mask[:, None, None]}
        output = attention(*heads_first, **mask, scale=given.get("scale"), config=config)
        assert isinstance(output, Tensor)
        return output.transpose(1, 2)

    return attend
