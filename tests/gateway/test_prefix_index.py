"""The prefix index: what it takes for the same prefix, what it forgets, what it learns."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw, structs

from forebay.api import ContentPart, GenerateRequest, Identity, Message, Usage
from forebay.prefix_index import PrefixIndex, PrefixKey


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def chat(*texts: str, model: str = "m", tenant: str = "t", **changes: object) -> GenerateRequest:
    roles = ("system", "user", "assistant")
    messages = tuple(
        Message(role=roles[min(i, 1 + (i + 1) % 2)], content=text)  # type: ignore[arg-type]
        for i, text in enumerate(texts)
    )
    request = GenerateRequest(
        id="r",
        endpoint="chat",
        model=model,
        created=0,
        messages=messages,
        identity=Identity(tenant=tenant),
    )
    return structs.replace(request, **changes)


def completion(*prompts: str | tuple[int, ...]) -> GenerateRequest:
    return GenerateRequest(id="r", endpoint="completions", model="m", created=0, prompts=prompts)


def text(size: int, of: str = "a") -> str:
    return (f"{of}." * size)[:size]


def usage(prompt: int, cached: int | None = None) -> Usage:
    return Usage(prompt_tokens=prompt, completion_tokens=1, cached_tokens=cached)


# What counts as the same prefix


def test_a_conversation_that_grows_keeps_its_prefix() -> None:
    index = PrefixIndex()
    first = index.key(chat(text(3000), text(1000, "q")))
    second = index.key(chat(text(3000), text(1000, "q"), text(500, "x"), text(100, "z")))
    assert len(first.hashes) >= 15
    assert second.hashes[: len(first.hashes)] == first.hashes


def test_a_difference_changes_its_block_and_all_after_it() -> None:
    index = PrefixIndex(block_bytes=64)
    one = index.key(completion("a" * 640))
    other = index.key(completion("a" * 320 + "b" + "a" * 319))
    assert len(one.hashes) == len(other.hashes) == 10
    assert one.hashes[:5] == other.hashes[:5]
    assert not set(one.hashes[5:]) & set(other.hashes[5:])


@pytest.mark.parametrize(
    "other",
    [
        chat(text(2000), model="other"),
        chat(text(2000), tenant="other"),
        chat(text(2000), fields={"tools": Raw(b'[{"type":"function"}]')}),
    ],
    ids=["model", "tenant", "tools"],
)
def test_nothing_is_shared_across(other: GenerateRequest) -> None:
    index = PrefixIndex()
    assert not set(index.key(chat(text(2000))).hashes) & set(index.key(other).hashes)


def test_roles_and_tool_calls_are_part_of_the_prompt() -> None:
    index = PrefixIndex(block_bytes=16)
    plain = chat(text(100), text(100))
    swapped = structs.replace(plain, messages=plain.messages[::-1])
    call = structs.replace(plain.messages[1], tool_calls=(Raw(b'{"id":"1"}'),))
    calling = structs.replace(plain, messages=(plain.messages[0], call))
    assert index.key(plain).hashes != index.key(swapped).hashes
    assert index.key(plain).size < index.key(calling).size


def test_content_in_parts_is_the_same_as_in_one() -> None:
    index = PrefixIndex()
    parts = (ContentPart("text", text(900)), ContentPart("text", text(900)))
    whole = chat(text(900) + text(900))
    pieces = structs.replace(whole, messages=(structs.replace(whole.messages[0], content=parts),))
    assert index.key(whole) == index.key(pieces)


def test_nothing_from_the_first_image_on_can_match() -> None:
    index = PrefixIndex()
    messages = (
        Message(role="system", content=text(1024)),
        Message(role="user", content=(ContentPart("image_url"), ContentPart("text", text(4096)))),
    )
    request = structs.replace(chat(), messages=messages, needs_multimodal=True)
    key = index.key(request)
    assert len(key.hashes) == 4
    assert key.size > 5000
    assert not key.text_only


def test_any_text_has_a_key() -> None:
    index = PrefixIndex(block_bytes=4)
    assert index.key(chat("\ud800 half a character, 漢字")).hashes
    assert index.key(chat()).hashes == ()
    assert index.key(completion("")) == PrefixKey("m", (), 0)


def test_token_ids_count_exactly() -> None:
    index = PrefixIndex()
    key = index.key(completion(tuple(range(640))))
    assert index.prompt_tokens(key) == 640
    index.insert(key, "a")
    longer = index.key(completion(tuple(range(700))))
    assert index.match(longer, ["a", "b"]) == [640, 0]
    assert index.key(completion((1,), (2,))).tokens == 2


def test_a_prompt_of_any_length_costs_a_bounded_number_of_blocks() -> None:
    index = PrefixIndex(block_bytes=16, max_blocks=10)
    assert len(index.key(completion("a" * 10_000)).hashes) == 10


def test_nonsense_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="capacity"):
        PrefixIndex(capacity=0)


# Matching


def test_each_backend_matches_as_far_as_it_has_seen() -> None:
    index = PrefixIndex(block_bytes=64)
    whole = index.key(completion(text(640)))
    for name, size in (("half", 320), ("all", 640), ("one", 64)):
        index.insert(index.key(completion(text(size))), name)
    index.insert(index.key(completion(text(640, "x"))), "other")
    assert index.match(whole, ["one", "never", "all", "other", "half"]) == [16, 0, 160, 0, 80]
    assert index.match(whole, []) == []


def test_a_hole_ends_the_match() -> None:
    index = PrefixIndex(block_bytes=64)
    key = index.key(completion(text(640)))
    index.insert(structs.replace(key, hashes=key.hashes[:3] + key.hashes[4:]), "a")
    assert index.match(key, ["a"]) == [48]


def test_a_match_is_never_longer_than_the_prompt() -> None:
    index = PrefixIndex(block_bytes=250)
    key = index.key(completion(text(250)))  # 62.5 tokens, rounded to even
    index.insert(key, "a")
    assert index.match(key, ["a"]) == [index.prompt_tokens(key)]


def test_forgetting_leaves_the_others_alone_and_frees_the_place() -> None:
    index = PrefixIndex(block_bytes=64)
    key = index.key(completion(text(640)))
    for name in ("a", "b", "c"):
        index.insert(key, name)
    index.forget("b")
    index.forget("b")
    assert index.match(key, ["a", "b", "c"]) == [160, 0, 160]
    index.insert(structs.replace(key, hashes=key.hashes[:1]), "d")
    assert index.match(key, ["a", "b", "c", "d"]) == [160, 0, 160, 16]


def test_the_least_recently_used_goes_first_and_of_a_prompt_its_end() -> None:
    index = PrefixIndex(block_bytes=64, capacity=8)
    old, new = (index.key(completion(text(64 * 5, of))) for of in "ab")
    index.insert(old, "x")
    index.insert(new, "x")
    assert index.blocks("x") == 8
    assert index.match(old, ["x"]) == [3 * 16]
    assert index.match(new, ["x"]) == [5 * 16]
    index.insert(old, "x")
    assert index.match(old, ["x"]) == [5 * 16]
    assert index.match(new, ["x"]) == [3 * 16]


def test_a_prompt_longer_than_the_capacity_keeps_its_beginning() -> None:
    index = PrefixIndex(block_bytes=64, capacity=4)
    key = index.key(completion(text(640)))
    index.insert(key, "x")
    assert index.match(key, ["x"]) == [4 * 16]


def test_blocks_age() -> None:
    clock = Clock()
    index = PrefixIndex(block_bytes=64, max_age=100, clock=clock)
    short, long = (index.key(completion(text(64 * n))) for n in (4, 8))
    index.insert(long, "x")
    clock.now = 90
    index.insert(short, "x")
    clock.now = 110
    assert index.match(long, ["x"]) == [4 * 16]
    clock.now = 191
    assert index.match(long, ["x"]) == [0]
    assert index.blocks("x") == 0


chains = st.lists(st.integers(0, 2), max_size=6)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), chains, st.sampled_from("abc")),
        st.tuples(st.just("match"), chains, st.sampled_from("abc")),
        st.tuples(st.just("forget"), st.just([]), st.sampled_from("abc")),
        st.tuples(st.just("wait"), chains, st.just("")),
    ),
    max_size=40,
)


@settings(max_examples=200)
@given(steps)
def test_it_equals_a_plain_lru_for_each_backend(steps: list[tuple[str, list[int], str]]) -> None:
    clock = Clock()
    index = PrefixIndex(block_bytes=64, capacity=5, max_age=10, clock=clock)
    model: dict[str, OrderedDict[int, float]] = {name: OrderedDict() for name in "abc"}
    for action, chain, backend in steps:
        key = index.key(completion("".join("abc"[letter] * 64 for letter in chain)))
        if action == "insert":
            index.insert(key, backend)
            for block in reversed(key.hashes):
                model[backend][block] = clock.now
                model[backend].move_to_end(block)
        elif action == "forget":
            index.forget(backend)
            model[backend].clear()
        elif action == "wait":
            clock.now += len(chain)
        for held in model.values():
            for block in [b for b, used in held.items() if used < clock.now - 10]:
                del held[block]
            while len(held) > 5:
                held.popitem(last=False)
        expected = [_leading(key.hashes, model[name]) * 16 for name in "abc"]
        assert index.match(key, "abc") == expected
    assert index._holders.keys() == {block for held in model.values() for block in held}


def _leading(hashes: tuple[int, ...], held: OrderedDict[int, float]) -> int:
    return next((i for i, block in enumerate(hashes) if block not in held), len(hashes))


# Learning


def test_bytes_per_token_are_learnt_for_each_model() -> None:
    index = PrefixIndex()
    key = index.key(chat(text(3000)))
    other = index.key(chat(text(3000), model="other"))
    assert index.prompt_tokens(key) == pytest.approx(750, rel=0.01)
    for _ in range(60):
        index.learn(key, "a", usage(1500), 0)
    assert index.prompt_tokens(key) == pytest.approx(1500, rel=0.02)
    assert index.prompt_tokens(other) == pytest.approx(750, rel=0.01)
    index.insert(key, "a")
    assert index.match(key, ["a"])[0] == pytest.approx(1500, rel=0.1)


def test_long_prompts_teach_more_than_short_ones() -> None:
    index = PrefixIndex()
    long, short = index.key(chat(text(40_000))), index.key(chat("hi"))
    for _ in range(60):
        index.learn(long, "a", usage(10_000), 0)
        index.learn(short, "a", usage(12), 0)  # a template's tokens round two letters
    assert index.prompt_tokens(long) == pytest.approx(10_000, rel=0.02)


@pytest.mark.parametrize(
    "key",
    [
        PrefixKey("m", (), 1000, tokens=250, text_only=False),
        PrefixKey("m", (), 1000, text_only=False),
        PrefixKey("m", (), 0),
    ],
    ids=["ids", "images", "empty"],
)
def test_what_is_not_text_teaches_nothing(key: PrefixKey) -> None:
    index = PrefixIndex()
    probe = index.key(chat(text(3000)))
    before = index.prompt_tokens(probe)
    index.learn(key, "a", usage(90_000), 0)
    index.learn(probe, "a", structs.replace(usage(90_000), source="counted"), 0)
    assert index.prompt_tokens(probe) == before


def test_a_backend_that_caches_nothing_is_soon_not_believed() -> None:
    index = PrefixIndex(block_bytes=64)
    key = index.key(completion(text(6400)))
    predictions = []
    for _ in range(60):
        predicted = index.match(key, ["a"])[0]
        predictions.append(predicted)
        index.insert(key, "a")
        index.learn(key, "a", usage(1600, cached=0), predicted)
    assert predictions[1] == 1600
    assert predictions[-1] < 1600 / 10
    assert index.blocks("a") < 10


def test_it_is_believed_again_when_it_caches() -> None:
    index = PrefixIndex(block_bytes=64, capacity=200)
    key = index.key(completion(text(6400)))
    for cached in [0] * 60 + [1600] * 60:
        predicted = index.match(key, ["a"])[0]
        index.insert(key, "a")
        index.learn(key, "a", usage(1600, cached), predicted)
    assert index.match(key, ["a"]) == [1600]


def test_a_smaller_cache_than_thought_is_found_out() -> None:
    """A backend with room for 40 blocks, sent 10 prompts of 20 blocks in turn, never hits."""
    index = PrefixIndex(block_bytes=64)
    keys = [index.key(completion(text(64 * 20, of))) for of in "abcdefghij"]
    predictions = []
    for step in range(60):
        key = keys[step % 10]
        predictions += index.match(key, ["small"])
        index.insert(key, "small")
        index.learn(key, "small", usage(320, cached=0), predictions[-1])
    assert predictions[10:13] == [320] * 3
    assert predictions[-20:] == [0] * 20


def test_honest_backends_are_left_alone() -> None:
    index = PrefixIndex(block_bytes=64)
    keys = [index.key(completion(text(64 * 20, of))) for of in "abcdefghij"]
    for step in range(100):
        key = keys[step % 10]
        predicted = index.match(key, ["a"])[0]
        index.insert(key, "a")
        # Engines count whole blocks of theirs, and compute at least the last token.
        index.learn(key, "a", usage(320, cached=int(predicted * 0.9)), predicted)
    assert index.blocks("a") == 200


def test_a_backend_that_does_not_say_is_believed() -> None:
    index = PrefixIndex(block_bytes=64)
    key = index.key(completion(text(6400)))
    for _ in range(50):
        index.insert(key, "a")
        index.learn(key, "a", usage(1600), 1600)
    assert index.blocks("a") == 100
