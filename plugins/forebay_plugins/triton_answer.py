"""From the responses of a model behind Triton to deltas, finish reasons and counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from forebay.api import (
    Delta,
    FinishReason,
    GenerateRequest,
    StreamTruncated,
    Timings,
    TokenLogprob,
    Usage,
)
from forebay_plugins.openai_shape import finish_of
from forebay_plugins.stop_strings import StopStrings
from forebay_plugins.triton_llm import Asked, Layout, Piece

__all__ = ["Choice", "Tally"]


class Choice:
    """One choice of an answer: feed it each response, then call :meth:`end`."""

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        asked: Asked,
        layout: Layout,
        accumulates: bool = False,
    ) -> None:
        self._index = index
        self._asked = asked
        self._layout = layout
        self._accumulates = accumulates or layout.accumulates
        self._top = request.sampling.logprobs or 0
        self._echo = asked.prompt if request.echo and request.endpoint == "completions" else ""
        self._stop = StopStrings(asked.stop if layout.keeps_stop else ())
        self._text = 0
        self._logprobs: tuple[float, ...] = ()
        #: The model's own word for its end.
        self._reason: str | None = None
        self.input_tokens: int | None = None
        self.timings: Timings | None = None
        #: Responses that had text, and what they said of their tokens.
        self._pieces = 0
        self._responses = 0
        self._counts: list[int] = []

    @property
    def finished(self) -> bool:
        """Nothing that follows is part of the answer."""
        return self._stop.found

    @property
    def reported_tokens(self) -> int | None:
        """TensorRT-LLM counts all tokens so far, in some releases those since the last response.

        All so far are never fewer than the responses that had text.
        """
        if not self._counts:
            return None
        if self._layout.counts_anew:
            return sum(self._counts)
        last = self._counts[-1]
        return last if last >= self._pieces else sum(self._counts)

    @property
    def tokens(self) -> int:
        """As reported; else counted, a token for each response with text."""
        reported = self.reported_tokens
        return self._pieces if reported is None else reported

    def feed(self, piece: Piece) -> Iterator[Delta]:
        text = piece.text
        if self._accumulates:
            text, self._text = text[self._text :], len(text)
        self._responses += 1
        self._pieces += bool(text)
        if piece.input_tokens is not None:
            self.input_tokens = piece.input_tokens
        if piece.output_tokens is not None:
            self._counts.append(piece.output_tokens)
        self._reason = piece.finish_reason or self._reason
        self.timings = piece.timings or self.timings
        logprobs = self._told(piece.tokens) or self._new(piece.logprobs, text)
        shown = self._take_echo() + self._stop.feed(text)
        if shown or (logprobs and not self._stop.found):
            yield Delta(self._index, shown, logprobs=logprobs)

    def end(self) -> Iterator[Delta]:
        """The stream is over.

        :raises StreamTruncated: the model, which says why it ends, has not; or it said nothing.
        """
        reason = self._finish_reason()
        text = self._take_echo() + self._stop.end()
        yield Delta(self._index, text, finish_reason=cast("FinishReason", reason))

    def _finish_reason(self) -> str:
        """The ensemble says nothing: then the count tells whether the limit was its end."""
        if self._stop.found:
            return "stop"
        if self._reason is not None:
            return finish_of(self._reason)
        if self._layout.says_finish or not self._responses:
            raise StreamTruncated("the backend's stream ended without a finish reason")
        return "length" if self.tokens >= self._asked.max_tokens else "stop"

    def _take_echo(self) -> str:
        echo, self._echo = self._echo, ""
        return echo

    def _told(self, tokens: tuple[TokenLogprob, ...]) -> tuple[TokenLogprob, ...]:
        """As many of the likeliest as were asked for: the chosen token may stand there as well."""
        return tuple(TokenLogprob(one.token, one.logprob, one.top[: self._top]) for one in tokens)

    def _new(self, logprobs: tuple[float, ...], text: str) -> tuple[TokenLogprob, ...]:
        """Of the tokens that came now: some releases repeat those of all tokens before.

        A response has the text of its tokens together; nearly always it is one token.
        """
        before = len(self._logprobs)
        longer = len(logprobs) > before or (len(logprobs) == before and not text)
        if longer and logprobs[:before] == self._logprobs:
            logprobs, self._logprobs = logprobs[before:], logprobs
        else:
            self._logprobs += logprobs
        texts = [text] + [""] * (len(logprobs) - 1)
        return tuple(map(TokenLogprob, texts, logprobs))


class Tally:
    """Token counts over all choices; a prompt counts once, however many choices it has."""

    def __init__(self) -> None:
        self._prompt = 0
        self._completion = 0
        self._reported = True
        self._timings: list[Timings | None] = []

    def add(self, choice: Choice, first: bool) -> None:
        self._completion += choice.tokens
        self._reported &= choice.reported_tokens is not None and choice.input_tokens is not None
        self._timings.append(choice.timings)
        if first:
            self._prompt += choice.input_tokens or 0

    def timings(self) -> Timings | None:
        """Of a single choice: several have no queue and prefill in common."""
        return self._timings[0] if len(self._timings) == 1 else None

    def usage(self) -> Usage:
        return Usage(
            self._prompt, self._completion, source="reported" if self._reported else "counted"
        )
