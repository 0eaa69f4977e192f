"""Stop strings across pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_plugins.stop_strings import StopStrings


def passed(pieces: list[str], *strings: str) -> str:
    stop = StopStrings(strings)
    return "".join(map(stop.feed, pieces)) + stop.end()


@pytest.mark.parametrize(
    ("pieces", "strings", "text"),
    [
        (["one", " two"], [], "one two"),
        (["one", " two"], ["two"], "one "),
        (["one t", "w", "o three"], ["two"], "one "),
        (["one t", "ea"], ["two"], "one tea"),
        (["one t"], ["two"], "one t"),
        (["aab"], ["ab"], "a"),
        (["a", "a", "b"], ["ab"], "a"),
        (["abc"], ["c", "b"], "a"),
        (["ab", "ab", "ac"], ["abac"], "ab"),
        (["two", " more"], ["two"], ""),
    ],
)
def test_text_passes_up_to_the_first(pieces: list[str], strings: list[str], text: str) -> None:
    assert passed(pieces, *strings) == text


def test_what_cannot_be_a_beginning_is_not_held_back() -> None:
    stop = StopStrings(["end"])
    assert [stop.feed(text) for text in ("one", " e", "xe", "n", "d", "more")] == [
        "on",
        "e ",
        "ex",
        "",
        "",
        "",
    ]
    assert stop.found


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 12), max_size=6),
)
def test_where_the_text_is_cut_makes_no_difference(
    text: str, strings: list[str], cuts: list[int]
) -> None:
    """It passes up to the place at which a stop string is first complete, less that string."""
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert passed(pieces, *strings) == passed(list(text), *strings)
