"""The model behind the fake servers is one: tokens, chance and constraints are what they say."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_servers.answer import Holding, pieces
from fake_servers.constraint import Impossible, by_grammar, by_regex, by_schema
from fake_servers.model import BOS, EOS, Ask, detokenize, piece_of, tokenize, walk

ASK = Ask(prompt=(BOS, *tokenize("one two three")), max_tokens=24, temperature=0)
HOT = replace(ASK, temperature=1.3)


def said(ask: Ask, holding: Holding = "longest") -> str:
    return "".join(piece.text for piece in pieces(ask, holding))


@given(st.text())
def test_tokens_become_the_text_again(text: str) -> None:
    assert detokenize(tokenize(text)) == text


@given(st.integers(min_value=0, max_value=10**12))
def test_every_id_is_one_text_or_none(token: int) -> None:
    piece = piece_of(token)
    assert len(piece) <= 5
    if token >= 1000 and piece:
        assert {other for other in range(token - 3, token + 4) if piece_of(other) == piece} == {
            token
        }


def test_greedy_says_the_same_and_a_seed_too_but_not_another() -> None:
    assert said(ASK) == said(ASK)
    assert said(replace(HOT, seed=7)) == said(replace(HOT, seed=7))
    assert len({said(replace(HOT, seed=seed)) for seed in range(6)}) > 3


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.0001}, {"min_p": 1.0}])
def test_filters_leave_one(narrow: dict[str, float]) -> None:
    assert {said(replace(HOT, seed=seed, **narrow)) for seed in range(4)} == {said(ASK)}


def test_penalties_and_biases_tell() -> None:
    assert said(replace(ASK, frequency_penalty=2)) != said(ASK)
    assert said(replace(ASK, logit_bias={1000: 100}, max_tokens=3)) == "!!!"


def test_logprobs_are_of_one_distribution_best_first() -> None:
    for step in walk(ASK):
        found = [logprob for _, logprob in step.top]
        assert found == sorted(found, reverse=True)
        assert all(logprob <= 0 for logprob in found)
        assert dict(step.top)[step.token] == step.logprob


def test_long_answers_end_by_themselves_unless_told_not_to() -> None:
    endless = replace(ASK, max_tokens=3000)
    tokens = [step.token for step in walk(endless)]
    assert tokens[-1] == EOS
    assert EOS not in tokens[:-1]
    assert len(list(walk(replace(endless, ignore_eos=True)))) == 3000


@given(st.integers(0, 50), st.integers(1, 9), st.sampled_from(["longest", "begin"]))
def test_nothing_of_a_stop_string_is_ever_said(begin: int, size: int, holding: Holding) -> None:
    whole = said(ASK)
    stop = whole[begin : begin + size]
    if stop:
        found = list(pieces(replace(ASK, stop=(stop,)), holding))
        assert "".join(piece.text for piece in found) == whole[: whole.index(stop)]
        assert (found[-1].finish, found[-1].matched) == ("stop", stop)


def test_stop_strings_that_stay_end_with_a_token() -> None:
    texts = [piece.text for piece in pieces(ASK, "ends")]
    stop = texts[4] + texts[5]
    assert said(replace(ASK, stop=(stop,)), "ends") == "".join(texts[:6])
    inside = stop[:-1]
    assert said(replace(ASK, stop=(inside,)), "ends") == "".join(texts)


def test_constraints_are_kept_to() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"const": 3},
            "b": {"enum": ["x", "y"]},
            "c": {"type": "array", "items": {"type": "integer", "minimum": 4}, "minItems": 2},
            "d": {"type": "string", "pattern": "[a-c]{2}\\d"},
        },
        "required": ["a", "b", "c", "d"],
    }
    made = json.loads(by_schema(schema))
    assert made == {"a": 3, "b": "x", "c": [4, 4], "d": "aa0"}
    for pattern in ("zeb[0-9]{3}", "(a|b)+c?", r"\d{2}-\w+"):
        assert re.fullmatch(pattern, by_regex(pattern))
    assert by_grammar('root ::= "x" rest | "y"\nrest ::= "z"') == "xz"
    assert said(replace(ASK, forced="zebra")) == "zebra"
    for wrong in ({"type": "nope"}, 3):
        with pytest.raises(Impossible):
            by_schema(wrong)
    with pytest.raises(Impossible):
        by_regex("(")
    with pytest.raises(Impossible):
        by_grammar('start ::= "x"')
