"""The configuration: `S2OConfig`, its checks, JSON, and the operator's keywords."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import torch

from s2o_compile.by_site import site_heads, site_taus
from s2o_compile.errors import OptionError
from s2o_compile.kernels.core.options import FIELDS, OperatorOptions
from s2o_compile.kernels.support.arguments import as_number, is_one_of, shown
from s2o_compile.kernels.support.errors import InputError
from s2o_compile.kernels.support.json_text import parse_json
from s2o_compile.kernels.support.old_names import Removed, current_names

LONGEST_NAME = 200
"""Characters of an unknown name that are compared with the known ones; the comparison is quadratic."""

RENAMED = {"list_per": "ranking_per"}
REMOVED = {
    "query_order": Removed("none", "no measurement was better with another order of queries. Leave it out."),
    "training": Removed("dense", "sparse training took longer than dense training. Leave it out."),
}


_USUAL_BACKENDS = ("inductor", "eager", "tensorrt")
"""Inner backends that need no look at Dynamo's table, which takes long to import."""


@dataclass(frozen=True, kw_only=True)
class S2OConfig(OperatorOptions):
    """How attention is made sparse. Frozen, keyword-only, checked on creation.

    Say ``tau``, ``error``, both, or neither. ``S2OConfig()`` is ``S2OConfig(tau=0.5, error=0.1)``: a call begins at tau
    0.5, and no attention errs more than 10 %, measured on sampled queries while it runs. ``S2OConfig(tau=0.5)``
    measures nothing and promises nothing. ``S2OConfig(error=0.05)`` begins where an error of 5 % is likely. Packages
    and FlexAttention cannot measure. They leave the default's error out, and say so; packages warn of another one, and
    FlexAttention refuses it.

    Attributes:
        tau: Quality against speed, a number >= 0. A tile of 128 queries stops once the estimated unvisited softmax
            mass, relative to the mass visited, falls below it in every row. The worst row decides, so values near 1
            leave far less unvisited on average; ``tau=0.0`` never stops and is exact. Or a tuple with one for each
            query head of every attention. None beside an error: the error says where a call begins.
        error: A ceiling of the relative L2 error of an attention's output, all heads together, from 0 (exact) to 1. It
            is measured on sampled queries of each head while a call runs. Heads go on where it is too large
            (``kernels/budget.py``). None beside a tau measures nothing. `s2o_compile.calibrate` finds the taus to begin
            with on your own text.
        site_tau: By site name, as ``explain`` lists it, tau of each of its query heads, as ``calibrate`` finds them;
            other sites go by ``error`` and ``tau``. They belong to the ``error`` that they were calibrated for: for
            another, calibrate again.
        min_seq_len: Key lengths below this run dense, in tokens. "auto" takes the measured crossover of the device:
            12288 on an H200, 16384 on an H100 and on GPUs that were not measured, 4096 on a CPU with a C++ compiler, or
            the result of ``s2o tune``.
        segment_len: Queries that share one ranking of the keys, a multiple of 128 up to 2**20. None chooses by length:
            512 up to 32K tokens (keys, if there are more of them than queries), 1024 beyond.
        ranking: "per_query" scores every query in a few dimensions and keeps retrieval alive. "mean_query" is the
            paper's and cheapest. It loses keys that only a few queries look for.
        ranking_per: "group" ranks once for the query heads that share a key/value head; "head" ranks for each query
            head: a fifth (16K) to a quarter (64K) less density at the same error (SmolLM2), for more index work.
        implementation: "auto" takes Triton on CUDA, C++ on a CPU with a C++ compiler, and torch elsewhere; "triton",
            "cpp", "torch" and "flex" insist. "flex" is FlexAttention over gathered keys: for devices without our
            kernels, and to compare with. On a CPU it compiles for every length anew and returns no log-sum-exp.
        dense_heads: Heads that run dense beside the sparse ones: site name, as ``explain`` lists it, to key/value heads
            (``{"model.layers.3.self_attn": (0, 2)}``). All query heads that share a marked key/value head run on SDPA,
            because they share one ranking. A window is exact already, so marks change nothing there.
            Reports list the marks, and names that no attention has. A head that a site does not have raises InputError
            when it runs.
        inner_backend: The torch.compile backend that compiles the rewritten graph: "inductor", or "eager" for no
            compilation at all, "tensorrt" for engines around the attention (needs torch-tensorrt), or any other that
            torch knows.
        assume_causal_mask: Your promise that every mask over queries and keys that *enters* a graph ([Nq, Nk] with up
            to two leading dimensions, bool or additive) is causal: query i sees exactly the keys j <= i + Nk - Nq.
            Such a mask cannot be proven, and its attention stays dense otherwise. If the promise is wrong, so is the
            result. Reports say "causal (promised)". A causal mask with padding in it is not causal.
        assume_block_masks: Your promise that every BlockMask that *enters* a graph lists exactly the blocks its
            mask_mod leaves visible, as ``create_block_mask`` makes them. The mask_mod of a ``flex_attention`` is
            proven, but its tables of blocks are data, and the attention stays as it is otherwise. If the promise is
            wrong, so is the result. Reports say "(promised)". Tables made inside the compiled function need none.
        read_masks: Whether the operator reads masks that could not be proven (they enter a graph behind a graph break,
            or are made of data) when it runs, from ``min_seq_len`` on: where every value agrees with a causal, sliding
            or padding mask it runs sparse, elsewhere SDPA runs under the mask. Reports say "(read at run time)". Costs
            one pass over the mask and one wait for the device a call. False leaves such attentions as they are.
        check_assumptions: Compare promised masks with the promise at run time. A mask that differs raises a
            RuntimeError. On CUDA nothing waits for the check: the error comes with the next synchronisation.
            Costs Nq x Nk flags of memory.

    Numbers of a library, such as NumPy's, become Python's; arrays and tensors are refused.

    Raises:
        OptionError: A value that its field cannot take.
    """

    site_tau: Mapping[str, Sequence[float]] = site_taus({})
    dense_heads: Mapping[str, Sequence[int]] = site_heads({})
    inner_backend: str = "inductor"
    assume_causal_mask: bool = False
    assume_block_masks: bool = False
    check_assumptions: bool = False
    read_masks: bool = True

    def __post_init__(self) -> None:
        if self.min_seq_len is None:  # as configurations were written before "auto" had its name
            object.__setattr__(self, "min_seq_len", "auto")
        try:
            super().__post_init__()
        except InputError as error:
            raise OptionError(error.reason) from error
        object.__setattr__(self, "dense_heads", site_heads(self.dense_heads))
        object.__setattr__(self, "site_tau", site_taus(self.site_tau))
        if self.error == 0.0 and self.site_tau:
            raise OptionError(
                f"error={self.error!r}, which is exact: expected no site_tau beside it, got "
                f"{shown(dict(self.site_tau))}. Leave out one of them."
            )
        for name in ("assume_causal_mask", "assume_block_masks", "check_assumptions", "read_masks"):
            given = getattr(self, name)
            if not isinstance(given, bool):
                raise OptionError(f"{name}: expected True or False, got {shown(given)}. Give one of them.")
        if is_one_of(self.inner_backend, _USUAL_BACKENDS):
            return
        # torch-tensorrt makes its backend known when it is imported, which is when it is needed.
        known = {*torch.compiler.list_backends(exclude_tags=()), "tensorrt"} - {"s2o"}
        if not is_one_of(self.inner_backend, known):
            named = {*torch.compiler.list_backends(), "eager", "tensorrt"} & known  # not those for torch's own tests
            raise OptionError(unknown_name("inner_backend", self.inner_backend, sorted(named)))

    @property
    def quality(self) -> str:
        """How the quality was chosen, in words: "tau 0.5", "error 0.1 from tau 0.5", "error 0.02, calibrated"."""
        if self.site_tau:
            return ("tau" if self.error is None else f"error {self.error:g},") + " calibrated"
        tau = "tau by head" if isinstance(self.tau, tuple) else "" if self.tau is None else f"tau {self.tau:g}"
        if self.error is None:
            return tau
        return f"error {self.error:g}" + (f" from {tau}" if tau else "")

    @property
    def options(self) -> OperatorOptions:
        """The operator's fields."""
        return self._options("") if torch.compiler.is_compiling() else self._options_of_calls

    @cached_property
    def _options_of_calls(self) -> OperatorOptions:
        """Kept, because every call without a site asks for them."""
        return self._options("")

    def operator_options(self, site: str = "") -> dict[str, Any]:
        """The keyword arguments of ``torch.ops.s2o.attention`` that make it sparse as this configuration says.

        Args:
            site: Name of the site whose ``site_tau`` and ``dense_heads`` count; "" for none.
        """
        marked = {"dense_heads": list(self.dense_heads[site])} if site in self.dense_heads else {}
        return (self._options(site) if site else self.options).to_op_kwargs() | marked

    def _options(self, site: str) -> OperatorOptions:
        fields: dict[str, Any] = {name: getattr(self, name) for name in FIELDS}
        fields["tau"] = self.site_tau.get(site, self.tau)
        return OperatorOptions(**fields)

    def to_json(self, about: Mapping[str, object] | None = None) -> str:
        """JSON text that ``from_json`` reads back to an equal configuration.

        Args:
            about: Where the configuration comes from, for whoever reads the text.
        """
        return json.dumps(({"about": about} if about else {}) | dataclasses.asdict(self), default=dict)

    @classmethod
    def from_json(cls, text: str | bytes) -> S2OConfig:
        """Configuration from the text of ``to_json``; missing fields take their defaults, "about" is left out."""
        if not isinstance(text, (str, bytes)):
            raise OptionError(
                f"S2OConfig.from_json: expected JSON text, got {shown(text)}. For a dict of fields there is "
                "S2OConfig.from_dict."
            )
        try:
            fields = parse_json(text)
        except ValueError as error:
            raise OptionError(
                f"S2OConfig.from_json: expected JSON, got {shown(text)}: {error}. Write it with S2OConfig.to_json."
            ) from error
        if not isinstance(fields, dict):
            raise OptionError(
                f"S2OConfig.from_json: expected a JSON object, got {type(fields).__name__}. Write it with "
                "S2OConfig.to_json."
            )
        return cls.from_dict({name: value for name, value in fields.items() if name != "about"})

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> S2OConfig:
        """Configuration from a mapping of field names; unknown names raise OptionError."""
        if not isinstance(fields, Mapping):
            raise OptionError(
                f"S2OConfig.from_dict: expected a mapping of field names, got {shown(fields)}. For the text of a file "
                "there is S2OConfig.from_json."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if not is_one_of(name, (*known, *RENAMED, *REMOVED)):
                raise OptionError(unknown_name("configuration field", name, known))
        return cls(**fields)  # pyright: ignore[reportArgumentType]


def _with_old_names(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def current(self: S2OConfig, **fields: object) -> None:
        try:
            fields = current_names(fields, RENAMED, REMOVED)
        except ValueError as error:
            raise OptionError(str(error)) from error
        init(self, **fields)

    return current


S2OConfig.__init__ = _with_old_names(S2OConfig.__init__)


def config_or_default(config: S2OConfig | None, who: str) -> S2OConfig:
    """The configuration that was given to a function, the defaults for None.

    Raises:
        OptionError: It is something else, such as a dict of fields.
    """
    if config is None:
        return S2OConfig()
    if not isinstance(config, S2OConfig):
        raise OptionError(
            f"{who}: config: expected an S2OConfig, got {type(config).__name__}. Write S2OConfig(tau=0.25); for a dict "
            "of fields there is S2OConfig.from_dict."
        )
    return config


def refuse_keywords(who: str, given: Iterable[str], instead: Mapping[str, str]) -> None:
    """Raise TypeError for a keyword that a function does not have, and say what to write instead, if that is known."""
    fields = [field.name for field in dataclasses.fields(S2OConfig)]
    for name in given:
        remedy = f"Pass config=S2OConfig({name}=...)." if name in fields else instead.get(name, "Leave it out.")
        raise TypeError(f"{who}() got an unexpected keyword argument {name!r}. {remedy}")


def check_error(name: str, error: object, *, least: float = 0.0) -> float:
    """The error budget as a float; OptionError if it is none."""
    found = as_number(error, least=least, most=1.0)
    if found is None:
        raise OptionError(
            f"{name}: expected a relative error between {least:g} and 1, got {shown(error)}. 0.02 allows the output of "
            "an attention to be 2 % off."
        )
    return found


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Message for a name that does not exist, with the nearest one that does."""
    known = list(known)
    hint = did_you_mean(name, known) or " Choose one of them."
    return f"unknown {kind} {shown(name)}: expected one of {', '.join(known)}.{hint}"


def did_you_mean(name: object, known: Sequence[str]) -> str:
    """A sentence with the nearest name that exists, behind a space; empty if none is near."""
    near = difflib.get_close_matches(name[:LONGEST_NAME], known, n=1) if isinstance(name, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""
