"""What goes over the engine's socket: msgpack frames, each behind its length (4 bytes, big-endian).

A client sends commands and gets events; ``id`` ties them together and is chosen by the client,
unique among what is open on its connection. A generation is answered by ``Accepted Output* Done``,
or ends in ``Failed``; ``Embed`` is answered by ``Embedded``, ``Tokenize`` by ``Tokenized`` and
``Detokenize`` by ``Detokenized``, or they fail. After an ``Abort`` nothing more is sent. Closing
the connection aborts all that was started on it.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec
from msgspec import Struct

from forebay_engine.errors import EngineError
from forebay_engine.sequence import FinishReason, SamplingParams
from forebay_engine.watermark import Watermark

#: Exit status of a process that would end the same way if started again; EX_CONFIG of sysexits.h.
EXIT_REFUSED = 78
#: Bytes of the largest frame; a prompt of a million token ids takes 5 MB.
MAX_FRAME = 64 << 20
_LENGTH = struct.Struct(">I")


GuideKind = Literal["json", "regex", "choice", "grammar"]


class GuideSpec(Struct, frozen=True):
    """What the answer must keep to."""

    kind: GuideKind
    #: A JSON schema; a regular expression for the whole answer; a JSON list of strings, of which
    #: the answer is one; rules in GBNF (of ``root``) or Lark (of ``start``).
    source: str


class Generate(Struct, frozen=True, kw_only=True, tag="generate"):
    """Generate from ``prompts`` or from ``messages``; choice ``i`` is of prompt ``i // n``."""

    id: int = 0
    prompts: list[str | list[int]] = []
    #: For the chat template: dicts with ``role``, ``content`` and what else the template reads.
    messages: list[dict[str, Any]] | None = None
    n: int = 1
    #: Its ``seed``, ``bad_words`` and ``watermark`` are ignored in favour of those below.
    sampling: SamplingParams = SamplingParams()
    #: None: any text.
    guide: GuideSpec | None = None
    #: ``max_tokens`` is whatever the context has left after the prompt.
    fill_context: bool = False
    #: None: a random one for each choice.
    seed: int | None = None
    #: Smaller ones run earlier; a level is worth ``scheduler.PATIENCE`` seconds of waiting.
    priority: int = 0
    #: Seconds from its arrival after which it fails, done or not; None: none.
    timeout: float | None = None
    #: Texts, which are kept out with a space before them as well, or token ids.
    bad_words: list[str | list[int]] = []
    #: True: of the usual kind; its ``key`` is the engine's own whatever is said. None: not said.
    watermark: Watermark | bool | None = None
    #: Only requests of the same salt share cached prefixes.
    salt: str = ""
    #: ``Accepted`` tells the prompts as they stand.
    echo: bool = False
    #: W3C trace context of the span under which the engine's spans belong; empty: none.
    traceparent: str = ""


class Tokenize(Struct, frozen=True, kw_only=True, tag="tokenize"):
    """The token ids of ``text``, or of ``messages`` under the chat template."""

    id: int = 0
    text: str = ""
    messages: list[dict[str, Any]] | None = None
    #: Add what the model wants around a text, such as its ``<bos>``.
    special: bool = True
    #: The texts of the tokens are wanted as well.
    texts: bool = False


class Detokenize(Struct, frozen=True, kw_only=True, tag="detokenize"):
    """The text of token ids, special ones by their name."""

    id: int = 0
    token_ids: list[int]


class Embed(Struct, frozen=True, kw_only=True, tag="embed"):
    """One vector for each input, text or token ids."""

    id: int = 0
    inputs: list[str | list[int]]
    #: As in ``Generate``.
    salt: str = ""


class Abort(Struct, frozen=True, tag="abort"):
    id: int


class GetStatus(Struct, frozen=True, tag="get_status"):
    id: int


class Prompt(Struct, frozen=True, array_like=True):
    """A prompt as it stands before an answer."""

    text: str
    #: Their texts, and where in the prompt's text each begins, in characters.
    tokens: list[str]
    offsets: list[int]


class Accepted(Struct, frozen=True, tag="accepted", omit_defaults=True):
    """The request is valid and queued."""

    id: int
    prompt_tokens: int
    #: Those of a request with ``echo``.
    prompts: list[Prompt] = []


class Logprob(Struct, frozen=True, array_like=True):
    token: str
    logprob: float
    #: The likeliest tokens at this place, best first.
    top: list[tuple[str, float]]


class Scored(Struct, frozen=True, array_like=True):
    """A token at a place of the prompt; ``rank`` 1: the likeliest there."""

    token_id: int
    token: str
    logprob: float
    rank: int


class Output(Struct, frozen=True, tag="output", omit_defaults=True):
    """The next piece of choice ``index``; the last one has the ``finish_reason``."""

    id: int
    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[Logprob] = []
    #: With the first piece, if asked for: of each token of the prompt but the first, that token,
    #: and the likeliest ones, best first.
    prompt_logprobs: list[list[Scored]] = []
    finish_reason: FinishReason | None = None


class Done(Struct, frozen=True, tag="done"):
    """All choices have ended. Times in seconds."""

    id: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue: float
    prefill: float
    decode: float


class Tokenized(Struct, frozen=True, tag="tokenized"):
    id: int
    token_ids: list[int]
    #: None: not wanted.
    texts: list[str] | None
    #: Tokens of prompt and answer together.
    max_model_len: int


class Detokenized(Struct, frozen=True, tag="detokenized"):
    id: int
    text: str


class Embedded(Struct, frozen=True, tag="embedded"):
    id: int
    #: Of length 1, in the order of the inputs: float32, little-endian.
    vectors: list[bytes]
    prompt_tokens: int


class Failed(Struct, frozen=True, tag="failed"):
    """A request came to nothing.

    ``refused``: its own fault; ``loading``: too early; ``deadline``: its ``timeout`` is over;
    ``failed``: a defect of ours.
    """

    id: int
    kind: Literal["refused", "loading", "deadline", "failed"]
    message: str
    param: str | None = None


class Distribution(Struct, frozen=True, array_like=True):
    """How often a value lay at or below each bound, and above the one before; then, above all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class Status(Struct, frozen=True, kw_only=True, tag="status"):
    id: int = 0
    state: Literal["loading", "ready"]
    version: str = ""
    #: While loading: share of the weights that has been read, 0 to 1.
    loaded: float = 0.0
    #: Tokens of prompt and answer together.
    max_model_len: int = 0
    max_sequences: int = 0
    running: int = 0
    waiting: int = 0
    #: Share of the KV cache that sequences hold, 0 to 1.
    kv_usage: float = 0.0
    #: The model gives embeddings; and it writes text.
    embeds: bool = False
    generates: bool = True
    #: Totals since the start, by name.
    counters: dict[str, int] = {}
    #: How things stand, by name.
    gauges: dict[str, float] = {}
    #: Of times, since the start.
    distributions: dict[str, Distribution] = {}


Command = Generate | Embed | Tokenize | Detokenize | Abort | GetStatus
Event = Accepted | Output | Done | Embedded | Tokenized | Detokenized | Failed | Status


def frame(message: Command | Event) -> bytes:
    """A message as it goes over the socket.

    :raises EngineError: it is longer than ``MAX_FRAME``.
    """
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME:
        raise EngineError(f"a message of {len(body)} bytes exceeds the {MAX_FRAME} of a frame")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies of the frames that ``data`` completes.

        :raises EngineError: a frame says that it is longer than ``MAX_FRAME``.
        """
        self._buffer += data
        bodies, start = [], 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME:
                raise EngineError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME}")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return bodies
