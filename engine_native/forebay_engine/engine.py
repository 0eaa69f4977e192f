"""The engine: requests in, events out, and between them one step after the other.

Everything here runs on one event loop, the model's step alone in a thread of its own; so requests
come, go and are aborted while a step runs, and no lock is needed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Literal

from forebay_engine.cache import KVCache
from forebay_engine.chat import ChatTemplate
from forebay_engine.config import EngineConfig
from forebay_engine.detokenizer import Detokenizer, StopStrings
from forebay_engine.errors import RequestRefused, StartRefused
from forebay_engine.guided import Grammar, Grammars
from forebay_engine.isolation import Outcome
from forebay_engine.metrics import Metrics
from forebay_engine.pipeline import Pipeline
from forebay_engine.pooling import Pooler, settle_pooling
from forebay_engine.prompts import PromptEncoder
from forebay_engine.proposers import settle_speculation
from forebay_engine.request import Choice, Request, done, output, refuse_priority, seed_of
from forebay_engine.scheduler import Scheduler
from forebay_engine.sequence import FinishReason, SamplingParams, Sequence
from forebay_engine.step import NO_TOKEN, Sampled, StepPlan
from forebay_engine.step_runner import StepRunner
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.watermark import Marks
from forebay_engine.wire import (
    Accepted,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Event,
    Failed,
    Generate,
    Logprob,
    Tokenize,
    Tokenized,
)

_NOTHING_ALLOWED = (
    "no token may come next: the grammar, allowed_token_ids, bad_words and min_tokens "
    "together exclude every one; loosen one of them"
)
#: Steps in a row of which nothing could be executed, after which the process is to start anew.
_MOST_FAILED_STEPS = 3
#: Seconds without work after which the books are compared in full.
_QUIET = 1.0

log = logging.getLogger("forebay_engine")


class Engine:
    """Serves requests on a loaded model. ``on_end`` is told of each request that ended."""

    def __init__(
        self,
        runner: StepRunner,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        config: EngineConfig,
        on_end: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._on_end = on_end
        self.max_model_len = _context(runner, config)
        self.scheduler = Scheduler(
            KVCache(runner.cache_groups, runner.block_size, prefix_cache=config.prefix_cache),
            max_step_tokens=config.max_step_tokens,
            max_sequences=config.max_sequences,
            max_model_len=self.max_model_len,
            eos_token_ids=runner.eos_token_ids,
            speculation=settle_speculation(config, runner),
            ahead=runner.takes_unknown if runner.runs_ahead else None,
        )
        self._encoder = PromptEncoder(tokenizer, template, runner.vocab_size, Marks.settled(config))
        self._grammars = Grammars(tokenizer, runner.vocab_size, runner.eos_token_ids)
        self._choices: dict[int, Choice] = {}
        self._ids = count()
        self.metrics = Metrics()
        self.generates = runner.generates
        self.pooling = settle_pooling(config.pooling, Path(config.model))
        if not self.generates and self.pooling is None:
            raise StartRefused(
                f"{config.model} has no output layer, so it can give embeddings only: set pooling "
                "to last or mean"
            )
        self._pooler = Pooler(
            self.scheduler, self._ids, self.pooling, max_model_len=self.max_model_len
        )
        self._work = asyncio.Event()
        self._failed_steps = 0

    async def submit(self, command: Generate, emit: Callable[[Event], None]) -> Request:
        """Queue a request; its events go to ``emit``, ``Accepted`` before this returns.

        :raises RequestRefused: it can't be served; nothing is queued.
        """
        if not self.generates:
            raise RequestRefused("this model gives embeddings only", "model")
        submitted = time.monotonic()
        prompts, sampling, shown = await asyncio.to_thread(self._encoder.settle, command)
        refuse_priority(command.priority)
        samplings = [self._sampling(command, sampling, prompt) for prompt in prompts]
        grammar = await self._grammars.get(command.guide) if command.guide is not None else None
        request = Request(command, emit, sum(map(len, prompts)), submitted)
        for prompt, sampling in zip(prompts, samplings, strict=True):
            self._add(request, prompt, sampling, grammar)
        request.open = len(request.choices)
        emit(Accepted(command.id, request.prompt_tokens, shown))
        self._work.set()
        return request

    async def embed(self, command: Embed) -> Embedded:
        """Cancelling it drops what is not done.

        :raises RequestRefused: the model gives no embeddings, or an input is too long.
        """
        prompts = await asyncio.to_thread(self._encoder.inputs, command.inputs)
        vectors = self._pooler.add(prompts, command.salt.encode())
        self._work.set()
        try:
            found = await asyncio.gather(*vectors)
        finally:
            for vector in vectors:  # one may have failed
                vector.cancel()
        packed = [vector.astype("<f4").tobytes() for vector in found]
        return Embedded(command.id, packed, sum(map(len, prompts)))

    async def tokenize(self, command: Tokenize) -> Tokenized:
        """:raises RequestRefused: the chat template does not take the messages."""
        ids, texts = await asyncio.to_thread(self._encoder.tokens, command)
        return Tokenized(command.id, ids, texts, self.max_model_len)

    async def detokenize(self, command: Detokenize) -> Detokenized:
        """:raises RequestRefused: there are no such tokens."""
        return Detokenized(command.id, await asyncio.to_thread(self._encoder.text, command))

    def abort(self, request: Request) -> None:
        """Drop a request: no more events come, and its blocks are freed as by the scheduler."""
        self._drop(request, FinishReason.ABORT)

    async def run(self) -> None:
        """Step for ever. What it raises is a defect, and the end of the engine."""
        with ThreadPoolExecutor(1, "forebay-step") as thread:
            steps = Pipeline(self._runner, self.scheduler, thread)
            while True:
                self._expire()
                plan = self.scheduler.plan()
                if plan is not None:
                    self._note_admissions(plan)
                elif steps.empty:
                    await self._idle()
                    continue
                outcome = await steps.advance(plan)
                if outcome is not None:
                    self._apply(outcome)

    def _expire(self) -> None:
        for sequence in self.scheduler.expire(time.monotonic()):
            choice = self._choices.get(sequence.id)
            if choice is not None:
                request = choice.request
                time_given, tokens = request.command.timeout, request.completion_tokens
                message = f"the request's {time_given:g} s were over after {tokens} tokens"
                self._fail(request, "deadline", message, FinishReason.DEADLINE)

    def _apply(self, outcome: Outcome) -> None:
        """Pass on what a step came to.

        :raises RuntimeError: several steps in a row came to nothing.
        """
        progress = self.scheduler.apply(outcome.result, outcome.failed)
        for id, error in outcome.failed.items():
            choice = self._choices.get(id)
            message = f"the engine could not compute this: {error}"
            if choice is not None:
                self._fail(choice.request, "failed", message)
            else:
                self._pooler.fail(id, message)
        for token in outcome.result.prompt:
            choice = self._choices.get(token.seq_id)
            if choice is not None and choice.prompt is not None:
                choice.prompt[token.position] = token
        self.metrics.tokens(
            [
                (choice, len(drawn))
                for sequence, drawn in progress
                if drawn and (choice := self._choices.get(sequence.id)) is not None
            ],
            time.monotonic(),
        )
        for sequence, drawn in progress:
            choice = self._choices.get(sequence.id)
            if choice is None:
                continue
            try:
                self._advance(choice, drawn)
            except Exception as error:
                log.exception("tokens of sequence %d could not be passed on", sequence.id)
                message = f"the engine could not pass this on: {error}"
                self._fail(choice.request, "failed", message)
        self._pooler.take(outcome.result.pooled)
        self._failed_steps = self._failed_steps + 1 if outcome.nothing else 0
        if self._failed_steps == _MOST_FAILED_STEPS:
            last = next(iter(outcome.failed.values()))
            raise RuntimeError(f"{self._failed_steps} steps in a row failed") from last

    async def _idle(self) -> None:
        """Wait for work; when it has been quiet for a while, compare the books.

        A page that nobody holds and that is not free would be missing for ever, one that is free
        twice would answer one tenant with another's text: better to start anew.

        :raises RuntimeError: pages are held though nobody is there.
        :raises AssertionError: the books disagree.
        """
        in_use = self.scheduler.cache.in_use
        if in_use:
            raise RuntimeError(f"{in_use} blocks are held but nobody is there")
        self._work.clear()
        try:
            async with asyncio.timeout(_QUIET):
                await self._work.wait()
        except TimeoutError:
            self.scheduler.check()
            await self._work.wait()

    def _sampling(
        self, command: Generate, sampling: SamplingParams, prompt: list[int]
    ) -> SamplingParams:
        if command.fill_context:
            left = max(1, self.max_model_len - len(prompt))
            sampling = replace(sampling, max_tokens=left)
        try:
            self.scheduler.refuse_impossible(len(prompt), sampling.max_tokens)
        except RequestRefused as refusal:
            if refusal.param == "prompt" and command.messages is not None:
                raise RequestRefused(refusal.message, "messages") from None
            raise
        return sampling

    def _drop(self, request: Request, reason: FinishReason) -> None:
        """End a request before its time."""
        if request.ended is not None:
            return
        for choice in request.choices:
            self.scheduler.abort(choice.sequence.id, reason)
            self._choices.pop(choice.sequence.id, None)
        self._end(request)

    def _fail(
        self,
        request: Request,
        kind: Literal["refused", "failed", "deadline"],
        message: str,
        reason: FinishReason = FinishReason.ERROR,
    ) -> None:
        self._drop(request, reason)
        request.emit(Failed(request.command.id, kind, message))

    def _add(
        self,
        request: Request,
        prompt: list[int],
        sampling: SamplingParams,
        grammar: Grammar | None,
    ) -> None:
        """Queue the choices of one of the request's prompts."""
        first, command = len(request.choices), request.command
        deadline = None if command.timeout is None else request.submitted + command.timeout
        for index in range(first, first + command.n):
            own = replace(sampling, seed=seed_of(command.seed, index))
            if index > first:  # the prompt is the same
                own = replace(own, prompt_logprobs=None)
            sequence = Sequence(
                next(self._ids), prompt, own, command.priority, request.submitted, deadline
            )
            sequence.guide = grammar.start(own) if grammar is not None else None
            text = self._detokenizer(own, prompt)
            stops = StopStrings(own.stop, own.include_stop)
            choice = Choice(request, index, sequence, text, stops)
            choice.prompt = {} if own.prompt_logprobs is not None else None
            request.choices.append(choice)
            self._choices[sequence.id] = choice
        sequences = [choice.sequence for choice in request.choices[first:]]
        self.scheduler.add(*sequences, salt=command.salt.encode())

    def _detokenizer(self, sampling: SamplingParams, prompt: list[int]) -> Detokenizer:
        tokenizer = self._tokenizer
        if sampling.skip_special_tokens:
            return Detokenizer(tokenizer.decode, prompt, tokenizer.pieces)
        return Detokenizer(tokenizer.spell, prompt, tokenizer.spelled_pieces)

    def _note_admissions(self, plan: StepPlan) -> None:
        now = time.monotonic()
        for row in plan.rows:
            if row.start >= row.num_prompt:
                continue
            choice = self._choices.get(row.seq_id)
            if choice is not None and choice.request.admitted is None:
                choice.request.admitted = now

    def _advance(self, choice: Choice, drawn: list[Sampled]) -> None:
        """Take a choice's next tokens, and send what text is certain by now."""
        sequence = choice.sequence
        if drawn and drawn[-1].token_id == NO_TOKEN:
            failure = sequence.guide.failure if sequence.guide is not None else None
            self._fail(choice.request, "refused", failure or _NOTHING_ALLOWED)
            return
        # A token that stops is no part of the text.
        silent = sequence.ended_by_token and not sequence.sampling.include_stop
        text, left = "", len(drawn)
        for sampled in drawn:
            left -= 1
            choice.token_ids.append(sampled.token_id)
            if left or not silent:
                piece, stopped = self._text(choice, sampled, left)
                text += piece
                if stopped:
                    self._stop(sequence, left)
                    break
        ended = sequence.finish_reason is not None
        if ended:
            text += choice.stops.flush()
        if text or ended:
            choice.request.emit(output(choice, text, self._tokenizer))
        if ended:
            self._close(choice)

    def _stop(self, sequence: Sequence, unspoken: int) -> None:
        """End an answer at a stop string, without the tokens that were drawn behind it."""
        if sequence.finish_reason is None:
            self.scheduler.abort(sequence.id, FinishReason.STOP)
        sequence.finish_reason = FinishReason.STOP
        del sequence.token_ids[len(sequence.token_ids) - unspoken :]

    def _text(self, choice: Choice, sampled: Sampled, left: int) -> tuple[str, bool]:
        """The text that is certain without the last ``left`` tokens, and whether it stops there."""
        if sampled.logprob is not None:
            choice.logprobs.append(self._logprob(sampled, sampled.logprob))
        text = choice.text.push(sampled.token_id)
        sequence = choice.sequence
        if sequence.sampling.stop and sequence.num_output - left > sequence.sampling.min_tokens:
            return choice.stops.push(text)
        return text, False

    def _logprob(self, sampled: Sampled, logprob: float) -> Logprob:
        name = self._tokenizer.token_text
        top = [(name(token_id), value) for token_id, value in sampled.top]
        return Logprob(name(sampled.token_id), logprob, top)

    def _close(self, choice: Choice) -> None:
        request = choice.request
        del self._choices[choice.sequence.id]
        request.open -= 1
        if request.open:
            return
        self._end(request)
        self.metrics.ended(request)
        request.emit(done(request))

    def _end(self, request: Request) -> None:
        request.ended = time.monotonic()
        self._on_end(request)


def _context(runner: StepRunner, config: EngineConfig) -> int:
    """Tokens that a single sequence may have, by the model and by the cache.

    :raises StartRefused: the configuration asks for more than the cache holds.
    """
    size = runner.block_size
    asked = config.max_model_len or runner.max_model_len
    held = min(group.longest_sequence(asked, size) for group in runner.cache_groups)
    if config.max_model_len > held:
        raise StartRefused(
            f"max_model_len is {config.max_model_len}, but the KV cache holds {held} tokens "
            f"({held // size} blocks of {size}): raise kv_cache_bytes"
        )
    return min(runner.max_model_len, held)
