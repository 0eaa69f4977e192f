"""A decoder's layers, and on a processor tapes of the decode steps that go through them.

A step in which each row has one token calls the same kernels whatever the tokens are. So the first
step of so many rows is recorded, and the next ones write their inputs where its inputs were and
have the calls made again, without Python between them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.layers import LayerCache, ResidualLayer, RmsNorm, through
from forebay_engine.rotary import Angles
from forebay_kernels import PagedBatch, cpu

#: Kernels that a layer calls: two norms, four products, attention and what is before it, the gate.
_CALLS = 9
#: Pages by which tables grow: with 16 tokens a page a tape serves its rows for 256 tokens.
_PAGES = 16
#: Tapes that are kept; each holds the intermediate results of about one layer.
_TAPES = 32


class Stack:
    """All layers one behind the other, and the last norm."""

    def __init__(self, layers: Items[ResidualLayer], norm: RmsNorm) -> None:
        self._layers, self._norm = layers, norm
        self._caches: Items[LayerCache] = ()
        self._tapes: OrderedDict[Hashable, _Step] = OrderedDict()
        self._records = True

    def __call__(
        self, x: Tensor, angles: Items[Angles], caches: Items[LayerCache], batch: PagedBatch
    ) -> Tensor:
        """The stream ``x`` ``[tokens, hidden]``, which is overwritten, behind all layers.

        What comes back may be overwritten by the next step.

        :param angles: of each layer.
        """
        decodes = batch.num_decodes == batch.num_tokens
        if batch.replayed or not (self._records and decodes and kernels.is_compiled(x)):
            return through(self._layers, self._norm, x, angles, caches, batch)
        if caches is not self._caches:  # a tape has their addresses
            self._caches = caches
            self._tapes.clear()
        key = (len(x), *(_width(each) for each in _groups(batch).values()))
        step = self._tapes.get(key)
        if step is not None:
            self._tapes.move_to_end(key)
            return step.again(x, angles, batch)
        step = _Step.of(x, angles, batch)
        with cpu.recording(step.tape):
            step.out = through(self._layers, self._norm, step.x, step.angles, caches, step.batch)
        self._records = step.tape.complete and len(step.tape) == 1 + _CALLS * len(self._layers)
        if self._records:
            self._tapes[key] = step
            if len(self._tapes) > _TAPES:
                self._tapes.popitem(last=False)
        return step.out


@dataclass(slots=True)
class _Step:
    """A recorded step."""

    x: Tensor
    angles: list[Angles]
    batch: PagedBatch
    tape: cpu.Tape
    out: Tensor

    @classmethod
    def of(cls, x: Tensor, angles: Items[Angles], batch: PagedBatch) -> _Step:
        """One with inputs of its own, which are these now."""
        own = {id(each): Angles(each.cos.clone(), each.sin.clone()) for each in angles}
        groups = {window: _own(each) for window, each in _groups(batch).items()}
        first = groups.pop(None)
        first.by_window.update(groups)
        inputs = [x, *(part for each in own.values() for part in (each.cos, each.sin))]
        for each in (first, *groups.values()):
            inputs += [each.slots, each.block_tables, *cpu.rows_of(each)]
        return cls(x, [own[id(each)] for each in angles], first, cpu.Tape(*inputs), x)

    def again(self, x: Tensor, angles: Items[Angles], batch: PagedBatch) -> Tensor:
        """The same step with other contents."""
        self.x.copy_(x)
        turns = {id(new): (own, new) for own, new in zip(self.angles, angles, strict=True)}
        for own, new in turns.values():
            own.cos.copy_(new.cos)
            own.sin.copy_(new.sin)
        groups = _groups(self.batch)
        for window, each in _groups(batch).items():
            mine = groups[window]
            mine.slots.copy_(each.slots)
            mine.block_tables[:, : each.block_tables.shape[1]].copy_(each.block_tables)
            cpu.rows_of(mine)[1].copy_(each.lengths)
        self.tape.replay()
        return self.out


def _groups(batch: PagedBatch) -> dict[int | None, PagedBatch]:
    """The batch as each group of layers has it."""
    return {None: batch, **batch.by_window}


def _own(batch: PagedBatch) -> PagedBatch:
    """A copy whose tables have room for what rows may grow to on the same tape."""
    tables = torch.zeros(batch.num_rows, _width(batch), dtype=torch.int32)
    tables[:, : batch.block_tables.shape[1]].copy_(batch.block_tables)
    return replace(batch, block_tables=tables, slots=batch.slots.clone(), by_window={}, memo={})


def _width(batch: PagedBatch) -> int:
    """Pages of a row on a tape."""
    return -(-batch.block_tables.shape[1] // _PAGES) * _PAGES
