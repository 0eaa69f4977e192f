"""Continuous batching without phases: each step, every sequence catches up with its own tokens.

A sequence has ``num_computed`` tokens in the cache and ``len(token_ids)`` tokens in all; a step
computes some of the difference, and draws a token when none is left. Decodes (one token behind) and
chunks of prompts so share one budget of tokens in one step.

Order is by rank: time of arrival, put off by ``PATIENCE`` seconds for each level of priority. So a
rank never changes, and whatever arrives later than the levels between two are worth goes behind: no
priority makes anybody wait for ever. Sequences come in by rank, and when pages run out the last in
rank gives its own back and starts over later, so the first always comes to its end.

Pure bookkeeping: no tensors, no clock, no threads. State changes only in :meth:`Scheduler.add`,
``abort``, ``expire``, ``plan`` and ``apply``; between the last two, the plan's pages are written.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass
from heapq import heappop, heappush

from forebay_engine.budget import StepBudget
from forebay_engine.cache import Hit, KVCache, Pages
from forebay_engine.counters import Counters
from forebay_engine.errors import RequestRefused
from forebay_engine.sequence import FinishReason, Sequence
from forebay_engine.speculation import Speculation
from forebay_engine.step import NO_TOKEN, Row, Sampled, StepPlan, StepResult

#: Seconds of waiting that a level of priority is worth.
PATIENCE = 10.0
#: Levels above and below 0: what comes 2,000 s later is behind, whatever its priority.
MAX_PRIORITY = 100


@dataclass(slots=True, eq=False)
class _Entry:
    """The scheduler's own notes on a sequence."""

    sequence: Sequence
    pages: Pages
    admitted: bool = False
    #: Ended while a step was writing its pages.
    doomed: bool = False

    @property
    def rank(self) -> tuple[float, int]:
        sequence = self.sequence
        return sequence.arrival + PATIENCE * sequence.priority, sequence.id

    @property
    def missing(self) -> int:
        return len(self.sequence.token_ids) - self.sequence.num_computed


class Scheduler:
    """Which sequences run in the next step, and where their keys and values lie."""

    def __init__(
        self,
        cache: KVCache,
        *,
        max_step_tokens: int,
        max_sequences: int,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        speculation: Speculation | None = None,
    ) -> None:
        if max_step_tokens < 1 or max_sequences < 1:
            raise ValueError("max_step_tokens and max_sequences must be at least 1")
        self.cache = cache
        self.counters = Counters()
        self._max_step_tokens = max_step_tokens
        # A sliding window's pool may hold less than a window and a step.
        self._chunk = min(max_step_tokens, cache.longest_chunk(max_model_len))
        if self._chunk < 1:
            raise ValueError(f"the cache is too small for a context of {max_model_len} tokens")
        # Each running sequence gets a token a step, or late ones would starve.
        self._max_sequences = min(max_sequences, max_step_tokens)
        self._max_model_len = max_model_len
        self._eos = eos_token_ids
        self._speculation = speculation
        self._entries: dict[int, _Entry] = {}
        #: Both by rank.
        self._running: list[_Entry] = []
        self._waiting: list[_Entry] = []
        self._deadlines: list[tuple[float, int]] = []
        self._in_flight: dict[int, Row] | None = None

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def fragmentation(self) -> float:
        """Share of the slots in held pages that hold no token yet, 0 to 1."""
        held = self.cache.in_use * self.cache.block_size
        unfilled = sum(self.cache.unfilled(e.pages, e.sequence.num_computed) for e in self._running)
        return unfilled / held if held else 0.0

    def add(self, *choices: Sequence, salt: bytes = b"") -> None:
        """Queue the choices of one prompt; they share its full pages.

        :raises RequestRefused: they could never run to their end.
        """
        for sequence in choices:
            if sequence.pooling is None:
                self.refuse_impossible(len(sequence.prompt_ids), sequence.sampling.max_tokens)
        root = self.cache.root(salt)
        for sequence in choices:
            entry = _Entry(sequence, self.cache.open(root))
            self._entries[sequence.id] = entry
            insort(self._waiting, entry, key=_rank)
            if sequence.deadline is not None:
                heappush(self._deadlines, (sequence.deadline, sequence.id))

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
        lacking = self.cache.lacking(total - 1, self._chunk)
        if lacking is not None:
            needed, there = lacking
            raise RequestRefused(
                f"{prompt} prompt tokens and {max_tokens} max_tokens need {needed} blocks of "
                f"{self.cache.block_size} tokens, but the KV cache has {there}: "
                "shorten the request, or start the engine with a larger kv_cache_bytes",
                "max_tokens",
            )

    def abort(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> None:
        """Forget a sequence and free its pages, after the running step if that writes them.

        ``reason`` is another one where the caller found the answer's end, as at a stop string.
        Unknown and finished sequences are none of its business.
        """
        entry = self._entries.get(sequence_id)
        if entry is None or entry.doomed:
            return
        entry.sequence.finish_reason = reason
        self.counters.count_end(reason)
        if self._in_flight is not None and sequence_id in self._in_flight:
            entry.doomed = True
        else:
            self._forget(entry)

    def expire(self, now: float) -> list[Sequence]:
        """End the sequences whose deadline has passed."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = self._entries.get(heappop(self._deadlines)[1])
            if entry is not None and not entry.doomed:
                self.abort(entry.sequence.id, FinishReason.DEADLINE)
                expired.append(entry.sequence)
        return expired

    def plan(self) -> StepPlan | None:
        """The next step; None when there is nothing to do.

        :raises RuntimeError: the last step's result is still due, or the scheduler is stuck.
        """
        if self._in_flight is not None:
            raise RuntimeError("a step is in flight: apply its result first")
        step = StepBudget(self._max_step_tokens)
        self._plan_running(step)
        if not step.preempted:
            self._plan_waiting(step)
        self._fill(step)
        if not step.counts:
            if self._entries:
                raise RuntimeError(f"stalled with {self.running} running, {self.waiting} waiting")
            return None
        rows = [self._row(self._entries[id], count) for id, count in step.counts.items()]
        if self._speculation is not None:
            rows = self._speculation.extend(rows, step.left, self._spare)
        self._in_flight = {row.seq_id: row for row in rows}
        self.counters.steps += 1
        return StepPlan(tuple(sorted(rows, key=lambda row: row.count > 1)))

    def apply(
        self, result: StepResult, failed: Collection[int] = ()
    ) -> list[tuple[Sequence, list[Sampled]]]:
        """Take a step's result; the sequences that got tokens, with ``finish_reason`` if it ended.

        The rows of ``failed`` sequences, which are no part of the result, end here.

        :raises RuntimeError: the result does not belong to the step in flight.
        """
        if self._in_flight is None:
            raise RuntimeError("no step is in flight")
        rows = [row for row in self._in_flight.values() if row.seq_id not in failed]
        sampled = result.of([row for row in rows if row.sample])
        for id in failed:
            self.abort(id, FinishReason.ERROR)
            self._forget(self._entries[id])
        self._in_flight = None
        if self._speculation is not None:
            self._speculation.take(rows, sampled, result.guessed)
        progress = []
        for row in rows:
            entry = self._entries[row.seq_id]
            self.counters.computed_tokens += row.count
            if entry.doomed:
                self._forget(entry)
                continue
            entry.sequence.num_computed += row.count - len(row.draft)
            if row.draft:
                accepted = len(sampled[row.seq_id]) - 1
                self.counters.count_guesses(entry.sequence, len(row.draft), accepted)
            if row.sample:
                taken = self._append(entry, sampled[row.seq_id])
                self.counters.generated_tokens += len(taken)
                progress.append((entry.sequence, taken))
            elif row.pooling is not None and not entry.missing:
                entry.sequence.finish_reason = FinishReason.STOP
                self.counters.finished += 1
            self.cache.advance(entry.pages, entry.sequence.token_ids, entry.sequence.num_computed)
            if entry.sequence.finish_reason is not None:
                self._forget(entry)
        return progress

    def check(self) -> None:
        """Raise AssertionError unless the books of scheduler and cache agree."""
        self.cache.check([entry.pages for entry in self._entries.values()])
        if any(any(entry.pages.tables) for entry in self._waiting):
            raise AssertionError("a waiting sequence holds pages")
        for entries in (self._running, self._waiting):
            if entries != sorted(entries, key=_rank):
                raise AssertionError("running or waiting sequences are not in order of rank")
        if {id(entry) for entry in [*self._running, *self._waiting]} != {
            id(entry) for entry in self._entries.values()
        }:
            raise AssertionError("a sequence is neither running nor waiting")

    def _plan_running(self, step: StepBudget) -> None:
        """Tokens for the running sequences, decodes before prompts, each by rank."""
        decodes = [entry for entry in self._running if entry.missing == 1]
        prompts = [entry for entry in self._running if entry.missing > 1]
        for entry in decodes:
            self._run(entry, step)
        step.keep_for_short()
        for entry in prompts:
            self._run(entry, step)

    def _run(self, entry: _Entry, step: StepBudget) -> None:
        """Give a running sequence its share of the step; the last in rank give way to it."""
        if entry.sequence.id in step.preempted:
            return
        count = min(step.share(entry.missing), self._chunk)
        while not self._reserve(entry, count):
            victim = self._preempt_last()
            step.preempt(victim.sequence.id)
            if victim is entry:
                return
        step.take(entry.sequence.id, count, entry.missing)

    def _plan_waiting(self, step: StepBudget) -> None:
        """Let sequences in by rank, as long as there are tokens, places and pages."""
        for entry in self._waiting[: self._max_sequences]:
            if not step.left or self.running >= self._max_sequences:
                return
            sequence = entry.sequence
            # The last token's logits are what the step is for; a mean needs all hidden states.
            reusable = [] if sequence.needs_whole_prompt else sequence.token_ids[:-1]
            hit = self.cache.match(entry.pages, reusable)
            if self._computed_soon(entry, len(hit[0])):
                continue
            others = [(e.pages, len(e.sequence.token_ids)) for e in self._running]
            if not self.cache.admits(hit, len(sequence.token_ids), self._chunk, others):
                return
            self._admit(entry, hit)
            self._run(entry, step)

    def _admit(self, entry: _Entry, hit: Hit) -> None:
        sequence = entry.sequence
        self.cache.enter(entry.pages, hit)
        sequence.num_computed = len(hit[0]) * self.cache.block_size
        self._waiting.remove(entry)
        insort(self._running, entry, key=_rank)
        if not entry.admitted:
            entry.admitted = True
            sequence.num_cached = sequence.num_computed
            self.counters.admitted += 1
            self.counters.prompt_tokens += len(sequence.prompt_ids)
            self.counters.cached_tokens += sequence.num_cached

    def _computed_soon(self, entry: _Entry, page: int) -> bool:
        """Whether a running prompt with the same tokens has yet to compute this page of them.

        Then it pays to wait, and to be passed over meanwhile: choices of one prompt, and requests
        that arrive together, so compute what they share once.
        """
        end = (page + 1) * self.cache.block_size
        tokens = entry.sequence.token_ids
        if end >= len(tokens) or entry.sequence.needs_whole_prompt:
            return False
        content = self.cache.content(entry.pages, tokens, page)
        return any(
            other.missing > 1
            and other.pages.root == entry.pages.root
            and other.sequence.num_computed < end <= len(other.sequence.token_ids)
            and self.cache.content(other.pages, other.sequence.token_ids, page) == content
            for other in self._running
        )

    def _fill(self, step: StepBudget) -> None:
        """What nobody else wanted goes to the longer prompts, the first in rank first."""
        step.free_for_all()
        for entry in self._running:
            have = step.counts.get(entry.sequence.id, 0)
            more = step.share(min(entry.missing, self._chunk) - have)
            if more > 0 and self._reserve(entry, have + more):
                step.take(entry.sequence.id, more, more)

    def _reserve(self, entry: _Entry, count: int) -> bool:
        """Pages up to the row's end."""
        return self.cache.reserve(entry.pages, entry.sequence.num_computed + count)

    def _spare(self, row: Row, wanted: int) -> int:
        """Of so many tokens behind a row, how many may run and have pages; takes those pages.

        One page each is left to those who run: a guess is no reason to preempt.
        """
        pages, end = self._entries[row.seq_id].pages, row.start + row.count
        wanted = min(wanted, self._chunk - row.count)
        if self.cache.reserve(pages, end + wanted, leave=self.running):
            return wanted
        return len(pages.tables[0]) * self.cache.block_size - end

    def _preempt_last(self) -> _Entry:
        victim = self._running.pop()
        self._release(victim)
        victim.sequence.num_computed = 0
        insort(self._waiting, victim, key=_rank)
        self.counters.preempted += 1
        return victim

    def _row(self, entry: _Entry, count: int) -> Row:
        sequence = entry.sequence
        return Row(
            seq_id=sequence.id,
            token_ids=sequence.token_ids,
            start=sequence.num_computed,
            count=count,
            block_tables=entry.pages.tables,
            sample=count == entry.missing and sequence.pooling is None,
            sampling=sequence.sampling,
            num_prompt=len(sequence.prompt_ids),
            guide=sequence.guide,
            pooling=sequence.pooling,
        )

    def _append(self, entry: _Entry, drawn: list[Sampled]) -> list[Sampled]:
        """Add what was drawn, up to the answer's end; all but the last are computed as well."""
        sequence = entry.sequence
        for number, sampled in enumerate(drawn):
            sequence.num_computed += number > 0
            if sampled.token_id == NO_TOKEN:
                sequence.finish_reason = FinishReason.ERROR
            else:
                sequence.take(sampled.token_id, self._eos)
            if sequence.finish_reason is not None:
                self.counters.count_end(sequence.finish_reason)
                return drawn[: number + 1]
        return drawn

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.sequence.id]
        (self._running if entry in self._running else self._waiting).remove(entry)
        self._release(entry)

    def _release(self, entry: _Entry) -> None:
        self.cache.release(entry.pages)
        if self._speculation is not None:
            self._speculation.forget(entry.sequence.id)


def _rank(entry: _Entry) -> tuple[float, int]:
    return entry.rank
