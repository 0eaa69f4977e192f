"""Continuous batching without phases: each step, every sequence catches up with its own tokens.

A sequence has ``num_computed`` tokens in the cache and ``len(token_ids)`` tokens in all; a step
computes some of the difference, and draws a token when none is left. Decodes (one token behind) and
chunks of prompts so share one budget of tokens in one step.

Order is by rank: time of arrival, put off by ``PATIENCE`` seconds for each level of priority. So a
rank never changes, and whatever arrives later than the levels between two are worth goes behind: no
priority makes anybody wait for ever. Sequences come in by rank, and when pages run out the last in
rank gives its own back and starts over later, so the first always comes to its end.

It can run ahead: plan a step before the result of the one before is applied, so that a device need
not wait for its host. A sequence whose token is being drawn runs on behind it, unknown as it is.
Where it turns out to have ended with that token, the row that is under way is for nothing; its
result is dropped, and the sequence keeps its pages until the step that writes them is over.

Pure bookkeeping: no tensors, no clock, no threads. State changes only in :meth:`Scheduler.add`,
``abort``, ``expire``, ``plan``, ``apply``, ``discard`` and ``retry``; from a plan until its result
is applied, the plan's pages are written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from collections.abc import Sequence as Items
from heapq import heappop, heappush

from msgspec import structs

from forebay_engine.cache import KVCache
from forebay_engine.counters import Counters
from forebay_engine.errors import RequestRefused
from forebay_engine.planner import Planner
from forebay_engine.queues import Entry, Queues
from forebay_engine.sequence import FinishReason, SamplingParams, Sequence
from forebay_engine.speculation import Speculation
from forebay_engine.step import NO_TOKEN, Row, Sampled, StepPlan, StepResult

#: Levels above and below 0: what comes 2,000 s later is behind, whatever its priority.
MAX_PRIORITY = 100


class Scheduler:
    """Which sequences run in the next step, and where their keys and values lie.

    :param ahead: whether a token with these parameters can be drawn behind one that is not known
        yet. None: a step is planned when the one before is over. With speculation it always is:
        what is guessed follows from the last token.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        max_step_tokens: int,
        max_sequences: int,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        speculation: Speculation | None = None,
        ahead: Callable[[SamplingParams], bool] | None = None,
    ) -> None:
        if max_step_tokens < 1 or max_sequences < 1:
            raise ValueError("max_step_tokens and max_sequences must be at least 1")
        self.cache = cache
        self.counters = Counters()
        # A sliding window's pool may hold less than a window and a step.
        self._chunk = min(max_step_tokens, cache.longest_chunk(max_model_len))
        if self._chunk < 1:
            raise ValueError(f"the cache is too small for a context of {max_model_len} tokens")
        self._max_model_len = max_model_len
        self._eos = eos_token_ids
        self._speculation = speculation
        self._takes_unknown = ahead if speculation is None else None
        self._queues = Queues()
        self._planner = Planner(
            cache,
            self._queues,
            self.counters,
            max_step_tokens=max_step_tokens,
            max_sequences=max_sequences,
            chunk=self._chunk,
            release=self._release,
        )
        self._deadlines: list[tuple[float, int]] = []
        #: The steps under way, the oldest first.
        self._flights: deque[Items[Row]] = deque()

    @property
    def most_in_flight(self) -> int:
        """Steps that may be under way at a time."""
        return 1 if self._takes_unknown is None else 2

    @property
    def running(self) -> int:
        return len(self._queues.running)

    @property
    def waiting(self) -> int:
        return len(self._queues.waiting)

    @property
    def fragmentation(self) -> float:
        """Share of the slots in held pages that hold no token yet, 0 to 1."""
        held = self.cache.in_use * self.cache.block_size
        running = self._queues.running
        unfilled = sum(self.cache.unfilled(e.pages, e.sequence.num_computed) for e in running)
        return unfilled / held if held else 0.0

    def add(self, *choices: Sequence, salt: bytes = b"") -> None:
        """Queue the choices of one prompt; they share its full pages.

        :raises RequestRefused: they could never run to their end.
        """
        for sequence in choices:
            if sequence.pooling is None:
                self.refuse_impossible(len(sequence.prompt_ids), sequence.sampling.max_tokens)
        root, ahead = self.cache.root(salt), self._takes_unknown
        for sequence in choices:
            entry = Entry(sequence, self.cache.open(root))
            # A grammar moves on by the token.
            entry.waits = sequence.guide is not None or not (ahead and ahead(sequence.sampling))
            self._queues.add(entry)
            if sequence.deadline is not None:
                heappush(self._deadlines, (sequence.deadline, sequence.id))

    def refuse_impossible(self, prompt: int, max_tokens: int) -> None:
        """Refuse what could not be served even with the whole cache to itself."""
        if prompt < 1:
            raise RequestRefused("the prompt is empty: at least one token is needed", "prompt")
        if max_tokens < 0:
            raise RequestRefused(f"max_tokens is {max_tokens}; it must be at least 0", "max_tokens")
        total = prompt + max_tokens
        if total > self._max_model_len:
            raise RequestRefused(
                f"the context holds {self._max_model_len} tokens, but {total} are asked for: "
                f"{prompt} of prompt and {max_tokens} of max_tokens; shorten one of them",
                "prompt" if prompt >= self._max_model_len else "max_tokens",
            )
        # The last token, if it is drawn, is never computed.
        lacking = self.cache.lacking(max(prompt, total - 1), self._chunk)
        if lacking is not None:
            needed, there = lacking
            raise RequestRefused(
                f"{prompt} prompt tokens and {max_tokens} max_tokens need {needed} blocks of "
                f"{self.cache.block_size} tokens, but the KV cache has {there}: "
                "shorten the request, or start the engine with a larger kv_cache_bytes",
                "max_tokens",
            )

    def abort(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> None:
        """Forget a sequence and free its pages, after the steps under way that write them.

        ``reason`` is another one where the caller found the answer's end, as at a stop string.
        Unknown and finished sequences are none of its business.
        """
        entry = self._queues.entries.get(sequence_id)
        if entry is None or entry.sequence.finish_reason is not None:
            return
        entry.sequence.finish_reason = reason
        self.counters.count_end(reason)
        self._end(entry)

    def expire(self, now: float) -> list[Sequence]:
        """End the sequences whose deadline has passed."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = self._queues.entries.get(heappop(self._deadlines)[1])
            if entry is not None and entry.sequence.finish_reason is None:
                self.abort(entry.sequence.id, FinishReason.DEADLINE)
                expired.append(entry.sequence)
        return expired

    def plan(self) -> StepPlan | None:
        """The next step; None: there is nothing to do, at least before a result that is due.

        :raises RuntimeError: too many results are still due, or the scheduler is stuck.
        """
        ahead = bool(self._flights)
        if len(self._flights) >= self.most_in_flight:
            raise RuntimeError("steps are in flight: apply a result first")
        step = self._planner.plan(ahead=ahead)
        if step is None:
            return None
        if not step.counts:
            if not ahead and self._queues.entries:
                raise RuntimeError(f"stalled with {self.running} running, {self.waiting} waiting")
            return None
        rows = [_depart(entry, count) for entry, count in step.counts.items()]
        if self._speculation is not None:
            rows = self._speculation.extend(rows, step.left, self._spare)
            for entry, row in zip(step.counts, rows, strict=True):
                entry.row, entry.reach = row, row.start + row.count
        if max([row.count for row in rows]) > 1:
            rows.sort(key=lambda row: row.count > 1)
        self._flights.append(rows)
        self.counters.steps += 1
        return StepPlan(tuple(rows))

    def apply(
        self, result: StepResult, failed: Collection[int] = ()
    ) -> list[tuple[Sequence, list[Sampled]]]:
        """Take the oldest step's result; the sequences that got tokens, or ended without any.

        The rows of ``failed`` sequences, which are no part of the result, end here.

        :raises RuntimeError: the result does not belong to that step.
        """
        if not self._flights:
            raise RuntimeError("no step is in flight")
        rows = self._flights[0]
        if failed:
            rows = [row for row in rows if row.seq_id not in failed]
        draws = result.of(rows)
        if failed:
            self._fail(failed)
        self._flights.popleft()
        if self._speculation is not None:
            drawn_by = {row.seq_id: drawn for row, drawn in zip(rows, draws, strict=True)}
            self._speculation.take(rows, drawn_by, result.guessed)
        progress = []
        entries = self._queues.entries
        for row, drawn in zip(rows, draws, strict=True):
            entry = entries[row.seq_id]
            sequence = entry.sequence
            if sequence.finish_reason is None:
                taken = self._advance(entry, row, drawn)
                if taken or sequence.finish_reason is not None:
                    progress.append((sequence, taken))
            if entry.row is row:
                self._land(entry)
        self.counters.computed_tokens += sum([row.count for row in rows])
        self.counters.generated_tokens += sum([len(drawn) for _, drawn in progress])
        return progress

    def discard(self) -> None:
        """The step planned last was executed for nothing: it is as if it had not been planned.

        The places in the cache that it wrote are written again before anybody reads them.
        """
        rows = self._flights.pop()
        before = {row.seq_id: row for row in self._flights[-1]} if self._flights else {}
        for row in rows:
            entry = self._queues.entries[row.seq_id]
            entry.row, entry.reach = before.get(row.seq_id), row.start
            if entry.row is None:
                self._land(entry)

    def retry(self) -> StepPlan:
        """The only step under way once more, with the tokens that have become known since.

        Whoever has ended meanwhile is no longer in it, so there may be no row.
        """
        rows = []
        for row in self._flights.pop():
            entry = self._queues.entries[row.seq_id]
            if entry.sequence.finish_reason is not None:
                self._land(entry)
                continue
            entry.row = structs.replace(row, unknown=0)
            rows.append(entry.row)
        self._flights.append(rows)
        return StepPlan(tuple(rows))

    def check(self) -> None:
        """Raise AssertionError unless the books of scheduler and cache agree."""
        self.cache.check([entry.pages for entry in self._queues.entries.values()])
        self._queues.check()

    def _spare(self, row: Row, wanted: int) -> int:
        """Of so many tokens behind a row, how many may run and have pages; takes those pages.

        One page each is left to those who run: a guess is no reason to preempt.
        """
        pages, end = self._queues.entries[row.seq_id].pages, row.start + row.count
        wanted = min(wanted, self._chunk - row.count)
        if self.cache.reserve(pages, end + wanted, leave=self.running):
            return wanted
        return pages.end - end

    def _advance(self, entry: Entry, row: Row, drawn: list[Sampled]) -> list[Sampled]:
        """Take what a row came to; of what was drawn, what there is up to the answer's end."""
        sequence, pages = entry.sequence, entry.pages
        computed = sequence.num_computed + row.count
        if row.draft:
            computed -= len(row.draft)
            self.counters.count_guesses(sequence, len(row.draft), len(drawn) - 1)
        taken = 0  # counted by hand: an enumerate for each row takes 0.1 µs
        for sampled in drawn:
            taken += 1
            if sampled.token_id == NO_TOKEN:
                sequence.finish_reason = FinishReason.ERROR
            else:
                sequence.take(sampled.token_id, self._eos)
            if sequence.finish_reason is not None:
                drawn = drawn[:taken]
                break
        if taken:
            computed += taken - 1  # the last is not computed yet
        elif not sequence.draws and computed == len(sequence.token_ids):
            scored = sequence.pooling is None
            sequence.finish_reason = FinishReason.LENGTH if scored else FinishReason.STOP
        sequence.num_computed = computed
        if computed >= pages.due:
            self.cache.advance(pages, sequence.token_ids, computed)
        if sequence.finish_reason is not None:
            self.counters.count_end(sequence.finish_reason)
            self._queues.leave(entry)
        return drawn

    def _fail(self, failed: Collection[int]) -> None:
        """These sequences end with the oldest step, which could not be executed for them."""
        for id in failed:
            self.abort(id, FinishReason.ERROR)
        for row in self._flights[0]:
            entry = self._queues.entries[row.seq_id]
            if row.seq_id in failed and entry.row is row:
                self._land(entry)

    def _land(self, entry: Entry) -> None:
        """No step is under way for it any longer, so if it has ended its pages are free."""
        entry.row = None
        entry.reach = entry.sequence.num_computed
        if entry.sequence.finish_reason is not None:
            self._forget(entry)

    def _end(self, entry: Entry) -> None:
        """A sequence has ended, maybe while steps under way write its pages."""
        self._queues.leave(entry)
        if entry.row is None:
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        del self._queues.entries[entry.sequence.id]
        self._release(entry)

    def _release(self, entry: Entry) -> None:
        self.cache.release(entry.pages)
        if self._speculation is not None:
            self._speculation.forget(entry.sequence.id)


def _depart(entry: Entry, count: int) -> Row:
    """A sequence's next tokens as a row of a step that is under way from now on."""
    sequence, start, tokens = entry.sequence, entry.reach, entry.sequence.token_ids
    unknown = int(entry.row is not None and entry.row.sample)
    entry.reach = end = start + count
    # By position, as there are hundreds in a step: with names it takes twice as long.
    entry.row = row = Row(
        sequence.id,
        tokens,
        start,
        count,
        entry.pages.tables,
        end == len(tokens) + unknown and sequence.draws,
        sequence.sampling,
        len(sequence.prompt_ids),
        (),
        sequence.guide,
        sequence.pooling,
        None,
        unknown,
    )
    return row
