"""Continuous batching without phases: each step, every sequence catches up with its own tokens.

A sequence has ``num_computed`` tokens in the cache and ``len(token_ids)`` tokens in all; a step
computes some of the difference, and draws a token when none is left. Decodes (one token behind) and
chunks of prompts so share one budget of tokens in one step. First come, first served throughout:
the running sequences are always the oldest ones, in order of arrival; when blocks run out the
youngest gives its own back and starts over later, so the oldest always comes to its end.

Pure bookkeeping: no tensors, no clock, no threads. State changes only in :meth:`Scheduler.add`,
``abort``, ``plan`` and ``apply``; between the last two, the blocks of the plan are being written.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass

from forebay_engine.blocks import BlockPool
from forebay_engine.errors import RequestRefused
from forebay_engine.sequence import FinishReason, Sequence
from forebay_engine.step import Row, Sampled, StepPlan, StepResult


@dataclass(slots=True)
class Counters:
    """Totals since the start, in sequences and tokens."""

    admitted: int = 0
    finished: int = 0
    aborted: int = 0
    preempted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    steps: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(slots=True, eq=False)
class _Entry:
    """The scheduler's own notes on a sequence."""

    sequence: Sequence
    root: bytes
    #: Prefix hash after ``published`` full blocks.
    digest: bytes
    published: int = 0
    admitted: bool = False
    #: Aborted while a step was writing its blocks.
    doomed: bool = False

    @property
    def missing(self) -> int:
        return len(self.sequence.token_ids) - self.sequence.num_computed


class Scheduler:
    """Which sequences run in the next step, and where their keys and values lie."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_step_tokens: int,
        max_sequences: int,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        if max_step_tokens < 1 or max_sequences < 1:
            raise ValueError("max_step_tokens and max_sequences must be at least 1")
        self.pool = pool
        self.counters = Counters()
        self._max_step_tokens = max_step_tokens
        # Each running sequence gets a token a step, or late ones would starve.
        self._max_sequences = min(max_sequences, max_step_tokens)
        self._max_model_len = max_model_len
        self._eos = eos_token_ids
        self._entries: dict[int, _Entry] = {}
        self._running: list[_Entry] = []
        self._waiting: deque[_Entry] = deque()
        self._in_flight: dict[int, Row] | None = None

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return self.pool.in_use / self.pool.num_blocks

    def add(self, sequence: Sequence, salt: bytes = b"") -> None:
        """Queue a sequence.

        :raises RequestRefused: it could never run to its end.
        """
        self.refuse_impossible(len(sequence.prompt_ids), sequence.sampling.max_tokens)
        root = self.pool.root(salt)
        entry = _Entry(sequence, root, root)
        self._entries[sequence.id] = entry
        self._waiting.append(entry)

    def refuse_impossible(self, prompt: int, max_tokens: int) -> None:
        """Refuse what could not be served even with the whole cache to itself."""
        if prompt < 1:
            raise RequestRefused("the prompt is empty: at least one token is needed", "prompt")
        if max_tokens < 1:
            raise RequestRefused(f"max_tokens is {max_tokens}; it must be at least 1", "max_tokens")
        total = prompt + max_tokens
        if total > self._max_model_len:
            raise RequestRefused(
                f"the context holds {self._max_model_len} tokens, but {total} are asked for: "
                f"{prompt} of prompt and {max_tokens} of max_tokens; shorten one of them",
                "prompt" if prompt >= self._max_model_len else "max_tokens",
            )
        # The last token is drawn but never computed.
        blocks = self.pool.blocks_for(total - 1)
        if blocks > self.pool.num_blocks:
            raise RequestRefused(
                f"{prompt} prompt tokens and {max_tokens} max_tokens need {blocks} blocks of "
                f"{self.pool.block_size} tokens, but the KV cache has {self.pool.num_blocks}: "
                "shorten the request, or start the engine with a larger kv_cache_bytes",
                "max_tokens",
            )

    def abort(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> None:
        """Forget a sequence and free its blocks, after the running step if that writes them.

        ``reason`` is another one where the caller found the answer's end, as at a stop string.
        Unknown and finished sequences are none of its business.
        """
        entry = self._entries.get(sequence_id)
        if entry is None or entry.doomed:
            return
        entry.sequence.finish_reason = reason
        if reason is FinishReason.ABORT:
            self.counters.aborted += 1
        else:
            self.counters.finished += 1
        if self._in_flight is not None and sequence_id in self._in_flight:
            entry.doomed = True
        else:
            self._forget(entry)

    def plan(self) -> StepPlan | None:
        """The next step; None when there is nothing to do.

        :raises RuntimeError: the last step's result is still due, or the scheduler is stuck.
        """
        if self._in_flight is not None:
            raise RuntimeError("a step is in flight: apply its result first")
        rows, preempted = self._plan_running()
        if not preempted:
            self._plan_waiting(rows)
        if not rows:
            if self._entries:
                raise RuntimeError(f"stalled with {self.running} running, {self.waiting} waiting")
            return None
        self._in_flight = rows
        self.counters.steps += 1
        return StepPlan(tuple(sorted(rows.values(), key=lambda row: row.count > 1)))

    def apply(self, result: StepResult) -> list[tuple[Sequence, list[Sampled]]]:
        """Take a step's result; the sequences that got tokens, with ``finish_reason`` if it ended.

        :raises RuntimeError: the result does not belong to the step in flight.
        """
        if self._in_flight is None:
            raise RuntimeError("no step is in flight")
        rows = self._in_flight
        sampled = _by_sequence(result, [row for row in rows.values() if row.sample])
        self._in_flight = None
        progress = []
        for row in rows.values():
            entry = self._entries[row.seq_id]
            self.counters.computed_tokens += row.count
            if entry.doomed:
                self._forget(entry)
                continue
            entry.sequence.num_computed += row.count - len(row.draft)
            if row.sample:
                taken = self._append(entry, sampled[row.seq_id])
                progress.append((entry.sequence, taken))
            self._publish(entry)
            if entry.sequence.finish_reason is not None:
                self._forget(entry)
        return progress

    def check(self) -> None:
        """Raise AssertionError unless the books of scheduler and pool agree."""
        self.pool.check([entry.sequence.block_table for entry in self._entries.values()])
        if any(entry.sequence.block_table for entry in self._waiting):
            raise AssertionError("a waiting sequence holds blocks")
        if [*self._running, *self._waiting] != list(self._entries.values()):
            raise AssertionError("running and waiting sequences are not in order of arrival")

    def _plan_running(self) -> tuple[dict[int, Row], bool]:
        """Rows for the running sequences, decodes before prompts, each oldest first."""
        rows: dict[int, Row] = {}
        budget = self._max_step_tokens
        preempted: set[int] = set()
        for entry in sorted(self._running, key=lambda entry: entry.missing > 1):
            count = min(entry.missing, budget)
            while entry.sequence.id not in preempted and not self._reserve(entry, count):
                victim = self._preempt_youngest().sequence.id
                preempted.add(victim)
                if victim in rows:
                    budget += rows.pop(victim).count
            if count and entry.sequence.id not in preempted:
                rows[entry.sequence.id] = self._row(entry, count)
                budget -= count
        return rows, bool(preempted)

    def _plan_waiting(self, rows: dict[int, Row]) -> None:
        budget = self._max_step_tokens - sum(row.count for row in rows.values())
        while self._waiting and budget and self.running < self._max_sequences:
            entry = self._waiting[0]
            if not self._admit(entry):
                return
            self._running.append(self._waiting.popleft())
            count = min(entry.missing, budget)
            rows[entry.sequence.id] = self._row(entry, count)
            budget -= count

    def _admit(self, entry: _Entry) -> bool:
        """Give a waiting sequence the blocks of all its tokens, cached ones where there are any."""
        sequence = entry.sequence
        # The last token is always computed: its logits are what the step is for.
        reusable = len(sequence.token_ids) - 1
        cached, digest = self.pool.match(sequence.token_ids[:reusable], entry.root)
        if self._computed_soon(entry, (len(cached) + 1) * self.pool.block_size):
            return False
        fresh = self.pool.blocks_for(len(sequence.token_ids)) - len(cached)
        # One block each is left to those who run, or they would soon preempt what is admitted now.
        if fresh + self.pool.idle(cached) + self.running > self.pool.available:
            return False
        self.pool.hold(cached)
        sequence.block_table[:] = cached
        sequence.num_computed = len(cached) * self.pool.block_size
        entry.published, entry.digest = len(cached), digest
        if not self._reserve(entry, entry.missing):
            raise RuntimeError("the pool has fewer blocks than it said are available")
        if not entry.admitted:
            entry.admitted = True
            sequence.num_cached = sequence.num_computed
            self.counters.admitted += 1
            self.counters.prompt_tokens += len(sequence.prompt_ids)
            self.counters.cached_tokens += sequence.num_cached
        return True

    def _computed_soon(self, entry: _Entry, end: int) -> bool:
        """Whether a running prompt with the same tokens up to ``end`` has yet to compute the last.

        Then it pays to wait: choices of one prompt, and requests that arrive together, so compute
        what they share once. They lose little, as older prompts go first in any case.
        """
        tokens = entry.sequence.token_ids
        if not self.pool.prefix_cache or end >= len(tokens):
            return False
        return any(
            other.missing > 1
            and other.root == entry.root
            and other.sequence.num_computed < end <= len(other.sequence.token_ids)
            and other.sequence.token_ids[:end] == tokens[:end]
            for other in self._running
        )

    def _reserve(self, entry: _Entry, count: int) -> bool:
        """Blocks up to the row's end."""
        sequence = entry.sequence
        needed = self.pool.blocks_for(sequence.num_computed + count) - len(sequence.block_table)
        if needed <= 0:
            return True
        taken = self.pool.allocate(needed)
        sequence.block_table.extend(taken or ())
        return taken is not None

    def _preempt_youngest(self) -> _Entry:
        victim = self._running.pop()
        self.pool.release(victim.sequence.block_table)
        victim.sequence.num_computed = 0
        self._waiting.appendleft(victim)
        self.counters.preempted += 1
        return victim

    def _row(self, entry: _Entry, count: int) -> Row:
        sequence = entry.sequence
        return Row(
            seq_id=sequence.id,
            token_ids=sequence.token_ids,
            start=sequence.num_computed,
            count=count,
            block_table=sequence.block_table,
            sample=count == entry.missing,
            sampling=sequence.sampling,
            num_prompt=len(sequence.prompt_ids),
        )

    def _publish(self, entry: _Entry) -> None:
        """Offer the blocks that are full now for reuse."""
        sequence, size = entry.sequence, self.pool.block_size
        for index in range(entry.published, sequence.num_computed // size):
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            entry.digest = self.pool.publish(sequence.block_table[index], entry.digest, tokens)
            entry.published = index + 1

    def _append(self, entry: _Entry, drawn: list[Sampled]) -> list[Sampled]:
        """Add what was drawn, up to the answer's end; all but the last are computed as well."""
        sequence = entry.sequence
        for number, sampled in enumerate(drawn):
            sequence.num_computed += number > 0
            sequence.token_ids.append(sampled.token_id)
            if self._ends(sampled.token_id, sequence):
                sequence.finish_reason = FinishReason.STOP
            elif sequence.num_output >= sequence.sampling.max_tokens:
                sequence.finish_reason = FinishReason.LENGTH
            if sequence.finish_reason is not None:
                self.counters.finished += 1
                return drawn[: number + 1]
        return drawn

    def _ends(self, token_id: int, sequence: Sequence) -> bool:
        sampling = sequence.sampling
        if sequence.num_output < sampling.min_tokens:
            return False
        if token_id in sampling.stop_token_ids:
            return True
        return token_id in self._eos and not sampling.ignore_eos

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.sequence.id]
        where: list[_Entry] | deque[_Entry] = self._running
        if entry not in where:
            where = self._waiting
        where.remove(entry)
        self.pool.release(entry.sequence.block_table)


def _by_sequence(result: StepResult, rows: list[Row]) -> dict[int, list[Sampled]]:
    """What was drawn for each row.

    :raises RuntimeError: not what the rows asked for.
    """
    found: dict[int, list[Sampled]] = {}
    for item in result.sampled:
        found.setdefault(item.seq_id, []).append(item)
    if found.keys() != {row.seq_id for row in rows}:
        raise RuntimeError("the result's sequences are not those that the plan sampled")
    for row in rows:
        drawn = [item.token_id for item in found[row.seq_id]]
        if drawn[:-1] != list(row.draft[: len(drawn) - 1]):
            raise RuntimeError(f"sequence {row.seq_id}: {drawn} do not follow from {row.draft}")
    return found
