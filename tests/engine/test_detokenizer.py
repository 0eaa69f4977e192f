"""Text that is shown while it is written: never half a character, never a stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from forebay_engine.detokenizer import Detokenizer, StopStrings
from forebay_engine.tokenizer import Tokenizer as EngineTokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"


def byte_level() -> Tokenizer:
    """As of GPT-2, Llama 3 and Qwen: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback(*, strips: bool = True) -> Tokenizer:
    """As of Llama 2 and Gemma: some characters are tokens, the bytes of all others too.

    ``strips``: as of Llama 2, whose decoder takes a text's first space away.
    """
    known = [*"▁abcdeé", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate(known)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if strips else []),
        ]
    )
    return tokenizer


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}
INDEPENDENT = {"byte_level": byte_level(), "gemma": byte_fallback(strips=False)}
# Characters of one to four bytes, joined ones, spaces, and what decoders like to eat.
texts = st.text(st.sampled_from("ab é€你😀\U0001f3f3\u200d▁\n"), max_size=12)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=texts, answer=texts)
@example(prompt="😀😀", answer="😀 你")
@example(prompt="a", answer=" b")
def test_pieces_join_to_the_text_and_hold_whole_characters(
    name: str, prompt: str, answer: str
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(prompt + answer).ids
    start = len(tokenizer.encode(prompt).ids)
    detokenizer = Detokenizer(tokenizer.decode, ids[:start])
    pieces = [detokenizer.push(token_id) for token_id in ids[start:]]
    assert not any(BROKEN in piece for piece in pieces)
    whole, shown = tokenizer.decode(ids), tokenizer.decode(ids[:start])
    assert "".join(pieces) == whole[len(shown) :]


@pytest.mark.parametrize("name", INDEPENDENT)
@given(data=st.data())
def test_texts_of_single_tokens_change_no_piece(name: str, data: st.DataObject) -> None:
    """Any tokens in any order, broken characters among them."""
    tokenizer = EngineTokenizer(INDEPENDENT[name])
    size = tokenizer.vocab_size
    ordinary = [id for id in range(size) if BROKEN not in tokenizer.decode([id])]
    ids = st.lists(st.sampled_from(ordinary) | st.integers(0, size - 1), max_size=12)
    prompt, answer = data.draw(ids), data.draw(ids)
    assert tokenizer.pieces is not None
    plain = Detokenizer(tokenizer.decode, prompt)
    fast = Detokenizer(tokenizer.decode, prompt, tokenizer.pieces)
    assert [fast.push(id) for id in answer] == [plain.push(id) for id in answer]


def test_single_tokens_are_trusted_where_no_neighbour_changes_them() -> None:
    assert EngineTokenizer(byte_fallback()).pieces is None
    spaced = byte_level()
    spaced.decoder = None
    assert EngineTokenizer(spaced).pieces is None
    spaced.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])
    assert EngineTokenizer(spaced).pieces is None
    tokenizer = EngineTokenizer(INDEPENDENT["gemma"])
    assert tokenizer.pieces is not None
    lone, letter = tokenizer.encode("€a", special=False)[1::3]
    assert (tokenizer.pieces[lone], tokenizer.pieces[letter]) == (None, "a")


def test_a_character_is_shown_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer.decode, [])
    assert [detokenizer.push(i) for i in tokenizer.encode("€a").ids] == ["", "", "€", "a"]


def test_bytes_that_never_become_a_character_do_not_hold_the_rest_back() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    (lone,) = tokenizer.encode("€").ids[:1]
    detokenizer = Detokenizer(tokenizer.decode, [])
    pieces = [detokenizer.push(lone) for _ in range(12)]
    pieces += [detokenizer.push(i) for i in tokenizer.encode("abcd").ids]
    assert "".join(pieces[:4]) != ""
    assert "".join(pieces).endswith("abcd")


@settings(max_examples=300)
@given(
    text=st.text("abc", max_size=14),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple),
    cuts=st.lists(st.integers(0, 14), max_size=6),
)
def test_text_ends_before_the_first_complete_stop_string_however_it_is_cut(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    filter, including = StopStrings(stops), StopStrings(stops, include=True)
    edges = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    shown, stopped, longer = "", False, ""
    for start, end in pairwise(edges):
        piece, stopped = filter.push(text[start:end])
        shown += piece
        longer += including.push(text[start:end])[0]
        # Shown text is never taken back.
        assert text.startswith(shown)
        if stopped:
            break
    if not stopped:
        shown += filter.flush()
        longer += including.flush()
    ends = [
        (end, end - len(stop))
        for stop in stops
        for end in range(len(stop), len(text) + 1)
        if text[:end].endswith(stop)
    ]
    assert stopped == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)
    assert longer == (text[: min(ends)[0]] if ends else text)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    filter = StopStrings(("</end>",))
    assert filter.push("a <b> </e") == ("a <b> ", False)
    assert filter.push("m>") == ("</em>", False)
    assert filter.push("x</end>y") == ("x", True)


def spaces_outside_spans() -> Tokenizer:
    """As of Llama 3: a ``<bos>``, and spans that leave out the spaces around words."""
    bytes_ = byte_level()
    merges = [("a", "b"), ("Ġ", "ab"), ("c", "."), ("Ċ", "Ċ"), ("c.", "ĊĊ")]
    vocab = bytes_.get_vocab() | {"".join(pair): 256 + i for i, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_.pre_tokenizer, bytes_.decoder
    tokenizer.add_special_tokens(["<bos>"])
    begin = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), begin])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "text", "offsets"),
    [
        (spaces_outside_spans(), "ab abc.\n\n ab", [0, 0, 2, 5, 9]),
        (spaces_outside_spans(), "é ab", [0, 0, 1, 1]),
        (byte_level(), "a 😀b", [0, 1, 2, 3, 3, 3, 3]),
        # The space that the tokenizer puts before a text has the first letter's place.
        (byte_fallback(), "ab é", [0, 1, 1, 2, 3]),
    ],
)
def test_where_each_token_of_a_prompt_begins(
    tokenizer: Tokenizer, text: str, offsets: list[int]
) -> None:
    assert EngineTokenizer(tokenizer).offsets(text) == offsets
