"""S2O forward in plain torch; tiles that stop save their work.

The tiles of all heads that share a segment's ranking visit it side by side. A chunk of keys is gathered once, and one
dense block serves every tile that has not stopped. Blocks merge by their log-sum-exp. The rule is that of
``core/stop_rule.py``. All is computed in float32. It serves where there is no C++ compiler (``impl.cpp``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN, Plan, n_tiles
from s2o_compile.kernels.core.result import Progress, Result, empty_result
from s2o_compile.kernels.core.stop_rule import chunks_to_come, tail_share
from s2o_compile.kernels.impl.torch.blocks import block_attention, causal_block, merge
from s2o_compile.kernels.support.parallel import for_each

KEY_STEP = 4096
"""Keys of one block in position order under an explicit mask: bounds the mask's memory."""

UNTESTED_STEP = 1024
"""Ranked keys of one block where no tile can stop."""


def attend(
    call: AttentionCall,
    plan: Plan,
    tau: float | Tensor,
    into: Result | None = None,
    progress: Progress | None = None,
) -> Result:
    """Attention of a call without a window over its plan.

    Args:
        call: Its mask has no window.
        plan: Ranked key indices of every segment.
        tau: One number, or float32 [Hq] or [B, Hq].
        into: Where the results go; new ones if None.
        progress: Where tiles keep their state; None if none will go on.
    """
    result = empty_result(call.query, call.value.shape[3]) if into is None else into
    keys, values = (x.float().contiguous() for x in call.without_hidden_keys().tensors[1:])
    _each_segment(call, keys, values, plan, lambda segment: segment.attend(tau, result, progress))
    return result


def going_on(call: AttentionCall, plan: Plan, tau: Tensor, into: Result, progress: Progress) -> Callable[[], None]:
    """What lets tiles go on from ``into`` and ``progress`` each time it is called: those not below tau by now.

    ``tau`` is float32 [B, Hq], read anew each time; an infinite one leaves a head as it is.
    """
    keys, values = (x.float().contiguous() for x in call.without_hidden_keys().tensors[1:])

    def go_on() -> None:
        if (progress.unvisited < tau[..., None]).all():
            return
        _each_segment(call, keys, values, plan, lambda segment: segment.go_on(tau, into, progress))

    return go_on


def _each_segment(
    call: AttentionCall, keys: Tensor, values: Tensor, plan: Plan, do: Callable[[_Segment], None]
) -> None:
    """Do something with every segment, one a thread."""
    batch, ranking_heads = plan.key_index.shape[:2]
    last_first = reversed(range(plan.n_segments))  # those with the most ranked keys first
    places = itertools.product(range(batch), range(ranking_heads), last_first)
    for_each(lambda place: do(_Segment(call, keys, values, plan, place)), places, call.query.device)


@dataclass
class _Tiles:
    """Some tiles of a segment: numbers in it, queries, output so far and log-sum-exp so far, [tiles, TILE_LEN, ..]."""

    numbers: Tensor
    query: Tensor
    output: Tensor
    lse: Tensor

    def update(self, output: Tensor, lse: Tensor) -> Tensor:
        """Merge a block; returns each row's gain [tiles, TILE_LEN], the share of the mass that the block brought."""
        merged, joint, gain = merge(self.output.flatten(0, 1), self.lse.flatten(), output, lse)
        self.output, self.lse = merged.view(self.output.shape), joint.view(self.lse.shape)
        return gain.nan_to_num_(0.0).view(self.lse.shape)

    def add_tails(self, share: Tensor, mean_value: Tensor) -> None:
        """Count keys left out: share [tiles, TILE_LEN] of the mass visited, at mean_value [Dv]."""
        rest = share[..., None]
        self.output = (self.output + rest * mean_value) / (1 + rest)
        self.lse = self.lse + share.log1p()

    def take_tails_off(self, share: Tensor, mean_value: Tensor) -> None:
        """Undo `add_tails`."""
        rest = share[..., None]
        self.output = self.output * (1 + rest) - rest * mean_value
        self.lse = self.lse - share.log1p()

    def join(self, others: _Tiles) -> _Tiles:
        """Copies of these tiles and others."""
        return _Tiles(*(torch.cat(pair) for pair in zip(self.parts, others.parts, strict=True)))

    def select(self, indices: Tensor) -> _Tiles:
        """Copies of the tiles at these indices."""
        return _Tiles(*(part[indices] for part in self.parts))

    def put(self, part: _Tiles, indices: Tensor | slice = slice(None)) -> None:
        """Take over the state of the tiles at these indices of ``part``; only for tiles numbered 0, 1, 2, ..."""
        numbers = part.numbers[indices]
        self.output[numbers], self.lse[numbers] = part.output[indices], part.lse[indices]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All fields."""
        return self.numbers, self.query, self.output, self.lse


class _Segment:
    """One segment of the heads that share its ranking, at a place (batch entry, ranking head, segment) of the plan."""

    def __init__(
        self, call: AttentionCall, keys: Tensor, values: Tensor, plan: Plan, place: tuple[int, int, int]
    ) -> None:
        self.b, ranking_head, segment = place
        query, mask, ranking_heads = call.query, call.mask, plan.key_index.shape[1]
        kv = ranking_head * keys.shape[1] // ranking_heads
        self.key, self.value = keys[self.b, kv], values[self.b, kv]
        self.logits = {"scale": call.scale, "softcap": call.softcap}
        self.mask, self.chunk_len = mask, plan.chunk_len
        group, n_queries = query.shape[1] // ranking_heads, query.shape[2]  # heads that share the ranking
        self.first = segment * plan.segment_len
        self.end = min(self.first + plan.segment_len, n_queries)
        self.group, self.tiles = group, n_tiles(self.end - self.first)
        self.heads = slice(ranking_head * group, (ranking_head + 1) * group)
        self.query = query[self.b, self.heads]
        self.hidden_key = None if mask.key_mask is None else ~mask.key_mask[self.b]
        self.index = plan.key_index[self.b, ranking_head, segment]
        assert plan.tail_value is not None
        self.mean_value = plan.tail_value[self.b, kv, segment]
        self.count = int(plan.prefix_count[self.b, segment])
        # [G, tiles * TILE_LEN]: the last tile may be short; its empty slots repeat the last query and are dropped.
        slots = torch.arange(self.first, self.first + self.tiles * TILE_LEN, device=query.device)
        self.rows = slots.clamp(max=self.end - 1).expand(group, -1)
        self.seg_start, seg_stop = mask.in_segment_range(self.first, self.end - 1, n_queries, len(self.key))
        self.stops = torch.full((group, self.tiles), seg_stop, device="cpu")
        if mask.causal:  # no query of a tile sees further than the tile's last one
            ends = self.first + mask.offset + TILE_LEN * torch.arange(1, self.tiles + 1, device="cpu")
            self.stops = ends.clamp(self.seg_start, seg_stop).expand(group, -1)
        self.stops = self.stops.flatten()

        self.own = self.stops - self.seg_start
        self.area = self.own.clone()
        self.tail = query.new_zeros(len(self.stops), TILE_LEN, dtype=torch.float32)
        self.unvisited = torch.full((len(self.stops),), -1.0, dtype=torch.float32, device="cpu")

    def attend(self, tau: float | Tensor, into: Result, progress: Progress | None) -> None:
        """Pass 1 and pass 2; fills the segment's rows of ``into`` and ``progress``."""
        query = self._load()
        lse = self.tail.new_full(self.tail.shape, -torch.inf)
        output = self.tail.new_zeros(*self.tail.shape, self.value.shape[-1])
        tiles = _Tiles(torch.arange(len(self.stops), device="cpu"), query, output, lse)
        self._in_segment_keys(tiles)
        self._visit_ranked(tiles, self._taus(tau), torch.zeros_like(self.area))
        self._store(tiles, into, progress)

    def go_on(self, tau: Tensor, into: Result, progress: Progress) -> None:
        """Pass 2 of the tiles whose estimate is not below tau, from where they stopped."""
        numbers = slice(self.first // TILE_LEN, self.first // TILE_LEN + self.tiles)
        estimate = progress.unvisited[self.b, self.heads, numbers].flatten().cpu()
        taus = self._taus(tau)
        going = ~(estimate < taus)
        if not going.any():
            return
        # Copies: the flattened rows of a single head would be a view of what is written in the end.
        held = (into.output, into.lse, progress.tail)
        output, lse, tail = (self._slots(x[self.b, self.heads]).float().clone() for x in held)
        tiles = _Tiles(torch.arange(len(self.stops), device="cpu"), self._load(), output, lse)
        self.tail, self.unvisited = tail, estimate.clone()
        part = tiles.select(going.nonzero()[:, 0])
        part.take_tails_off(self.tail[part.numbers], self.mean_value)
        tiles.put(part)
        self.tail[part.numbers], self.unvisited[part.numbers] = 0.0, -1.0
        visited = into.computed[self.b, self.heads, numbers].flatten().cpu() - self.area
        self.area += visited
        self._visit_ranked(tiles, taus, torch.where(going, visited, self.count))
        self._store(tiles, into, progress)

    def _taus(self, tau: float | Tensor) -> Tensor:
        """The tau of every tile, [G * tiles]."""
        if isinstance(tau, Tensor):
            taus = tau[..., self.heads].cpu()
        else:
            taus = torch.full((self.group,), tau, dtype=torch.float32, device="cpu")
        return (taus[self.b] if taus.dim() == 2 else taus).repeat_interleave(self.tiles)

    def _load(self) -> Tensor:
        """The segment's queries, float32 [G * tiles, TILE_LEN, D]."""
        return self._slots(self.query).float()

    def _slots(self, rows: Tensor) -> Tensor:
        """The segment's rows of [G, Nq, ..] by tile, [G * tiles, TILE_LEN, ..]; empty slots repeat the last one."""
        part, empty = rows[:, self.first : self.end], self.rows.shape[1] - (self.end - self.first)
        if empty:
            part = torch.cat([part, part[:, -1:].expand(-1, empty, *part.shape[2:])], 1)
        return part.unflatten(1, (-1, TILE_LEN)).flatten(0, 1)

    def _store(self, tiles: _Tiles, into: Result, progress: Progress | None) -> None:
        """Write the results and the state of the segment's queries."""
        first, real = self.first // TILE_LEN, self.end - self.first
        rows, numbers = slice(self.first, self.end), slice(first, first + self.tiles)
        by_row = [(into.output, tiles.output), (into.lse, tiles.lse)]
        by_tile = [(into.computed, self.area.int())]
        if progress is not None:
            by_row.append((progress.tail, self.tail))
            by_tile.append((progress.unvisited, self.unvisited))
        for target, found in by_row:
            found = found.unflatten(0, (self.group, -1)).flatten(1, 2)
            target[self.b, self.heads, rows] = found[:, :real]
        for target, found in by_tile:
            target[self.b, self.heads, numbers] = found.view(self.group, -1).to(target.device)

    def _in_segment_keys(self, tiles: _Tiles) -> None:
        """Pass 1."""
        seg_stop = int(self.stops.max())
        diagonal = self.mask.causal and self.seg_start == self.first + self.mask.offset
        if diagonal and self.hidden_key is None and seg_stop > self.seg_start:
            own = slice(self.seg_start, seg_stop)
            query = tiles.query.unflatten(0, (self.group, -1)).flatten(1, 2)
            output, lse = causal_block(query, self.key[own], self.value[own], **self.logits)
            tiles.output, tiles.lse = output.reshape(tiles.output.shape), lse.reshape(tiles.lse.shape)
            return
        for stop in self.stops.unique().tolist():  # each tile up to its own stop, under the mask
            part = tiles.select((self.stops == stop).nonzero()[:, 0])
            rows = self.rows.reshape(-1, TILE_LEN)[part.numbers].flatten()
            for begin in range(self.seg_start, stop, KEY_STEP):
                keys = torch.arange(begin, min(begin + KEY_STEP, stop), device=rows.device)
                hidden = None
                if self.mask.causal and int(keys[-1]) > self.first + self.mask.offset:
                    hidden = ~self.mask.visible(rows, keys)
                if self.hidden_key is not None:
                    hidden = self.hidden_key[keys] if hidden is None else hidden | self.hidden_key[keys]
                block = slice(begin, begin + len(keys))
                keys, values = self.key[block], self.value[block]
                part.update(*block_attention(part.query.flatten(0, 1), keys, values, hidden, **self.logits))
            tiles.put(part)

    def _visit_ranked(self, tiles: _Tiles, taus: Tensor, visited: Tensor) -> None:
        """Pass 2: tiles visit chunks until the stop rule holds, each with its own of ``taus``.

        Each begins behind the keys that it has ``visited``, whole chunks or all of them.
        """
        whole, can_stop = not visited.any(), self.count >= 2 * self.chunk_len and bool((taus > 0).any())
        largest_tau = float(taus.max())
        step = self.chunk_len if can_stop or not whole else max(self.chunk_len, UNTESTED_STEP)
        visiting = tiles if whole else tiles.select(visited[:0])  # no copies until the first one stops
        limits, left = taus if whole else taus[:0], []
        for start in range(int(visited.min()), self.count, step):
            joining = visited[:0] if whole else (visited == start).nonzero()[:, 0]
            if len(joining):
                visiting = visiting.join(tiles.select(joining))
                limits = taus[visiting.numbers]
            if not len(visiting.numbers):
                if not (visited > start).any():
                    break
                continue
            stop = min(start + step, self.count)
            chunk = self.index[start:stop]
            keys, values = self.key.index_select(0, chunk), self.value.index_select(0, chunk)
            gain = visiting.update(*block_attention(visiting.query.flatten(0, 1), keys, values, **self.logits))
            if not can_stop:
                continue
            to_come = chunks_to_come(start + self.chunk_len, self.count, self.chunk_len)
            if not start and to_come >= largest_tau:
                continue
            estimate = gain.amax(-1).cpu() * to_come if start else torch.full_like(limits, to_come)
            stopped = estimate < limits
            if not stopped.any():
                continue
            leaving = stopped.nonzero()[:, 0]
            numbers = visiting.numbers[leaving]
            self.unvisited[numbers], self.area[numbers] = estimate[leaving], self.own[numbers] + stop
            if start:  # the first chunk's gain is not used
                self.tail[numbers] = tail_share(gain[leaving], to_come)
                left.append(numbers)
            tiles.put(visiting, leaving)
            staying = (~stopped).nonzero()[:, 0]
            visiting, limits = visiting.select(staying), limits[staying]
        self.area[visiting.numbers] = self.own[visiting.numbers] + self.count
        if visiting is not tiles:
            tiles.put(visiting)
        if left:
            part = tiles.select(torch.cat(left))
            part.add_tails(self.tail[part.numbers], self.mean_value)
            tiles.put(part)
