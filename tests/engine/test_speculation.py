"""Speculation changes how fast an answer comes, and nothing else."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from forebay_engine.acceptance import Acceptance, Guess
from forebay_engine.costs import StepCosts, worthwhile
from forebay_engine.prompt_lookup import NgramIndex, PromptLookup
from forebay_engine.sequence import SamplingParams, Sequence
from forebay_engine.speculation import DraftSpeculation, ImmediateSpeculation, Limits, Proposer
from forebay_engine.step import Guessed, Row, Sampled
from shadow_runner import ShadowRunner, guessing, make_scheduler, run

FREE = StepCosts((1,), (1.0,))
DEAR = StepCosts((1, 2), (1.0, 2.0))


def row(tokens: list[int], num_prompt: int = 1, **sampling: object) -> Row:
    params = SamplingParams(**{"max_tokens": 1000, **sampling})  # type: ignore[arg-type]
    return Row(7, tokens, len(tokens) - 1, 1, ((),), True, params, num_prompt)


def immediate(proposer: Proposer, costs: StepCosts, most: int) -> ImmediateSpeculation:
    return ImmediateSpeculation(proposer, Acceptance(costs), Limits(most, frozenset({9})))


def everything(row: Row, wanted: int) -> int:
    return wanted


@pytest.mark.parametrize(
    ("tokens", "guess", "agreed"),
    [
        ([1, 2, 3, 9, 1, 2, 3], (9, 1, 2, 3), 3),
        # The longest agreement goes before the latest.
        ([1, 2, 3, 4, 2, 3, 5, 1, 2, 3], (4, 2, 3, 5), 3),
        # Among equally long ones the latest.
        ([2, 3, 4, 0, 2, 3, 5, 1, 2, 3], (5, 1, 2, 3), 2),
        # A period goes on for ever.
        ([8, 1, 2, 1, 2, 1, 2], (1, 2, 1, 2), 4),
        ([5, 5, 5], (5, 5, 5, 5), 2),
        ([1, 2, 3, 2], (), 0),
        ([1], (), 0),
    ],
)
def test_what_followed_the_longest_earlier_occurrence_is_guessed(
    tokens: list[int], guess: tuple[int, ...], agreed: int
) -> None:
    assert PromptLookup().guess(row(tokens), 4) == Guess(guess, agreed)


class Counted(list[int]):
    """Tokens, and how often one of them was looked at."""

    looks = 0

    def __getitem__(self, at: Any) -> Any:
        self.looks += 1
        return super().__getitem__(at)


def test_looking_takes_as_much_however_long_the_text_is() -> None:
    looks = []
    for length in (300, 3000, 30_000):
        # Each pair has many earlier places, none of which agrees in more than two tokens.
        tokens = Counted(token for at in range(length) for token in (1, 2, 3 + at))
        tokens += (1, 2)
        proposer = PromptLookup()
        while not (guess := proposer.guess(row(tokens), 4)).token_ids:
            pass
        assert guess.agreed == 2
        tokens.looks = 0
        proposer.guess(row(tokens), 4)
        looks.append(tokens.looks)
    # At 16 places two tokens that agree and one that does not, in pairs; and the guesses.
    assert looks == [16 * 3 * 2 + 4] * 3


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60), data=st.data())
def test_an_index_that_grows_finds_what_a_search_finds(
    tokens: list[int], data: st.DataObject
) -> None:
    index = NgramIndex()
    while len(index) < len(tokens):
        index.extend(tokens, data.draw(st.integers(len(index) + 1, len(tokens))))
        known = tokens[: len(index)]
        place, agreed = index.find(known)
        lengths = {}
        for end in range(len(known) - 1):
            lengths[end] = 0
            while lengths[end] < min(8, end + 1) and (
                known[end - lengths[end]] == known[-1 - lengths[end]]
            ):
                lengths[end] += 1
        # A chain of pairs, cut off at 16 places: at most the best, and what it says it is.
        assert agreed == (lengths[place] if place >= 0 else 0)
        pairs = [end for end, length in lengths.items() if length >= 2][-16:]
        assert agreed == max((lengths[end] for end in pairs), default=0)


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    proposer = PromptLookup()
    asked = row([*range(5000), *range(5000)])
    assert [len(proposer.guess(asked, 4).token_ids) for _ in range(4)] == [0, 0, 4, 4]


def test_an_answer_is_not_guessed_beyond_its_end() -> None:
    def drafted(tokens: list[int], **sampling: object) -> tuple[int, ...]:
        speculation = immediate(PromptLookup(), FREE, 8)
        (found,) = speculation.extend([row(tokens, len(tokens), **sampling)], 100, everything)
        return found.draft

    again = [1, 2, 3, 4, 9, 5, 6, 1, 2]
    assert drafted(again) == (3, 4)
    assert drafted(again, stop_token_ids=(4,)) == (3,)
    assert drafted(again, ignore_eos=True) == (3, 4, 9, 5, 6, 1, 2, 3)
    assert drafted(again, ignore_eos=True, max_tokens=4) == (3, 4, 9)
    assert drafted(again, max_tokens=1) == ()


def test_costs_lie_on_lines_between_what_was_measured() -> None:
    costs = StepCosts((1, 4, 8), (1.0, 1.3, 2.1), drafted_row=0.5)
    found = [costs.of(tokens, 0) for tokens in (1, 2, 4, 6, 8, 16)]
    assert found == pytest.approx([1.0, 1.1, 1.3, 1.7, 2.1, 3.7])
    assert costs.of(2, 2) == pytest.approx(2.1)
    assert FREE.of(100, 3) == 1.0


@given(
    chances=st.lists(st.lists(st.floats(0, 1), max_size=4), min_size=1, max_size=4),
    seconds=st.lists(st.floats(0.1, 5), min_size=3, max_size=3),
    drafted_row=st.floats(0, 1),
    budget=st.integers(0, 20),
)
def test_so_many_guesses_are_verified_as_yield_most_a_second(
    chances: list[list[float]], seconds: list[float], drafted_row: float, budget: int
) -> None:
    chances = [sorted(chain, reverse=True) for chain in chances]
    costs = StepCosts((1, 4, 16), tuple(sorted(seconds)), drafted_row)
    rows = len(chances)
    lengths = worthwhile(chances, costs, tokens=rows, draws=rows, budget=budget)
    assert sum(lengths) <= budget
    assert all(length <= len(chain) for length, chain in zip(lengths, chances, strict=True))

    def rate(counts: list[int]) -> float:
        expected = sum(sum(chain[:n]) for chain, n in zip(chances, counts, strict=True))
        return (rows + expected) / costs.of(rows + sum(counts), sum(map(bool, counts)))

    if sum(lengths):
        assert rate(lengths) > 1.05 * rate([0] * rows)


def test_guesses_are_taken_where_they_are_likeliest() -> None:
    cheap = StepCosts((1, 100), (1.0, 2.0))
    chances = [[0.9, 0.8, 0.7], [0.2, 0.1], []]
    assert worthwhile(chances, cheap, tokens=3, draws=3, budget=3) == [3, 0, 0]
    assert worthwhile(chances, cheap, tokens=3, draws=3, budget=4) == [3, 1, 0]
    assert worthwhile(chances, FREE, tokens=3, draws=3, budget=9) == [3, 2, 0]
    # A step of two tokens costs what two steps cost.
    assert worthwhile(chances, DEAR, tokens=3, draws=3, budget=9) == [0, 0, 0]


class Fixed:
    """The same guess at every step."""

    def guess(self, row: Row, most: int) -> Guess:
        return Guess((5,) * most, 3)

    def forget(self, seq_id: int) -> None:
        pass


def drafted(chance: float, costs: StepCosts, steps: int, most: int = 4) -> list[int]:
    """How many guesses each step verified when each comes true with this chance."""
    speculation = immediate(Fixed(), costs, most)
    asked, random, found = row([1], max_tokens=10**6), Random(3), []
    for _ in range(steps):
        (extended,) = speculation.extend([asked], 100, everything)
        true = [random.random() < chance for _ in extended.draft]
        accepted = (*true, False).index(False)
        speculation.take([extended], {7: [Sampled(7, 5)] * (accepted + 1)}, ())
        found.append(len(extended.draft))
    return found


#: The second token costs a fifth of a step, as do those after it.
FIFTH = StepCosts((1, 11), (1.0, 3.0))


def test_guesses_that_never_come_true_are_given_up_and_seldom_tried() -> None:
    found = drafted(0.0, FIFTH, 2000)
    assert max(found[:5]) > 0
    assert max(found[50:]) == 1
    assert sum(found[1000:]) <= 3


def test_guesses_that_come_true_grow_long_and_stay() -> None:
    found = drafted(1.0, FIFTH, 100)
    assert found[20:] == [4] * 80


def test_how_far_guesses_go_follows_how_often_they_come_true() -> None:
    means = [math.fsum(drafted(chance, FIFTH, 600)[100:]) / 500 for chance in (0.1, 0.5, 0.9)]
    assert means[0] < 0.2
    assert means[0] < means[1] < means[2]
    assert means[2] > 3


def test_what_came_of_guesses_elsewhere_is_where_a_new_sequence_starts() -> None:
    speculation = immediate(Fixed(), FIFTH, 4)
    lengths = []
    for number in range(60):
        one = structs.replace(row([1]), seq_id=number)
        (extended,) = speculation.extend([one], 100, everything)
        speculation.take([extended], {number: [Sampled(number, 0)]}, ())
        speculation.forget(number)
        lengths.append(len(extended.draft))
    assert lengths[0] > 0
    assert lengths[-1] == 0


def test_a_draft_model_guesses_while_that_pays_and_never_lacks_a_full_page() -> None:
    """Its guess costs a quarter of a step."""
    random, long = Random(5), []
    for chance in (0.0, 0.9):
        acceptance = Acceptance(StepCosts((1, 11), (1.0, 2.0)), StepCosts((1,), (0.25,)))
        speculation = DraftSpeculation(acceptance, Limits(4), block_size=4)
        tokens, computed, verified = [1], 0, []
        while len(tokens) < 600:
            asked = structs.replace(row(tokens), start=len(tokens) - 1)
            (extended,) = speculation.extend([asked], 100, everything)
            verified.append(len(extended.draft))
            true = [random.random() < chance for _ in extended.draft]
            accepted = (*true, False).index(False)
            tokens = [*tokens, *[5] * (accepted + 1)]
            ahead, guesses = extended.lookahead, ()
            if ahead is not None:
                assert min(ahead.start, len(tokens) - 1) <= computed
                guesses = (5,) * ahead.count
                computed = len(tokens) - 1 + ahead.count
            else:
                computed = min(computed, len(tokens) - 1)
            assert (len(tokens) - 1) // 4 * 4 <= computed
            drawn = {7: [Sampled(7, 5)] * (accepted + 1)}
            speculation.take([extended], drawn, [Guessed(7, guesses)] if guesses else [])
        long.append(math.fsum(verified[100:]) / len(verified[100:]))
    assert long[0] < 0.02
    assert long[1] > 2


def test_a_guess_that_needs_a_page_leaves_one_to_each_that_runs() -> None:
    """Two pages of two: the second is needed for a third token, and not taken for a guess."""
    guesses = guessing("ngram", 2, 2, seed=3)
    scheduler = make_scheduler(blocks=2, speculation=guesses)
    scheduler.add(Sequence(0, [1], SamplingParams(max_tokens=4, ignore_eos=True)))
    for plan in run(scheduler, ShadowRunner(2)):
        (only,) = plan.rows
        assert only.start + only.count <= 2 or only.start >= 2


def test_guesses_take_only_what_is_left_of_a_step() -> None:
    scheduler = make_scheduler(blocks=60, budget=6, speculation=guessing("ngram", 5, 2, seed=1))
    sequences = [
        Sequence(id, [id], SamplingParams(max_tokens=9, ignore_eos=True)) for id in range(4)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    alive = {0, 1, 2, 3}
    for plan in run(scheduler, ShadowRunner(2)):
        assert plan.num_tokens <= 6
        assert {row.seq_id for row in plan.rows} == alive
        alive = {sequence.id for sequence in sequences if sequence.finish_reason is None}
    assert scheduler.counters.drafted_tokens > 0
