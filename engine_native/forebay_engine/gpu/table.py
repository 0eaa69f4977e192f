"""The running sequences as the device knows them, and what it has to be told for a step.

A sequence has a place in the table as long as it has a row in every step: what is left out of one
gives its place up, and is told anew when it comes back. So nobody has to say that a sequence has
ended or was preempted, which always leaves it out of a step, and no page of another time remains.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch

from forebay_engine.gpu.sampling import edits, mark_state, num_edits, on_device, settings, wants
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row
from forebay_kernels import SamplingTable
from forebay_kernels.sampling import MARKS, SETTINGS, Wants

#: Tokens whose logits a request may change on the device; who changes more is drawn by the host.
EDITS = 32
#: What looks at the tokens before a place.
_BACKWARDS = Wants.PENALTIES | MARKS


@dataclass(slots=True)
class Place:
    """A sequence's line in the table."""

    number: int
    #: Of each group, how many of the sequence's pages the device knows.
    pages: list[int]
    #: The parameters that it knows.
    sampling: SamplingParams | None = None
    #: The device can draw with them.
    draws: bool = False
    #: And is asked for nothing beside the token, but what a guide may ask.
    plain: bool = False
    #: What the device is asked for beyond a temperature: ``Wants``, whose own sums are slow.
    asked: int = 0
    #: The last step drew a token for it.
    drawn: bool = False


@dataclass(frozen=True, slots=True)
class Changes:
    """Words of the table that change, and lines whose counts begin anew."""

    at: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    cleared: list[int] = field(default_factory=list)

    def add(self, at: int, words: Items[int]) -> None:
        """So many words from ``at`` on."""
        self.at.extend(range(at, at + len(words)))
        self.words.extend(words)


class RequestTable:
    """Lines for so many sequences, and one more for nobody. All of it lies in one run of words."""

    def __init__(
        self,
        places: int,
        *,
        groups: int,
        pages: int,
        longest: int,
        vocab: int,
        eos_token_ids: frozenset[int],
        looks_back: bool,
        device: torch.device,
    ) -> None:
        """
        :param pages: of a sequence in each group, at most; ``longest``: tokens.
        :param looks_back: penalties and watermarks are the device's affair. Where some steps verify
            guesses they are not, as the table has drawn tokens only.
        """
        self.size = places
        #: What padded rows stand for; it may hold anything.
        self.nobody = places
        self._eos, self._looks_back = eos_token_ids, looks_back
        self._pages, self._longest, self._groups = pages + -pages % 4, longest, groups
        sizes = {
            "last": 1,
            "counted": 1,
            "settings": SETTINGS,
            "edits": 3 * EDITS,
            "mark_states": 16,
            "tables": groups * self._pages,
            "tokens": longest,
        }
        self._first: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self._first[name] = end
            # Every part begins at a multiple of 16 bytes: kernels are compiled for it.
            end += (places + 1) * size + -(places + 1) * size % 4
        self.words = torch.zeros(end, dtype=torch.int32, device=device)
        parts = {
            name: self.words[self._first[name] :][: (places + 1) * size].view(places + 1, size)
            for name, size in sizes.items()
        }
        self.last = parts["last"].squeeze(1)  # [places + 1] int32
        self.tables = parts["tables"].view(places + 1, groups, self._pages)
        self.sampling = SamplingTable(
            settings=parts["settings"],
            edits=parts["edits"].view(places + 1, 3, EDITS),
            tokens=parts["tokens"],
            counts=torch.zeros((places + 1, vocab), dtype=torch.int32, device=device),
            counted=parts["counted"].squeeze(1),
            mark_states=parts["mark_states"].view(places + 1, 8, 2),
        )
        self._places: dict[int, Place] = {}
        self._free = list(range(places - 1, -1, -1))

    def draws(self, params: SamplingParams) -> bool:
        """Whether the device can draw as asked."""
        return (
            on_device(params)
            and num_edits(params, self._eos) <= EDITS
            and (self._looks_back or not wants(params) & _BACKWARDS)
        )

    def enter(self, rows: Items[Row]) -> tuple[list[Place], Changes]:
        """The rows' places, and what the device does not know of them yet.

        :raises ValueError: there are too many, or one has too many pages, or an unknown token that
            the last step did not draw.
        """
        if len(rows) > self.size:
            raise ValueError(f"{len(rows)} rows in a step, where {self.size} are the most")
        found, changes = self._find(rows), Changes()
        for row, place in zip(rows, found, strict=True):
            if row.unknown and not place.drawn:
                raise ValueError(f"sequence {row.seq_id}: the last step drew no token for it")
            for group, table in enumerate(row.block_tables):
                if len(table) > place.pages[group]:
                    self._tell_pages(place, row, group, changes)
            if place.sampling is not row.sampling:
                self._tell_sampling(place, row, changes)
        return found, changes

    def _find(self, rows: Items[Row]) -> list[Place]:
        """The rows' places, which nobody else has from now on."""
        ids = [row.seq_id for row in rows]
        if ids != list(self._places):
            before = self._places
            there = [before.pop(id, None) for id in ids]
            self._free.extend(place.number for place in before.values())
            self._places = {
                id: place if place is not None else Place(self._free.pop(), [0] * self._groups)
                for id, place in zip(ids, there, strict=True)
            }
        return list(self._places.values())

    def forget(self) -> None:
        """Nothing that was told counts: a step came to nothing."""
        for place in self._places.values():
            place.pages = [0] * self._groups
            place.sampling = None

    def _tell_pages(self, place: Place, row: Row, group: int, changes: Changes) -> None:
        table, known = row.block_tables[group], place.pages[group]
        if len(table) > self._pages:
            raise ValueError(
                f"sequence {row.seq_id}: {len(table)} pages, where {self._pages} are the most"
            )
        first = self._first["tables"] + (place.number * self._groups + group) * self._pages
        changes.add(first + known, [max(0, page) for page in table[known:]])
        place.pages[group] = len(table)

    def _tell_sampling(self, place: Place, row: Row, changes: Changes) -> None:
        params, number = row.sampling, place.number
        place.sampling, place.draws = params, self.draws(params)
        plain = params.logprobs is None and not params.allowed_token_ids
        place.plain, place.asked = place.draws and plain, 0
        if not place.draws:
            return
        line = settings(params, row.num_prompt).tolist()
        asked = Wants(line[0])
        place.asked = int(asked & ~Wants.LOGPROB)  # log-probabilities are computed apart
        changes.add(self._first["settings"] + number * SETTINGS, line)
        if Wants.EDITS in asked:
            words = edits(params, row.num_prompt, self._eos, EDITS).flatten().tolist()
            changes.add(self._first["edits"] + number * 3 * EDITS, words)
        if params.watermark is not None:
            state = mark_state(params.watermark).flatten().tolist()
            changes.add(self._first["mark_states"] + number * len(state), state)
        if Wants.PENALTIES in asked:
            changes.add(self._first["counted"] + number, [0])
            changes.cleared.append(number)
        if asked & _BACKWARDS:
            known = row.token_ids[: self._longest]
            changes.add(self._first["tokens"] + number * self._longest, known)
