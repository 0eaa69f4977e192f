"""Which backend has probably seen which prefix of a prompt.

Nobody is asked: the index remembers what was sent where, much as a backend's own prefix cache
would, and corrects itself by what backends say they had cached. Prompts are cut into blocks of
bytes whose hashes are chained (xxh3, 64 bits), so that one hash stands for a block and everything
before it. Nothing of a prompt can be read back from the index.

Reckoned in bytes rather than tokens because tokenising costs more than all of routing; bytes per
token are learnt for each model from the usage that backends report.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct
from xxhash import xxh3_64_intdigest

from forebay.api import Message, Request, Usage

__all__ = ["PrefixIndex", "PrefixKey"]

# Text may hold these too; then at worst two prompts look alike, and an estimate is off.
_FIELD, _RECORD = "\x1f", "\x1e"

_SURROGATES = "surrogatepass"  # JSON can smuggle in halves of characters

# Prompts sent as token ids count exactly, at the width at which they are hashed.
_BYTES_PER_ID = 4

# The ratio that is assumed before anything is learnt, as if one prompt of 256 tokens had been seen.
_PRIOR_BYTES, _PRIOR_TOKENS = 1024.0, 256.0
# Share of the past that is forgotten with each prompt: a ratio settles within some 20 prompts.
_FORGET = 0.05

# A backend is judged by the running mean of (really cached / predicted), in which a prediction of
# 2,048 tokens or more weighs a quarter, and a shorter one less, as it costs less to be wrong there.
# Below 0.7 it loses a quarter of what it is believed to hold. In a simulation of eight engines with
# a fourth of the cache that the index assumed, this took predictions from 1.8 times to 1.4 times
# what was cached, and from 2.1 to 1.15 times in a busier one with longer prompts.
_NEWEST, _TELLING = 0.25, 2048
_DISTRUST = 0.7


class PrefixKey(Struct, frozen=True):
    """A prompt as the index sees it."""

    model: str
    #: One for each whole block, each chained to those before it.
    hashes: tuple[int, ...]
    #: Bytes of the whole prompt.
    size: int
    #: Tokens, where the client sent ids; None: to be estimated.
    tokens: int | None = None
    #: All of it is text, so its usage teaches how long a token is.
    text_only: bool = True


class _Holdings:
    """What one backend is believed to hold: block hash → time of its last use, oldest first."""

    def __init__(self, bit: int, limit: int) -> None:
        self.bit = bit
        self.blocks: OrderedDict[int, float] = OrderedDict()
        #: Most blocks it is believed to hold; falls when it turns out to forget sooner.
        self.limit = limit
        self.trust = 1.0


class PrefixIndex:
    """An inverted index from block to the backends that hold it, kept as a bit for each.

    ``block_bytes``: length of a block; a last, partial block is not indexed. ``capacity``: blocks
    remembered for each backend, the least recently used go first; the default is about two million
    tokens and at most 9 MB for each backend. ``max_age``: seconds after which an unused block is
    forgotten. ``max_blocks``: blocks of one prompt that are looked at, so that a prompt of any
    length costs at most a few milliseconds. ``clock``: monotonic seconds.
    """

    def __init__(
        self,
        block_bytes: int = 256,
        capacity: int = 32_768,
        max_age: float = 1_800.0,
        max_blocks: int = 4_096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if block_bytes < _BYTES_PER_ID or capacity < 1 or max_age <= 0 or max_blocks < 1:
            raise ValueError(
                f"block_bytes must be at least {_BYTES_PER_ID}, capacity and max_blocks at least "
                "1, max_age above 0"
            )
        self._block = block_bytes
        self._capacity = capacity
        self._max_age = max_age
        self._max_blocks = max_blocks
        self._clock = clock
        self._holders: dict[int, int] = {}
        self._backends: dict[str, _Holdings] = {}
        #: For each model: bytes and tokens of the prompts seen, the past fading.
        self._seen: dict[str, tuple[float, float]] = {}

    def key(self, request: Request) -> PrefixKey:
        """Hash the request's prompt. Tenants never match each other's prefixes."""
        seed = xxh3_64_intdigest(_encode(f"{request.model}{_FIELD}{request.identity.tenant}"))
        if request.prompts:
            return self._completion_key(request, seed)
        data = _encode("".join(_chat_text(request)))
        hashed = data
        if request.needs_multimodal:
            # What an image holds is not in the text: nothing from the first one on may match.
            hashed = _encode("".join(_chat_text(request, stop_at_media=True)))
        hashes = self._hash(hashed, seed)
        return PrefixKey(request.model, hashes, len(data), None, not request.needs_multimodal)

    def _completion_key(self, request: Request, seed: int) -> PrefixKey:
        texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
        if texts:
            data = _encode(_RECORD.join(map(_prompt_text, request.prompts)))
            text_only = len(texts) == len(request.prompts)
            return PrefixKey(request.model, self._hash(data, seed), len(data), None, text_only)
        ids = [token for prompt in request.prompts for token in prompt if isinstance(token, int)]
        data = b"".join(map(_id_bytes, ids))
        return PrefixKey(request.model, self._hash(data, seed), len(data), len(ids), False)

    def prompt_tokens(self, key: PrefixKey) -> int:
        """Tokens of the prompt: exact if it came as ids, else estimated."""
        if key.tokens is not None:
            return key.tokens
        return round(key.size / self._bytes_per_token(key))

    def match(self, key: PrefixKey, backends: Sequence[str]) -> list[int]:
        """For each backend the tokens of this prompt that it probably has in its cache."""
        depths = self._depths(key.hashes, backends)
        tokens_per_block = self._block / self._bytes_per_token(key)
        most = self.prompt_tokens(key)
        return [min(most, round(depth * tokens_per_block)) for depth in depths]

    def insert(self, key: PrefixKey, backend: str) -> None:
        """The prompt was sent to ``backend``, which will hold its prefixes from now on."""
        if not key.hashes:
            return
        held = self._holdings(backend)
        now = self._clock()
        self._expire(held, now)
        blocks, holders = held.blocks, self._holders
        # Last block first: of a prompt, the end is forgotten before the beginning.
        for block in reversed(key.hashes):
            if block in blocks:
                blocks.move_to_end(block)
            else:
                holders[block] = holders.get(block, 0) | held.bit
            blocks[block] = now
        self._shrink(held, held.limit)

    def learn(self, key: PrefixKey, backend: str, usage: Usage, predicted: int) -> None:
        """Take in what a backend reported: the prompt's tokens, and how many were cached.

        ``predicted``: what :meth:`match` said of this backend when the request was decided. Usage
        that Forebay counted itself teaches nothing.
        """
        if usage.source != "reported":
            return
        if key.text_only and key.size and usage.prompt_tokens > 0:
            size, tokens = self._seen.get(key.model, (_PRIOR_BYTES, _PRIOR_TOKENS))
            keep = 1 - _FORGET
            self._seen[key.model] = (size * keep + key.size, tokens * keep + usage.prompt_tokens)
        if usage.cached_tokens is not None and key.hashes:
            self._calibrate(self._holdings(backend), usage.cached_tokens, predicted)

    def forget(self, backend: str) -> None:
        """The backend has died or restarted: its cache is empty."""
        held = self._backends.pop(backend, None)
        if held is not None:
            self._shrink(held, 0)

    def blocks(self, backend: str) -> int:
        """Blocks that the backend is believed to hold."""
        held = self._backends.get(backend)
        return len(held.blocks) if held else 0

    def _hash(self, data: bytes, seed: int) -> tuple[int, ...]:
        size = self._block
        view = memoryview(data)
        hashes = []
        chained = seed
        for start in range(0, min(len(data) // size, self._max_blocks) * size, size):
            chained = xxh3_64_intdigest(view[start : start + size], chained)
            hashes.append(chained)
        return tuple(hashes)

    def _bytes_per_token(self, key: PrefixKey) -> float:
        if key.tokens is not None:
            return _BYTES_PER_ID
        size, tokens = self._seen.get(key.model, (_PRIOR_BYTES, _PRIOR_TOKENS))
        return size / tokens

    def _depths(self, hashes: Sequence[int], backends: Sequence[str]) -> list[int]:
        """Leading blocks that each backend holds, by one walk for all of them."""
        now = self._clock()
        known = [held for name in backends if (held := self._backends.get(name))]
        alive = 0
        for held in known:
            self._expire(held, now)
            alive |= held.bit
        reached: dict[int, int] = {}
        holders = self._holders
        for depth, block in enumerate(hashes):
            still = alive & holders.get(block, 0)
            if still != alive:
                reached.update(dict.fromkeys(_bits(alive & ~still), depth))
                alive = still
                if not alive:
                    break
        reached.update(dict.fromkeys(_bits(alive), len(hashes)))
        held_by_name = (self._backends.get(name) for name in backends)
        return [reached[held.bit] if held else 0 for held in held_by_name]

    def _holdings(self, backend: str) -> _Holdings:
        held = self._backends.get(backend)
        if held is None:
            taken = 0
            for other in self._backends.values():
                taken |= other.bit
            held = _Holdings(~taken & (taken + 1), self._capacity)  # the lowest free bit
            self._backends[backend] = held
        return held

    def _expire(self, held: _Holdings, now: float) -> None:
        blocks, oldest = held.blocks, now - self._max_age
        while blocks and next(iter(blocks.values())) < oldest:
            self._drop(held)

    def _shrink(self, held: _Holdings, limit: int) -> None:
        while len(held.blocks) > limit:
            self._drop(held)

    def _drop(self, held: _Holdings) -> None:
        """Forget the block that this backend has not used for longest."""
        block, _ = held.blocks.popitem(last=False)
        left = self._holders[block] & ~held.bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]

    def _calibrate(self, held: _Holdings, real: int, predicted: int) -> None:
        """Believe less of a backend that keeps less than predicted; let it grow back slowly."""
        if predicted > 0:
            weight = _NEWEST * min(1.0, predicted / _TELLING)
            held.trust += weight * (min(1.0, real / predicted) - held.trust)
        if held.trust < _DISTRUST:
            held.limit = len(held.blocks) * 3 // 4
            held.trust = 1.0
            self._shrink(held, held.limit)
        elif 0 < real >= predicted and held.limit < self._capacity:
            held.limit = min(self._capacity, held.limit + held.limit // 64 + 4)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", _SURROGATES)


def _id_bytes(token: int) -> bytes:
    return (token & 0xFFFFFFFF).to_bytes(_BYTES_PER_ID, "little")


def _prompt_text(prompt: str | tuple[int, ...]) -> str:
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _chat_text(request: Request, *, stop_at_media: bool = False) -> Iterator[str]:
    """The pieces of a chat prompt in the order in which chat templates place them: tools first."""
    tools = request.fields.get("tools")
    if tools is not None:
        yield bytes(tools).decode("utf-8", _SURROGATES)
    for message in request.messages:
        yield f"{_RECORD}{message.role}{_FIELD}"
        if stop_at_media and _has_media(message):
            return
        yield message.text()
        for call in message.tool_calls or ():
            yield _FIELD + bytes(call).decode("utf-8", _SURROGATES)


def _has_media(message: Message) -> bool:
    content = message.content
    return isinstance(content, tuple) and any(part.text is None for part in content)


def _bits(mask: int) -> Iterator[int]:
    """The single bits of a mask."""
    while mask:
        lowest = mask & -mask
        yield lowest
        mask ^= lowest
