"""One live backend: its load as this gateway sees it, its health, what it can do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from msgspec import structs

from forebay.api import (
    Adapter,
    AdapterKind,
    BackendSettings,
    BackendView,
    Capabilities,
    GenerateRequest,
    Load,
    Request,
)
from forebay.cached_blocks import CachedBlocks, CacheStatus
from forebay.examination import Examination, Question
from forebay.health import Health, State

# Weight of the newest figure in the mean time to first token: half-life of about 7 requests.
TTFT_WEIGHT = 0.1
#: A veto that passes: what the request needs is claimed, and is being put to the test.
BEING_EXAMINED = "being examined"


class Backend:
    """One configured backend and all that is known of it."""

    def __init__(
        self,
        name: str,
        settings: BackendSettings,
        kind: AdapterKind,
        adapter: Adapter,
        health: Health,
    ) -> None:
        self.name = name
        self.settings = settings
        self.kind = kind
        self.adapter = adapter
        self.health = health
        #: What it claims, and what was found of that.
        self.capabilities: Capabilities | None = None
        self.examination: Examination | None = None
        self.reading: Load | None = None
        self.read_at = 0.0
        #: None: it does not tell of its cache.
        self.cached_blocks: CachedBlocks | None = None
        self.in_flight = 0
        self.queued_tokens = 0
        self.ttft: float | None = None
        self.requests = 0
        self.failures = 0
        #: Set to have it probed at once.
        self.doubt = asyncio.Event()

    @property
    def provider(self) -> str:
        """``gen_ai.provider.name``."""
        return self.kind.provider or self.kind.name

    @property
    def address(self) -> str:
        """Base URL, or the backend's name if it has none."""
        return str(getattr(self.settings, "url", "")) or self.name

    @property
    def slots(self) -> int:
        """Most requests in flight; 0: no limit."""
        if self.settings.max_in_flight:
            return self.settings.max_in_flight
        return self.capabilities.slots if self.capabilities else 0

    @property
    def full(self) -> bool:
        return 0 < self.slots <= self.in_flight

    def state(self) -> State:
        return self.health.state(time.monotonic())

    def load_age(self) -> float | None:
        return None if self.reading is None else time.monotonic() - self.read_at

    def cache(self) -> CacheStatus | None:
        return None if self.cached_blocks is None else self.cached_blocks.status()

    def first_token(self, seconds: float) -> None:
        old = self.ttft
        self.ttft = seconds if old is None else old + TTFT_WEIGHT * (seconds - old)

    def view(self, weight: float, turns: float, prefix_tokens: int) -> BackendView:
        reading = self.reading
        return BackendView(
            name=self.name,
            adapter=self.kind.name,
            weight=weight,
            in_flight=self.in_flight,
            max_in_flight=self.slots,
            turns=turns,
            queued_tokens=self.queued_tokens,
            running=reading.running if reading else None,
            waiting=reading.waiting if reading else None,
            kv_usage=reading.kv_usage if reading else None,
            load_age=self.load_age(),
            ttft=self.ttft,
            prefix_tokens=prefix_tokens,
        )

    def lacks(self, request: Request) -> str | None:
        """The capability that the request needs and this backend has not, in words.

        ``BEING_EXAMINED``: whether it has it is being found out.
        """
        able = self.capabilities
        if able is None:
            return None
        if request.endpoint not in able.endpoints:
            return f"does not serve {request.endpoint}"
        if request.needs_multimodal and not able.multimodal:
            part = request.media if isinstance(request, GenerateRequest) else ""
            return f"takes text only, and no part of type {part!r}"
        if (unknown := _unknown(request, able)) is not None:
            return f"does not know the field {unknown!r}"
        if _scores_alone(request) and not able.scoring:
            return "cannot score a prompt without an answer (`max_tokens: 0`)"
        if 0 < able.max_choices < request.choices // max(1, len(request.prompts)):
            return f"gives at most {able.max_choices} choices of a prompt"
        return self._unproven(request, able)

    def _unproven(self, request: Request, able: Capabilities) -> str | None:
        """What it was found not to do, though it claims to."""
        findings = self.examination.findings if self.examination else {}
        pending = self.examination.pending if self.examination else ()
        needed = tuple(_needed(request, able))
        for question, claimed, words in needed:
            if not claimed:
                return f"cannot {words}"
            if question in findings and findings[question].verdict == "fails":
                return f"was found not to {words}"
        return BEING_EXAMINED if any(need[0] in pending for need in needed) else None


def _scores_alone(request: Request) -> bool:
    return isinstance(request, GenerateRequest) and request.sampling.max_tokens == 0


def _unknown(request: Request, able: Capabilities) -> str | None:
    """The first of the request's fields that it does not take."""
    if able.extra_fields:
        return None
    known = able.fields if isinstance(request, GenerateRequest) else ()
    return next((field for field in request.extra if field not in known), None)


def _needed(request: Request, able: Capabilities) -> Iterator[tuple[Question, bool, str]]:
    """What the request needs of that which backends are examined in: claimed or not, in words."""
    if request.needs_tools:
        yield "tools", able.tools, "call tools"
    if request.needs_schema:
        in_chat = request.endpoint == "chat"
        yield "schema" if in_chat else "completions_schema", able.schema, "keep to a schema"
    if request.sampling.logprobs is not None:
        yield "logprobs", able.logprobs, "give logprobs"
    if request.sampling.stop:
        yield "stop", able.stop, "heed stop strings"


def describe(backend: Backend, models: list[str]) -> dict[str, object]:
    """A backend as the admin port shows it."""
    reading = backend.reading
    return {
        "name": backend.name,
        "adapter": backend.kind.name,
        "state": backend.state(),
        "reason": backend.health.reason,
        "in_flight": backend.in_flight,
        "max_in_flight": backend.slots,
        "running": reading.running if reading else None,
        "waiting": reading.waiting if reading else None,
        "kv_usage": reading.kv_usage if reading else None,
        "load_age": backend.load_age(),
        "ttft": backend.ttft,
        "models": models,
        "capabilities": structs.asdict(backend.capabilities) if backend.capabilities else None,
        "examination": backend.examination,
        "requests": backend.requests,
        "failures": backend.failures,
        "cache": backend.cache(),
    }
