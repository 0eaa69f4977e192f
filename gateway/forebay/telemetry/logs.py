"""Logs: one JSON object a line on standard error, or text for people. Never a prompt or an answer.

Everything comes out in one form: our own lines, those of plugins, and what libraries (uvicorn,
litestar, aiohttp, the OTLP exporter) write with :mod:`logging`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import msgspec
import structlog
from structlog.contextvars import bind_contextvars, merge_contextvars
from structlog.types import EventDict, Processor, WrappedLogger

from forebay.api import Decision
from forebay.config import Logging as Settings
from forebay.telemetry.names import LONGEST_NAME

log = structlog.get_logger("forebay.request")

#: Fields that may hold what was said, or a secret: whoever logs one by mistake logs its absence.
WITHHELD = frozenset(
    {"messages", "prompt", "prompts", "content", "text", "body", "fields", "headers", "arguments"}
    | {"authorization", "api_key", "password", "token"}
)
#: Would set up handlers of their own, or say for each request what our one line says better.
_FOREIGN = ("uvicorn", "uvicorn.error", "uvicorn.access", "litestar", "asyncio", "py.warnings")
_LEVELS = {
    "client_error": logging.INFO,
    "client_disconnect": logging.INFO,
    "ok": logging.INFO,
    "internal_error": logging.ERROR,
}
#: C0 and C1 control characters: with them a logged string could forge lines or drive a terminal.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}


def configure(settings: Settings) -> None:
    """Set up logging for the process. A later call replaces what an earlier one set up."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    render: Processor = _console() if settings.format == "console" else _json
    shared: list[Processor] = [
        merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _withhold,
    ]
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_Named,
        cache_logger_on_first_use=False,  # the logger of a module must follow a later configure
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(max(level, logging.INFO))  # debug lines of libraries hold whole bodies
    for name in _FOREIGN:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in ("uvicorn.access", "uvicorn.error"):  # what they say at info, our lines say better
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


def in_request(request_id: str, trace_id: str) -> None:
    """From here on each line that this task logs, whoever writes it, names the request.

    Bound to the task's context and never unbound: each request is served by a task of its own.
    """
    bind_contextvars(request_id=request_id, trace_id=trace_id)


def request_done(decision: Decision) -> None:
    """The one line of a request: all there is to know, flat, so that it can be filtered by."""
    outcome = decision.outcome
    if outcome is None:
        raise ValueError(f"request {decision.request_id} has no outcome yet")
    level = _LEVELS.get(outcome.result, logging.WARNING)
    logger = log.bind()
    if not logger.is_enabled_for(level):  # else the fields are gathered for nothing
        return
    usage = outcome.usage
    logger.log(
        level,
        "request done",
        request_id=decision.request_id,
        trace_id=decision.trace_id,
        endpoint=decision.endpoint,
        model=decision.model[:LONGEST_NAME],
        tenant=decision.identity.tenant,
        key=decision.identity.key,
        policy=decision.policy,
        backend=decision.served_by,
        attempts=len(decision.attempts),
        outcome=outcome.result,
        status=outcome.status,
        error=outcome.error,
        duration=round(outcome.duration, 6),
        ttft=None if outcome.ttft is None else round(outcome.ttft, 6),
        queue=round(outcome.queue, 6),
        overhead=round(outcome.overhead, 6),
        events=outcome.events,
        input_tokens=None if usage is None else usage.prompt_tokens,
        output_tokens=None if usage is None else usage.completion_tokens,
        cached_tokens=None if usage is None else usage.cached_tokens,
        usage_source=None if usage is None else usage.source,
        finish_reasons=outcome.finish_reasons,
        lane=outcome.lane,
    )


class _Named(structlog.WriteLogger):
    """Writes to standard error, under the name that its module gave."""

    def __init__(self, name: str = "forebay") -> None:
        super().__init__(sys.stderr)
        self.name = name


def _withhold(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for name in WITHHELD & event.keys():
        event[name] = "(withheld)"
    return event


def _json(_: WrappedLogger, __: str, event: MutableMapping[str, Any]) -> str:
    line = {name: event.pop(name) for name in ("timestamp", "level", "event")}
    line |= event
    try:
        return msgspec.json.encode(line, enc_hook=repr).decode()
    except UnicodeEncodeError:
        # Half a surrogate pair; the standard library writes those too, at five times the cost.
        return json.dumps(line, default=repr)


def _console() -> Processor:
    # format_exc_info has already made a traceback, one without local variables: they hold prompts.
    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )

    def render(logger: WrappedLogger, method: str, event: EventDict) -> str:
        for name, value in event.items():
            if isinstance(value, str) and name != "exception":
                event[name] = value.translate(_CONTROLS)
        return renderer(logger, method, event)

    return render
