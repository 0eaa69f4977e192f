"""The checks, in the order of a report. A module's checks are its :class:`Check` objects."""

from __future__ import annotations

from types import ModuleType

from forebay.conformance.check import Check
from forebay.conformance.checks import (
    dialects,
    errors,
    guidance,
    load,
    logprobs,
    operations,
    operator,
    sampling,
    shapes,
    stop_length,
    streaming,
    text,
    tools,
    usage,
)

__all__ = ["CHECKS"]


def _of(module: ModuleType) -> tuple[Check, ...]:
    return tuple(value for value in vars(module).values() if isinstance(value, Check))


CHECKS: tuple[Check, ...] = (
    *_of(shapes),
    *_of(streaming),
    *_of(stop_length),
    *_of(usage),
    *_of(sampling),
    *_of(logprobs),
    *_of(guidance),
    *_of(tools),
    *_of(errors),
    *_of(load),
    *_of(text),
    *_of(operations),
    *_of(dialects),
    *_of(operator),
)
