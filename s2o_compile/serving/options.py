"""The options of a server: environment variables, since servers pass no options to attention backends."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2o_compile.config import S2OConfig
from s2o_compile.errors import OptionError
from s2o_compile.kernels.support.arguments import shown

QUALITY = {"S2O_ERROR": "error", "S2O_TAU": "tau"}
"""Variables that say the quality, and their fields; none of them is set beside S2O_CONFIG."""

MIN_SEQ_LEN = "S2O_MIN_SEQ_LEN"
CONFIG = "S2O_CONFIG"


def config_from_environment(environment: Mapping[str, str] | None = None) -> S2OConfig:
    """The configuration that the environment describes; the defaults where it says nothing.

    ``S2O_ERROR=0.05`` and ``S2O_TAU=0.25`` are the fields `S2OConfig.error` and ``tau``, and may stand together.
    ``S2O_MIN_SEQ_LEN=8192`` (or ``auto``) is ``min_seq_len``. ``S2O_CONFIG=file`` reads JSON, as ``s2o calibrate``
    writes it. An empty variable counts as unset.

    Args:
        environment: Variables by name; None for those of this process.

    Raises:
        OptionError: A value that its field cannot take, a file that cannot be read, or one beside variables that say
            the quality.
    """
    given = os.environ if environment is None else environment
    said = [name for name in (*QUALITY, CONFIG) if given.get(name)]
    if len(said) > 1 and CONFIG in said:
        raise OptionError(
            f"{' and '.join(said)}: expected the quality from a file or from variables, got both. Unset {CONFIG}, or "
            "the others."
        )
    fields: dict[str, Any] = {field: _number(name, given[name]) for name, field in QUALITY.items() if given.get(name)}
    if given.get(MIN_SEQ_LEN):
        fields["min_seq_len"] = _tokens(given[MIN_SEQ_LEN])
    if given.get(CONFIG):
        return dataclasses.replace(_from_file(given[CONFIG]), **fields)
    try:
        return S2OConfig(**fields)
    except OptionError as error:
        raise OptionError(f"{', '.join(said) or MIN_SEQ_LEN}: {error}") from error


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"{name}: expected a number, got {shown(text)}. Write {name}=0.05, or unset it.") from error


def _tokens(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise OptionError(
            f'{MIN_SEQ_LEN}: expected a number of tokens, or "auto", got {shown(text)}. Write {MIN_SEQ_LEN}=8192, or '
            "unset it."
        )
    return int(text)


def _from_file(name: str) -> S2OConfig:
    try:
        text = Path(name).read_bytes()
    except OSError as error:
        raise OptionError(
            f"{CONFIG}: expected a file that can be read, got {shown(name)}: {error.strerror or error}. Name a file "
            "that `s2o calibrate` or S2OConfig.to_json wrote, or unset it."
        ) from error
    try:
        return S2OConfig.from_json(text)
    except OptionError as error:
        raise OptionError(f"{CONFIG}={name}: {error}") from error
