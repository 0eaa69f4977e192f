"""Guided generation: grammars that an answer must keep to, and how far each answer has come.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance): a lexer of regular
expressions under an Earley parser, walked along a trie of the vocabulary's bytes. Whatever a client
sends, its work is counted and cut off at the limits below, so neither a compile nor a mask can take
for ever; and a JSON schema with a keyword that it does not enforce is refused, not half obeyed.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from msgspec import Raw

from forebay_engine.errors import RequestRefused
from forebay_engine.sequence import SamplingParams
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import GuideKind, GuideSpec

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Mask = npt.NDArray[np.int32]

#: Characters of the longest schema, expression or grammar; most of what they cost grows with it.
MAX_SOURCE = 1 << 17
#: Compiled grammars kept, some 100 kB each.
_KEPT = 128
#: Compiles at once: a slow one (0.5 s at most) leaves the other thread to the others.
_THREADS = 2
#: Beside the library's own limits: 20,000 optional parts would take 0.8 s to compile.
_LIMITS = LLParserLimits(max_grammar_size=20_000, verbose_errors=False)
#: Blanks between JSON's tokens: enough to be laid out, too few to go on with for ever.
_BLANKS = r"( |\n {0,16})"
#: A schema may carry options of the library's in ``x-guidance``; these stand against them.
_JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_pattern": _BLANKS,
    "lenient": False,
    "coerce_one_of": False,
}
_WORDS: dict[GuideKind, str] = {
    "json": "the JSON schema",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "grammar": "the grammar",
}
_REASONS = {"NoExtensionBias": "no text fulfils it"}


class Grammars:
    """Compiled grammars over one model's vocabulary; compiles them in threads of its own."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(eos_token_ids)
        self._trie: LLTokenizer | None = None
        self._trie_lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "forebay-grammar")
        self._compiled: OrderedDict[GuideSpec, Future[Grammar]] = OrderedDict()

    async def get(self, spec: GuideSpec) -> Grammar:
        """The grammar, compiled if it is new; equal ones that come meanwhile wait for the same.

        :raises RequestRefused: it is wrong, too large, or asks for what can't be enforced.
        """
        future = self._compiled.get(spec)
        if future is None:
            future = self._threads.submit(self._compile, spec)
            self._compiled[spec] = future
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(spec)
        try:
            # Shielded: who leaves must not cancel what another waits for.
            return await asyncio.shield(asyncio.wrap_future(future))
        except Exception:
            self._compiled.pop(spec, None)
            raise

    def _compile(self, spec: GuideSpec) -> Grammar:
        matcher = LLMatcher(self._vocabulary(), _grammar(spec), log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            # Only at the first token does it turn out that no text at all can fulfil a grammar.
            trial = matcher.deep_copy()
            trial.compute_bitmask()
            matcher = trial if trial.is_error() else matcher
        if matcher.is_error():
            raise _refused(spec.kind, _reason(matcher))
        return Grammar(matcher, self._vocab_size, self._eos)

    def _vocabulary(self) -> LLTokenizer:
        """The trie: 30 MB for 262144 tokens, and 2 s in which hardly any other Python runs.

        So it is made for the first who needs it, as a rule the gateway's examination. Made of the
        tokens' bytes instead it would take 1.2 s, and other tokens would count as special.
        """
        with self._trie_lock:
            if self._trie is None:
                size = max(self._vocab_size, self._tokenizer.vocab_size)
                text = _without_merges(self._tokenizer.to_json())
                try:
                    # Slices would make some masks faster, and this much slower.
                    self._trie = LLTokenizer(text, n_vocab=size, eos_token=self._eos, slices=[])
                except ValueError as error:
                    raise RequestRefused(
                        f"this model's tokenizer can't be guided: {error}", "guide"
                    ) from error
            return self._trie


class Grammar:
    """A compiled grammar, from which any number of answers start."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_token_ids: Items[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos = eos_token_ids

    def start(self, sampling: SamplingParams) -> TokenGuide:
        """The guide of one answer; takes 10 µs."""
        return TokenGuide(self._matcher.deep_copy(), self._vocab_size, self._eos, sampling)


class TokenGuide:
    """One answer's way through a grammar; a :class:`forebay_engine.step.Guide`.

    The answer may end where the grammar may: there, and only there, end tokens are allowed, and the
    client's ``stop_token_ids`` beside what the grammar allows. With ``ignore_eos`` it goes on for
    as long as the grammar leaves a way to.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        eos_token_ids: Items[int],
        sampling: SamplingParams,
    ) -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)
        self._eos = eos_token_ids
        self._sampling = sampling
        self._ends = frozenset(eos_token_ids) | frozenset(sampling.stop_token_ids)
        self._taken = 0
        #: Tokens after which the library gave up, and why.
        self._end_of_way: tuple[int, str] | None = None

    @property
    def failure(self) -> str | None:
        if self._end_of_way is None or self._taken < self._end_of_way[0]:
            return None
        return f"the grammar can't be followed from here on: {self._end_of_way[1]}"

    @property
    def may_end(self) -> bool:
        return self._matcher.is_accepting()

    def masks(self, draft: Items[int]) -> Mask:
        masks = np.zeros((1 + len(draft), self._words), np.int32)
        # A copy goes on along the guesses: an error there can't be rolled back.
        matcher = self._matcher.deep_copy() if draft else self._matcher
        for number, mask in enumerate(masks):
            if not self._fill(mask, matcher, self._taken + number) or number == len(draft):
                break
            token = draft[number]
            if token in self._ends or not is_allowed(mask, token):
                break
            if not matcher.consume_token(token) or matcher.is_stopped():
                break
        return masks

    def take(self, token_id: int) -> bool:
        self._taken += 1
        if not self._matcher.consume_token(token_id):
            self._give_up(self._matcher, self._taken)
            return False
        return self._matcher.is_stopped()

    def _fill(self, mask: Mask, matcher: LLMatcher, taken: int) -> bool:
        """Write the tokens that may come next, ``taken`` behind the answer's start."""
        found = np.frombuffer(matcher.compute_bitmask(), np.int32)[: self._words]
        if matcher.is_error() or not found.any():
            self._give_up(matcher, taken)
            return False
        mask[:] = found
        if matcher.is_accepting():
            _allow(mask, self._sampling.stop_token_ids)
            if self._sampling.ignore_eos:
                _forbid(mask, self._eos)
                if not mask.any():
                    mask[:] = found
        return True

    def _give_up(self, matcher: LLMatcher, taken: int) -> None:
        if self._end_of_way is None or self._end_of_way[0] > taken:
            self._end_of_way = taken, _reason(matcher)


def is_allowed(mask: Mask, token_id: int) -> bool:
    """Whether the token's bit is set in ``[words]``."""
    return bool(mask[token_id >> 5] >> (token_id & 31) & 1)


def _allow(mask: Mask, token_ids: Items[int]) -> None:
    bits = mask.view(np.uint32)
    for token_id in token_ids:
        bits[token_id >> 5] |= np.uint32(1 << (token_id & 31))


def _forbid(mask: Mask, token_ids: Items[int]) -> None:
    bits = mask.view(np.uint32)
    for token_id in token_ids:
        bits[token_id >> 5] &= np.uint32(~(1 << (token_id & 31)) & 0xFFFFFFFF)


def _grammar(spec: GuideSpec) -> str:
    """The source in llguidance's form.

    :raises RequestRefused: it is malformed or too long.
    """
    if len(spec.source) > MAX_SOURCE:
        raise _refused(
            spec.kind, f"it has {len(spec.source)} characters; at most {MAX_SOURCE} are allowed"
        )
    try:
        match spec.kind:
            case "json":
                return LLMatcher.grammar_from_json_schema(spec.source, overrides=_JSON_OPTIONS)
            case "regex":
                return LLMatcher.grammar_from_regex(spec.source)
            case "choice":
                return LLMatcher.grammar_from_regex(_choices(spec.source))
            case "grammar":
                # Rules with ``::=`` are GBNF, as llama.cpp and vLLM take it; others are Lark.
                return grammar_from("grammar", spec.source)
    except (ValueError, RecursionError) as error:
        raise _refused(spec.kind, str(error)) from error


def _choices(source: str) -> str:
    """An expression for one of the strings, each character by its number: none means more."""
    choices = msgspec.json.decode(source, type=list[str])
    if not choices or "" in choices:
        raise ValueError("it must have at least one string, and no empty one")
    return "|".join("".join(rf"\x{{{ord(char):x}}}" for char in choice) for choice in choices)


def _without_merges(tokenizer: str) -> str:
    """A tokenizer.json of the same tokens that can't encode: half as long to read."""
    parts = msgspec.json.decode(tokenizer, type=dict[str, Raw])
    model = msgspec.json.decode(parts["model"], type=dict[str, Raw])
    if "merges" in model:
        model["merges"] = Raw(b"[]")
    parts["model"] = Raw(msgspec.json.encode(model))
    return msgspec.json.encode(parts).decode()


def _reason(matcher: LLMatcher) -> str:
    """What went wrong, without the library's account of its state."""
    text = matcher.get_error().partition("<state>")[0].partition("<non-verbose/>")[0].strip()
    return _REASONS.get(text, text) or "no token of this model continues it"


def _refused(kind: GuideKind, reason: str) -> RequestRefused:
    return RequestRefused(f"{_WORDS[kind]} can't be used: {reason}", "guide")
