"""Random modules around an attention, as code: projections, layouts, masks, and writes to anything at any place."""

from __future__ import annotations

import random
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.helpers import writers

HEAD_DIM = 8
_SCOPE = {
    "torch": torch,
    "nn": nn,
    "F": nn.functional,
    "INF": float("inf"),
    "flex_attention": flex_attention,
    "create_block_mask": create_block_mask,
    **{name: getattr(writers, name) for name in ("WRITERS", "BOOL_WRITERS", "INTEGER_WRITERS")},
}


@dataclass
class Module:
    """A random module.

    Attributes:
        seed: That it was drawn from.
        heads: Query heads.
        key_heads: Key/value heads.
        lengths: New tokens and cached ones of each call.
        batch: B.
        dtype: Of inputs and weights.
        dynamic: Whether lengths are dynamic from the first call on.
        read_masks: Whether masks are read that are not proven.
        lines: Of ``forward(self, x, cache, pad, alias)``; x [B, N, E], cache [B, M, E], pad bool [B, M + N], True for
            tokens, alias a view into the cache.
    """

    seed: int
    heads: int = 4
    key_heads: int = 4
    lengths: list[tuple[int, int]] = field(default_factory=list)
    batch: int = 2
    dtype: torch.dtype = torch.float32
    dynamic: bool = False
    read_masks: bool = True
    lines: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """The module as code."""
        width, inner, outer = self.heads * HEAD_DIM, self.heads * HEAD_DIM, self.key_heads * HEAD_DIM
        head = f"""
            class Module(nn.Module):  # seed {self.seed}, {self.dtype}, lengths {self.lengths}, batch {self.batch}
                def __init__(self):
                    super().__init__()
                    self.q, self.o = nn.Linear({width}, {inner}), nn.Linear({inner}, {width})
                    self.k, self.v = nn.Linear({width}, {outer}), nn.Linear({width}, {outer})
                    self.heads = nn.MultiheadAttention({width}, {self.heads}, batch_first=True)

                def forward(self, x, cache, pad, alias):
        """
        return textwrap.dedent(head).strip() + "\n" + textwrap.indent("\n".join(self.lines), " " * 8)

    def build(self) -> nn.Module:
        """The module with weights of its seed."""
        scope = dict(_SCOPE)
        exec(compile(self.source, "<fuzz>", "exec"), scope)
        torch.manual_seed(self.seed)
        return scope["Module"]().eval()

    def inputs(self, call: int) -> tuple[torch.Tensor, ...]:
        """The inputs of one call in float64; the last one is a view into the second."""
        generator = torch.Generator().manual_seed(self.seed * 31 + call)
        new, old = self.lengths[call]
        width = self.heads * HEAD_DIM
        x = torch.randn(self.batch, new, width, generator=generator, dtype=torch.float64)
        cache = torch.randn(self.batch, old, width, generator=generator, dtype=torch.float64)
        pad = torch.rand(self.batch, old + new, generator=generator) > 0.2
        return x, cache, pad, cache[:, :1]


class Draw:
    """Draws the lines of a module; what has been made so far may be written to, looked at, or aliased anywhere."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.module = Module(seed)
        self._floats: list[str] = []
        self._bools: list[str] = []
        self._integers: list[str] = []
        self._looked: list[str] = []
        self._writes = self.one(0, 0, 0.1, 0.25)

    def one(self, *options: Any) -> Any:
        return self._random.choice(options)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def emit(self, *lines: str) -> None:
        """Adds lines, and at times something that writes to or looks at what there is."""
        for line in lines:
            self.module.lines.append(line)
            if self.chance(self._writes):
                self._write()

    def _write(self) -> None:
        kinds = [("WRITERS", writers.WRITERS, self._floats), ("BOOL_WRITERS", writers.BOOL_WRITERS, self._bools)]
        kinds.append(("INTEGER_WRITERS", writers.INTEGER_WRITERS, self._integers))
        table, functions, names = self.one(*[kind for kind in kinds if kind[2]] or [kinds[0]])
        if not names:
            return
        name = self.one(*names[-3:], *names)
        action = self._random.random()
        if action < 0.05 and table == "WRITERS":  # eager refuses most of these, but where two lengths are one
            axes = self.one("transpose_(-1, -2)", "swapaxes_(-3, -2)", "set_({0} * 2)").format(name)
            self.module.lines.append(f"{name}.{axes}")
        elif action < 0.7:
            self.module.lines.append(f"{table}[{self.one(*functions)!r}]({name})")
        elif action < 0.8:
            self.module.lines.append(f"copy{len(self._looked)} = {name}.clone()")
            self._looked.append(f"copy{len(self._looked)}.sum()")
        elif action < 0.9:
            self.module.lines.append(f"look{len(self._looked)} = {name}.sum()")
            self._looked.append(f"look{len(self._looked)}")
        else:
            view = self.one("[..., :2]", ".detach()", ".unsqueeze(0)", ".mT", ".view_as({0})", "[:1]").format(name)
            fresh = f"view{len(self.module.lines)}"
            self.module.lines.append(f"{fresh} = {name}{view}")
            names.append(fresh)

    def draw(self) -> Module:
        """A module with everything."""
        module = self.module
        module.heads = self.one(1, 2, 4, 4)
        module.key_heads = self.one(*[n for n in (1, 2, 4) if module.heads % n == 0])
        module.batch = self.one(1, 2, 2)
        module.dtype = self.one(*[torch.float32] * 9, torch.bfloat16)
        module.dynamic, module.read_masks = self.chance(0.3), self.chance(0.7)
        cached = self.one(0, 0, 3, 9)
        first = self._random.randint(2, 14)
        module.lengths = [(first, cached)]
        for _ in range(self.one(0, 1, 2)):
            module.lengths.append((self._random.randint(2, 20), cached and self._random.randint(1, 12)))
        self._project()
        self._attend()
        outputs = ", ".join(["o", *self._looked])
        module.lines.append(f"return {outputs}{'' if self._looked else ','}")
        return module

    def _project(self) -> None:
        heads, groups = self.module.heads, self.module.key_heads
        crossed = self.chance(0.1)
        keys = "cache" if crossed and self.module.lengths[0][1] else "torch.cat([cache, x], 1)"
        self.emit(f"y = {keys}", "n, m = x.shape[1], y.shape[1]", "b = x.shape[0]")
        self.module.lines[-1:] = ["b = x.shape[0]", "pad = pad[:, :m]"]
        self._floats += ["x", "cache", "alias"] if self.chance(0.5) else []
        for name, source, count in (("q", "x", heads), ("k", "y", groups), ("v", "y", groups)):
            rows = self.one(
                f"self.{name}({source}).view(b, -1, {count}, {HEAD_DIM}).transpose(1, 2)",
                f"self.{name}({source}).unflatten(-1, ({count}, {HEAD_DIM})).permute(0, 2, 1, 3)",
                f"self.{name}({source}).reshape(b, -1, {count}, {HEAD_DIM}).transpose(1, 2).contiguous()",
                f"torch.einsum('bne,hde->bhnd', {source}, self.{name}.weight.unflatten(0, ({count}, {HEAD_DIM})))",
            )
            self.emit(f"{name} = {rows}")
            self._floats.append(name)
        if self.chance(0.3):
            self.emit(
                self.one(
                    "q = q * 0.5", "k = k / 2", "q = q + q.roll(1, -1)", "q = torch.cat([-q[..., 4:], q[..., :4]], -1)"
                )
            )
        self._grouped = heads != groups

    def _repeat(self) -> None:
        if self._grouped:
            times = self.module.heads // self.module.key_heads
            for name in "kv":
                before = f"{name}0"
                self.emit(f"{before} = {name}")
                self.emit(
                    f"{name} = "
                    + self.one(
                        f"{before}.repeat_interleave({times}, dim=1)",
                        f"{before}[:, :, None].expand(b, -1, {times}, m, {HEAD_DIM}).reshape(b, -1, m, {HEAD_DIM})",
                        f"torch.repeat_interleave({before}, {times}, 1)",
                    )
                )
                self._floats += [before, name]
            self._grouped = False

    def _index(self, along: str) -> str:
        """Positions of queries [n, 1] or keys [m], made in one of many ways."""
        size, view = ("n", "[:, None]") if along == "q" else ("m", "")
        kind = self._random.random()
        if kind < 0.5:
            made = f"torch.arange({size})"
        elif kind < 0.6:
            made = f"torch.arange({size}, dtype=torch.int32)"
        elif kind < 0.7:
            made = f"(torch.arange(3, {size} + 3) - 3)"
        elif kind < 0.8:
            made = f"(torch.ones({size}, dtype=torch.long).cumsum(0) - 1)"
        elif kind < 0.85:
            made = f"torch.arange({size}).flip(0)"
        elif kind < 0.9:
            made = f"(torch.arange({size}) * 2 // 2)"
        elif kind < 0.95:
            made = f"(torch.arange({size}) + {self.one(2**31 - 5, 2**40, -(2**31))}).to(torch.int32)"
        else:
            made = f"(torch.arange({size}, dtype=torch.int32) * {self.one(1, 3, 2**29, 2**30)})"
        name = f"i{along}{len(self.module.lines)}"
        self.emit(f"{name} = {made}")
        self._integers.append(name)
        return f"{name}{view}"

    def _term(self) -> str:
        """One bool term, broadcastable to [b, 1, n, m]."""
        q, k = self._index("q"), self._index("k")
        w = self._random.randint(1, 6)
        shift = self.one("m - n", "m - n", "m - n", "0", f"{w}", f"m - n + {w}")
        return self.one(
            *[f"({k} <= {q} + ({shift}))"] * 4,
            f"({q} + (m - n) >= {k})",
            f"({k} > {q} + (m - n) - {w})",
            f"~({k} > {q} + (m - n))",
            f"(({k} - {q}).abs() <= {w})",
            f"({k} // {w} == ({q} + (m - n)) // {w})",
            "torch.ones(n, m, dtype=torch.bool).tril(m - n)",
            f"(torch.triu(torch.ones(n, m), m - n + {w}) == 0)",
            "pad[:, None, None, :]",
            "pad.bool()[:, None, None].expand(b, 1, n, m)",
            "(y.sum(-1) > 0)[:, None, None, :]",
            "(x.sum(-1) > -9)[:, None, :, None]",
            f"({k} < {w})",
            f"({k} != {q} + {w})",
            "(pad.cumsum(-1)[:, None, m - n:, None] == pad.cumsum(-1)[:, None, None])",
        )

    def _mask(self) -> None:
        """``mask``, a bool tensor of one to three terms."""
        self.emit(f"mask = {self._term()}")
        self._bools.append("mask")
        for _ in range(self.one(0, 0, 1, 2)):
            term = self._term()
            self.emit(
                self.one(
                    *[f"mask = mask & {term}"] * 4,
                    f"mask = torch.logical_and(mask, {term})",
                    f"mask = mask | {term}",
                    f"mask = mask.expand(b, 1, n, m).masked_fill(~{term}, False)",
                    f"mask = torch.where({term}, mask, False)",
                    f"mask = (mask.expand(b, 1, n, m) * 1 * {term}).bool()",
                )
            )
            if self.chance(0.15):
                self.emit("mask = mask.expand(b, 1, n, m).clone()", f"mask &= {self._term()}")

    def _float_mask(self) -> str:
        """``bias``, made of ``mask``."""
        low = self.one("-INF", "-INF", "torch.finfo(q.dtype).min", "torch.finfo(q.dtype).min", "-1e9", "-1e4")
        self.emit(
            "bias = "
            + self.one(
                f"torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, {low})",
                f"torch.where(mask, 0.0, {low}).to(q.dtype)",
                "(1.0 - mask.to(q.dtype)) * torch.finfo(q.dtype).min",
                "mask.to(q.dtype).log()",
                f"torch.full(mask.shape, {low}, dtype=q.dtype).masked_fill(mask, 0.0)",
            )
        )
        self._floats.append("bias")
        if self.chance(0.15):
            self.emit(f"bias = bias + torch.where(pad[:, None, None], 0.0, {low}).to(q.dtype)")
        return "bias"

    def _attend(self) -> None:
        kind = self._random.random()
        if kind < 0.06:
            self._multi_head()
        elif kind < 0.12:
            self._flex()
        elif kind < 0.45:
            self._fused()
        else:
            self._written_out()

    def _fused(self) -> None:
        gqa = ", enable_gqa=True" if self._grouped and self.chance(0.5) else ""
        if not gqa:
            self._repeat()
        kind = self._random.random()
        if kind < 0.15:
            mask = ""
        elif kind < 0.3:
            mask = ", is_causal=True"
        else:
            self._mask()
            mask = ", attn_mask=" + (self._float_mask() if self.chance(0.4) else "mask")
        scale = self.one("", "", ", scale=0.3")
        self.emit(f"o = F.scaled_dot_product_attention(q, k, v{mask}{scale}{gqa})")
        self._floats.append("o")
        if self.chance(0.15):  # a second attention under the same mask
            self.emit(f"o = o + F.scaled_dot_product_attention(o, k, v{mask}{scale}{gqa})")
        self._out()

    def _multi_head(self) -> None:
        """torch's own module, whose masks say what is hidden."""
        self._mask()
        hidden = self.one("~mask", "torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -INF)")
        self.emit(f"hidden = ({hidden}).expand(b, 1, n, m).repeat(1, {self.module.heads}, 1, 1).flatten(0, 1)")
        pairs = self.one("", ", attn_mask=hidden", ", attn_mask=hidden[0]")
        padding = self.one("", ", key_padding_mask=~pad")
        weights = self.one("False", "False", "True")
        self.emit(f"o, w = self.heads(x, y, y{pairs}{padding}, need_weights={weights})")
        self._floats.append("o")

    def _flex(self) -> None:
        """flex_attention, whose functions are graphs of their own."""
        self._repeat()
        w = self._random.randint(1, 6)
        terms = [
            "ki <= qi + (m - n)",
            "qi + (m - n) >= ki",
            f"ki > qi + (m - n) - {w}",
            f"(qi + (m - n) - ki).abs() < {w}",
            f"ki // {w} == (qi + (m - n)) // {w}",
            "pad[bi, ki]",
            f"(ki < {w}) | (ki <= qi)",
            f"ki * {self.one(2, 2**29, 2**30)} <= qi * {self.one(2, 2**29)} + (m - n)",
        ]
        visible = " & ".join(f"({term})" for term in self._random.sample(terms, self.one(1, 1, 2)))
        self.emit(f"mask_mod = lambda bi, hi, qi, ki: {visible}")
        score_mod = self.one(
            "None",
            "None",
            "lambda s, bi, hi, qi, ki: torch.tanh(s / 5) * 5",
            "lambda s, bi, hi, qi, ki: torch.where(ki <= qi + (m - n), s, -INF)",
            "lambda s, bi, hi, qi, ki: s + (ki - qi) * 0.1",
        )
        blocks = "create_block_mask(mask_mod, b, None, n, m, device='cpu')"
        if self.chance(0.2):
            blocks = "None"
        self.emit(f"o = flex_attention(q, k, v, score_mod={score_mod}, block_mask={blocks})")
        self._floats.append("o")
        self._out()

    def _written_out(self) -> None:
        self._repeat()
        self.emit(
            "s = "
            + self.one(
                "q @ k.transpose(-1, -2)",
                "torch.matmul(q, k.mT)",
                "torch.einsum('bhnd,bhmd->bhnm', q, k)",
                "torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (b, -1))",
                "(q * 0.5) @ k.mT",
            )
        )
        self._floats.append("s")
        for _ in range(self.one(0, 1, 1, 2)):
            self.emit(
                self.one(
                    "s = s * 0.35",
                    "s = s / 2.8",
                    "s /= 2.8",
                    "s.mul_(0.35)",
                    "s = torch.tanh(s / 5) * 5",
                    "s = s.float().to(s.dtype)",
                    "s = s * torch.full((), 0.5, dtype=s.dtype)",
                    "s = s + 0",
                    "s = F.relu(s)",
                )
            )
        masked = self.chance(0.75)
        if masked:
            self._mask()
            low = self.one("-INF", "-INF", "torch.finfo(s.dtype).min", "-1e9")
            if self.chance(0.4):
                self.emit(self.one("s = s + {0}", "s = {0} + s", "s += {0}").format(self._float_mask()))
            else:
                self.emit(
                    self.one(
                        f"s = s.masked_fill(~mask, {low})",
                        f"s.masked_fill_(mask.logical_not(), {low})",
                        f"s = torch.where(mask, s, {low})",
                        f"s = torch.where(mask, s, torch.full_like(s, {low}))",
                    )
                )
        if self.chance(0.1):
            self.emit("s = s - s.amax(-1, keepdim=True)")
        sinks = self.chance(0.12)
        if sinks:
            self.emit("sink = self.q.bias[: s.shape[1]].view(1, -1, 1, 1).expand(b, -1, n, 1)")
            self.emit("s = torch.cat([s, sink], -1)")
        upcast = "torch.softmax(s, -1, dtype=torch.float32).to(v.dtype)"
        self.emit("p = " + self.one("s.softmax(-1)", "F.softmax(s, dim=-1)", upcast))
        self._floats.append("p")
        if sinks:
            self.emit("p = p[..., :-1]")
        if self.chance(0.3):
            self.emit(
                self.one(
                    "p = F.dropout(p, 0.1, False)",
                    "p = F.dropout(p, 0.1, self.training, inplace=True)",
                    "p = p.nan_to_num()",
                    "p = p.masked_fill(~mask, 0.0)" if masked else "p = p.clone()",
                    "p = p * 1.5",
                )
            )
        self.emit(
            "o = "
            + self.one(
                "p @ v",
                "torch.matmul(p, v)",
                "torch.einsum('bhnm,bhmd->bhnd', p, v)",
                "torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (b, -1))",
            )
        )
        self._floats.append("o")
        self._out()

    def _out(self) -> None:
        projected = "o = self.o(o.transpose(1, 2).reshape(b, n, -1))"
        self.emit(self.one(projected, "o = o.transpose(1, 2).flatten(2)", "pass"))


def draw(seed: int) -> Module:
    """The module of a seed."""
    return Draw(seed).draw()
