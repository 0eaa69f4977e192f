"""Grammars and guides: whatever random tokens they let through is what was asked for."""

from __future__ import annotations

import asyncio
import json
import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from forebay_engine.errors import RequestRefused
from forebay_engine.guided import MAX_SOURCE, Grammars, TokenGuide, is_allowed
from forebay_engine.sequence import SamplingParams
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import GuideKind, GuideSpec

#: Single bytes, and special tokens; no merges.
BYTES = Tokenizer.from_folder(Path(__file__).parents[1] / "fakes" / "engine_model")
EOS = 1
#: More than any of the tokenizers here has: a model may pad its vocabulary.
VOCAB = 400


def _pieces() -> Tokenizer:
    """Byte fallback, as in Gemma: pieces of several letters, some with ``▁``, and bytes."""
    letters = ["▁", '"', "{", "}", "[", "]", ":", ",", "a", "b", "é", "水", "0", "1", ".", "-"]
    words = ["▁▁", '":', '",▁"', '{"', '"}', "}]", "ab", "▁ab", "水é", "12", "true", "null", "fal"]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *[f"<0x{i:02X}>" for i in range(256)]]
    vocab = {name: i for i, name in enumerate([*names, *letters, *words])}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [AddedToken(name, special=True) for name in names[:4]]
    backend.add_tokens([*special, AddedToken("<any>", normalized=False)])
    return Tokenizer(backend)


TOKENIZERS = {"bytes": BYTES, "pieces": _pieces()}


@cache
def grammars(tokenizer: str) -> Grammars:
    return Grammars(TOKENIZERS[tokenizer], VOCAB, [EOS])


def guide(kind: GuideKind, source: Any, tokenizer: str = "bytes", **sampling: Any) -> TokenGuide:
    text = source if kind in ("regex", "grammar") else json.dumps(source)
    spec = GuideSpec(kind, text)
    return asyncio.run(grammars(tokenizer).get(spec)).start(SamplingParams(**sampling))


def allowed(guide: TokenGuide) -> list[int]:
    (mask,) = guide.masks(())
    return [token for token in range(VOCAB) if is_allowed(mask, token)]


def draw(guide: TokenGuide, random: Random, most: int = 400) -> list[int] | None:
    """An answer of random tokens, without its end token; None: it had not ended after ``most``.

    After some tokens it ends where it may, and prefers what ends strings, numbers and lists.
    """
    answer: list[int] = []
    closing = [BYTES.encode(char, special=False)[0] for char in ('"', "}", "]", "0", ",")]
    for number in range(most):
        choices = allowed(guide)
        preferred = [token for token in (EOS, *closing) if token in choices]
        late = number > 40 and preferred
        token = preferred[0] if late else random.choice(choices)
        if token == EOS:
            return answer
        answer.append(token)
        if guide.take(token):
            assert guide.failure is None
            assert guide.may_end
            return answer
    return None


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "string"},
            {"type": "string", "maxLength": 3},
            {"type": "string", "minLength": 2, "maxLength": 4},
            {"type": "string", "pattern": "^[a-c]{2,4}é?$"},
            {"type": "string", "format": "date"},
            {"type": "integer"},
            {"type": "integer", "minimum": -3, "maximum": 120},
            {"type": "integer", "multipleOf": 7},
            {"type": "number"},
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["integer", "null"]},
            {"const": {"a": [1, "é\n"]}},
            {"enum": ["水", 'quote "', 3, None, True]},
            {},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda properties, needed, more: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:needed],
                "additionalProperties": more,
            },
            st.dictionaries(st.sampled_from(["a", "name", "é", 'x"y']), inner, max_size=3),
            st.integers(0, 3),
            st.booleans(),
        ),
        st.builds(
            lambda items, least, more: {
                "type": "array",
                "items": items,
                "minItems": least,
                "maxItems": least + more,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(schema=SCHEMAS, random=st.randoms(use_true_random=False))
def test_random_tokens_fulfil_a_json_schema(
    tokenizer: str, schema: dict[str, Any], random: Random
) -> None:
    answer = draw(guide("json", schema, tokenizer), random)
    if answer is not None:
        value = json.loads(TOKENIZERS[tokenizer].decode(answer))
        jsonschema.validate(value, schema)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(
    expression=st.sampled_from(
        [
            "(a{1,4}b){1,5}c?",
            r"[^\"{}]{3,9}",
            "水|é{2}|😀",
            r"[0-9]{1,3}(\.[0-9]{2})?",
            "(?i)yes/no",
            "a|ab|abc",
            "",
        ]
    ),
    random=st.randoms(use_true_random=False),
)
def test_random_tokens_match_a_regular_expression(
    tokenizer: str, expression: str, random: Random
) -> None:
    answer = draw(guide("regex", expression, tokenizer), random)
    assert answer is not None
    assert re.fullmatch(expression, TOKENIZERS[tokenizer].decode(answer))


@settings(max_examples=60, deadline=None)
@given(
    tokenizer=st.sampled_from(sorted(TOKENIZERS)),
    choices=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4),
    random=st.randoms(use_true_random=False),
)
def test_random_tokens_are_one_of_the_choices(
    tokenizer: str, choices: list[str], random: Random
) -> None:
    answer = draw(guide("choice", choices, tokenizer), random)
    assert answer is not None
    assert TOKENIZERS[tokenizer].decode(answer) in choices


@pytest.mark.parametrize(
    "source",
    [
        'root ::= "(" root ")" | [0-9]+ ("+" [0-9]+)*',
        'start: "(" start ")" | NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]+/',
    ],
)
@settings(max_examples=30, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_random_tokens_follow_a_grammar(source: str, random: Random) -> None:
    answer = draw(guide("grammar", source), random)
    if answer is not None:
        text = BYTES.decode(answer)
        depth = len(text) - len(text.lstrip("("))
        assert re.fullmatch(r"\(*\d+(\+\d+)*\)*", text)
        assert text.endswith(")" * depth)
        assert text.count(")") == depth


def test_blanks_in_json_come_to_an_end() -> None:
    way = guide("json", {"type": "object"})
    for char in "{\n" + " " * 16:
        way.take(BYTES.encode(char, special=False)[0])
    assert BYTES.decode(allowed(way)) in ('"}', '}"')


def test_what_no_token_stands_for_is_never_allowed() -> None:
    for tokenizer in TOKENIZERS.values():
        way = asyncio.run(
            Grammars(tokenizer, VOCAB, [EOS]).get(GuideSpec("regex", "(.|\n)*"))
        ).start(SamplingParams())
        found = allowed(way)
        assert tokenizer.vocab_size < VOCAB
        assert max(found) < tokenizer.vocab_size
        assert {0, 2}.isdisjoint(found)  # padding and <bos>
        assert EOS in found


def test_a_model_may_have_fewer_tokens_than_its_tokenizer() -> None:
    found = asyncio.run(Grammars(BYTES, 200, [EOS]).get(GuideSpec("regex", ".*")))
    (mask,) = found.start(SamplingParams()).masks(())
    assert mask.shape == (7,)


def test_an_answer_ends_only_where_the_grammar_does() -> None:
    way = guide("regex", "ab+", stop_token_ids=(BYTES.encode("z", special=False)[0],))
    a, b, z = BYTES.encode("abz", special=False)
    assert allowed(way) == [a]
    assert not way.may_end
    assert not way.take(a)
    assert allowed(way) == [b]
    assert not way.take(b)
    assert way.may_end
    assert allowed(way) == sorted([EOS, b, z])


def test_an_answer_that_ignores_its_end_goes_on_as_long_as_it_can() -> None:
    a, b = BYTES.encode("ab", special=False)
    way = guide("regex", "ab{1,3}", ignore_eos=True)
    for token in (a, b, b):
        assert EOS not in allowed(way)
        assert not way.take(token)
    assert way.take(b)  # nothing can follow
    assert allowed(guide("regex", "", ignore_eos=True)) == [EOS]


@settings(max_examples=60, deadline=None)
@given(
    tokenizer=st.sampled_from(sorted(TOKENIZERS)),
    right=st.integers(0, 5),
    wrong=st.lists(st.integers(0, VOCAB - 1), max_size=4),
    random=st.randoms(use_true_random=False),
)
def test_masks_behind_guesses_are_those_of_the_tokens_themselves(
    tokenizer: str, right: int, wrong: list[int], random: Random
) -> None:
    schema = {"type": "array", "items": {"enum": ["ab", 12, "水"]}, "maxItems": 2}
    way, other = guide("json", schema, tokenizer), guide("json", schema, tokenizer)
    known = draw(guide("json", schema, tokenizer), random)
    assert known is not None
    start = random.randrange(len(known))
    for token in known[:start]:
        way.take(token)
        other.take(token)
    draft = [*known[start : start + right], *wrong]
    masks = way.masks(draft)
    assert masks.shape == (1 + len(draft), -(-VOCAB // 32))
    for number, token in enumerate(draft):
        np.testing.assert_array_equal(masks[number], other.masks(())[0])
        if token == EOS or not is_allowed(masks[number], token) or other.take(token):
            break
    else:
        np.testing.assert_array_equal(masks[-1], other.masks(())[0])
    # It stayed where it was.
    np.testing.assert_array_equal(way.masks(())[0], masks[0])


def deep(levels: int) -> str:
    return '{"items":' * levels + "{}" + "}" * levels


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("json", "{", "JSON"),
        ("json", "[]", "JSON"),
        ("json", '{"type": "no such type"}', "no such type"),
        ("json", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json", '{"not": {}, "x-guidance": {"lenient": true}}', "not"),
        ("json", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf"),
        ("json", '{"type": "integer", "minimum": 5, "maximum": 2}', "minimum"),
        ("json", '{"$ref": "https://example.com/schema"}', "example.com"),
        ("json", deep(2000), "recursion"),
        ("json", " " * MAX_SOURCE + "{}", str(MAX_SOURCE)),
        ("regex", "(abc", "unclosed"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"[^\s\S]", "no text"),
        ("choice", "[]", "at least one"),
        ("choice", '["a", ""]', "no empty"),
        ("choice", '"a"', "array"),
        ("grammar", "root ::= other", "other"),
        ("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "recursion"),
        ("grammar", "start: " + '"x"? ' * 20_000, "too big"),
        ("grammar", 'start: start "a"', "no text"),
    ],
)
def test_what_cannot_be_enforced_is_refused(kind: GuideKind, source: str, said: str) -> None:
    with pytest.raises(RequestRefused, match=re.escape(said)) as refusal:
        asyncio.run(grammars("bytes").get(GuideSpec(kind, source)))
    assert refusal.value.param == "guide"
    assert "<state>" not in refusal.value.message


@pytest.mark.parametrize(
    "expression", ["(a+)+b", "(a|a)*(a|aa)*b" * 20, "((((a{1,99}){1,99}){1,99}){1,99})"]
)
def test_expressions_that_defeat_backtracking_are_nothing_special(expression: str) -> None:
    way = guide("regex", expression)
    a = BYTES.encode("a", special=False)[0]
    for _ in range(20):
        assert a in allowed(way)
        assert not way.take(a)


def test_a_step_that_is_too_hard_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = LLParserLimits(step_max_items=60, verbose_errors=False)
    monkeypatch.setattr("forebay_engine.guided._LIMITS", limits)
    hard = GuideSpec("grammar", 'start: start start | "a" start | /[a-z]/')
    way = asyncio.run(Grammars(BYTES, VOCAB, [EOS]).get(hard)).start(SamplingParams())
    a = BYTES.encode("a", special=False)[0]
    for _ in range(30):
        found = allowed(way)
        if not found:
            break
        assert way.failure is None
        assert not way.take(a)
    assert not found
    assert way.failure is not None
    assert "Too many items" in way.failure


async def test_equal_grammars_are_compiled_once() -> None:
    found = Grammars(BYTES, VOCAB, [EOS])
    spec = GuideSpec("regex", "a+")
    leaving = asyncio.create_task(found.get(spec))
    waiting = asyncio.create_task(found.get(spec))
    await asyncio.sleep(0)
    leaving.cancel()
    first = await waiting
    assert await found.get(GuideSpec("regex", "a+")) is first
    assert await found.get(GuideSpec("choice", '["a+"]')) is not first


async def test_grammars_long_unused_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_engine.guided._KEPT", 2)
    found = Grammars(BYTES, VOCAB, [EOS])
    one, two, three = (GuideSpec("regex", text) for text in ("a", "b", "c"))
    first, second = await found.get(one), await found.get(two)
    assert await found.get(one) is first
    await found.get(three)
    assert await found.get(one) is first
    assert await found.get(two) is not second
