"""The entry point of vLLM's general plugins: makes the backend "S2O" known in every process of a server."""

from __future__ import annotations

from functools import cache
from typing import Any

from s2o_compile.config import S2OConfig
from s2o_compile.serving.options import config_from_environment

NAME = "S2O"
CUDA = "s2o_compile.vllm.cuda.S2OBackend"
CPU = "s2o_compile.vllm.cpu.S2OCPUBackend"


@cache
def server_config() -> S2OConfig:
    """The configuration of this process, read once from its environment."""
    return config_from_environment()


def register() -> None:
    """Registers the backend for ``--attention-backend S2O``; every process does it, some several times.

    On a CPU vLLM takes its own backend whatever the name is. There a subclass stands in its place, which changes
    nothing unless "S2O" was asked for.

    Raises:
        OptionError: An environment variable has a value that it cannot take.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    server_config()
    member()
    register_backend(AttentionBackendEnum.CPU_ATTN, CPU)


def member() -> Any:  # noqa: ANN401 (vLLM's enumeration)
    """The backend's member of vLLM's enumeration, made on first use.

    A server's configuration is pickled for processes that are spawned, and read there before plugins are loaded.
    Members that vLLM has not made itself are unknown then: ours is pickled as a call of this function.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if NAME not in AttentionBackendEnum.__members__:
        made = AttentionBackendEnum.register(NAME, CUDA)
        made.__reduce_ex__ = lambda protocol: (member, ())
    return AttentionBackendEnum.__members__[NAME]
