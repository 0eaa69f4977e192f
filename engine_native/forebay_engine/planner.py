"""Who runs in the next step, and with how many tokens: decodes, then prompts, then who waits.

While a step is under way the next one is planned as if its results were there: a sequence that
draws a token has one more, which nobody knows yet. What can't be planned so is left out: who ends
with that token whatever it is, and who needs to know it. And nothing is planned at all

- where more would be left out than run: to wait for the result, and go on with all of them, costs
  less than two steps of a part each;
- where pages run out. Whoever gave way would be one whose pages are being written, with a token
  drawn that would be lost; after the result, which may free pages by itself, the last in rank gives
  way as ever. A preemption so costs one step's wait, little beside what it computes again.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

from forebay_engine.budget import StepBudget
from forebay_engine.cache import Hit, KVCache
from forebay_engine.counters import Counters
from forebay_engine.queues import Entry, Queues, by_rank


class Planner:
    """Shares out the tokens of a step, and the pages for them.

    :param chunk: most tokens of one sequence in a step.
    :param release: takes a sequence's pages from it.
    """

    def __init__(
        self,
        cache: KVCache,
        queues: Queues,
        counters: Counters,
        *,
        max_step_tokens: int,
        max_sequences: int,
        chunk: int,
        release: Callable[[Entry], None],
    ) -> None:
        self._cache = cache
        self._queues = queues
        self._counters = counters
        self._max_step_tokens = max_step_tokens
        # Each running sequence gets a token a step, or late ones would starve.
        self._max_sequences = min(max_sequences, max_step_tokens)
        self._chunk = chunk
        self._release = release

    def plan(self, *, ahead: bool) -> StepBudget | None:
        """Tokens for each; None: nothing before the result of the step under way.

        :param ahead: a step is under way.
        """
        step = StepBudget(self._max_step_tokens)
        decodes, prompts, held = self._ready()
        if held and held >= len(decodes) + len(prompts):
            return None
        if not self._decode(decodes, step, ahead):
            return None
        step.keep_for_short()
        for entry in prompts:
            if not self._run(entry, step, ahead):
                return None
        if not step.preempted:
            prompts += self._let_in(step, ahead)
        self._fill(prompts, step)
        return step

    def computed_soon(self, entry: Entry, page: int) -> bool:
        """Whether a running prompt with the same tokens has yet to compute this page of them.

        Then it pays to wait, and to be passed over meanwhile: choices of one prompt, and requests
        that arrive together, so compute what they share once.
        """
        end = (page + 1) * self._cache.block_size
        tokens = entry.sequence.token_ids
        if end >= len(tokens) or entry.sequence.needs_whole_prompt:
            return False
        content = self._cache.content(entry.pages, tokens, page)
        return any(
            len(other.sequence.token_ids) - other.sequence.num_computed > 1
            and other.pages.root == entry.pages.root
            and other.sequence.num_computed < end <= len(other.sequence.token_ids)
            and self._cache.content(other.pages, other.sequence.token_ids, page) == content
            for other in self._queues.running
        )

    def _ready(self) -> tuple[list[Entry], list[Entry], int]:
        """Running sequences that are one token behind, and more than one, each by rank.

        And how many must first know the token that is being drawn for them.
        """
        decodes: list[Entry] = []
        prompts: list[Entry] = []
        held = 0
        for entry in self._queues.running:
            sequence, row = entry.sequence, entry.row
            if row is None or not row.sample:
                missing = len(sequence.token_ids) - entry.reach
                if missing:
                    (decodes if missing == 1 else prompts).append(entry)
            elif len(sequence.token_ids) + 1 < sequence.most_tokens:
                if entry.waits:
                    held += 1
                else:
                    decodes.append(entry)
            # Else with that token it ends, whatever it is.
        return decodes, prompts, held

    def _decode(self, entries: list[Entry], step: StepBudget, ahead: bool) -> bool:
        """A token for each; False: pages are lacking."""
        full = [entry for entry in entries if entry.reach == entry.pages.end]
        if not self._cache.reserve_next([entry.pages for entry in full]):
            for entry in full:
                if entry not in step.preempted and not self._make_room(entry, 1, step, ahead):
                    return False
            entries = [entry for entry in entries if entry not in step.preempted]
        step.decode(entries)
        return True

    def _run(self, entry: Entry, step: StepBudget, ahead: bool) -> bool:
        """Give a running sequence its share of the step; False: pages are lacking."""
        if entry in step.preempted:
            return True
        missing = entry.total - entry.reach
        count = min(step.share(missing), self._chunk)
        if not self._make_room(entry, count, step, ahead):
            return False
        if entry not in step.preempted:
            step.take(entry, count, missing)
        return True

    def _make_room(self, entry: Entry, count: int, step: StepBudget, ahead: bool) -> bool:
        """Pages for so many tokens, for which the last in rank give way, at worst it itself.

        False: they are lacking, and who could give way is under way.
        """
        while not self._reserve(entry, count):
            if ahead:
                return False
            victim = self._queues.send_back()
            self._release(victim)
            victim.sequence.num_computed = victim.reach = 0
            self._counters.preempted += 1
            step.preempt(victim)
            if victim is entry:
                break
        return True

    def _let_in(self, step: StepBudget, ahead: bool) -> list[Entry]:
        """Let sequences in by rank, as long as there are tokens, places and pages."""
        found: list[Entry] = []
        running = self._queues.running
        for entry in self._queues.waiting[: self._max_sequences]:
            if not step.left or len(running) >= self._max_sequences:
                break
            sequence = entry.sequence
            # The last token's logits are what the step is for; a mean needs all hidden states.
            reusable = [] if sequence.needs_whole_prompt else sequence.token_ids[:-1]
            hit = self._cache.match(entry.pages, reusable)
            if self.computed_soon(entry, len(hit[0])):
                continue
            others = [(other.pages, other.total) for other in running]
            if not self._cache.admits(hit, len(sequence.token_ids), self._chunk, others):
                break
            self._admit(entry, hit)
            self._run(entry, step, ahead)
            found.append(entry)
        return found

    def _admit(self, entry: Entry, hit: Hit) -> None:
        sequence = entry.sequence
        self._cache.enter(entry.pages, hit)
        sequence.num_computed = entry.reach = len(hit[0]) * self._cache.block_size
        self._queues.admit(entry)
        if not entry.admitted:
            entry.admitted = True
            sequence.num_cached = sequence.num_computed
            self._counters.admitted += 1
            self._counters.prompt_tokens += len(sequence.prompt_ids)
            self._counters.cached_tokens += sequence.num_cached

    def _fill(self, prompts: Items[Entry], step: StepBudget) -> None:
        """What nobody else wanted goes to the longer prompts, the first in rank first."""
        step.free_for_all()
        for entry in sorted(prompts, key=by_rank):
            if not step.left:
                return
            if entry in step.preempted:
                continue
            have = step.counts.get(entry, 0)
            more = step.share(min(entry.total - entry.reach, self._chunk) - have)
            if more > 0 and self._reserve(entry, have + more):
                step.take(entry, more, more)

    def _reserve(self, entry: Entry, count: int) -> bool:
        """Pages up to the row's end."""
        return self._cache.reserve(entry.pages, entry.reach + count)
