"""Where the seconds of an attempt belong: as the backend reports them, or as seen from here."""

from __future__ import annotations

from forebay.api import Timings
from forebay.telemetry.names import (
    DECODE_SPAN,
    INFERENCE_SPAN,
    PREFILL_SPAN,
    QUEUE_PREFILL_SPAN,
    QUEUE_SPAN,
)

Phase = tuple[str, int, int]


def lay_out(timings: Timings, start: int, first_token: int | None, end: int) -> list[Phase]:
    """Place queue, prefill and decode one after the other: (name, start, end).

    All times are Unix nanoseconds. A backend reports durations and no times, so the one
    moment both sides have seen decides: prefill ends where the first token arrived. Without one (an
    answer in one piece) decode ends with the attempt, as inference, which is both, always does.
    What does not fit is clipped to the attempt.
    """
    # Never longer than the attempt: this also tames negative, infinite and NaN figures.
    longest = (end - start) / 1e9
    queue, prefill, decode, inference = (
        None if seconds is None else round(min(max(0.0, seconds), longest) * 1e9)
        for seconds in (timings.queue, timings.prefill, timings.decode, timings.inference)
    )
    met = end if first_token is None or inference is not None else first_token
    anchor = min(met, end - (decode or 0) - (inference or 0))
    at = max(start, anchor - (prefill or 0) - (queue or 0))
    phases: list[Phase] = []
    for name, length in (
        (QUEUE_SPAN, queue),
        (PREFILL_SPAN, prefill),
        (INFERENCE_SPAN, inference),
        (DECODE_SPAN, decode),
    ):
        if length is not None:
            until = min(at + length, end)
            phases.append((name, at, until))
            at = until
    return phases


def observed(start: int, first_token: int, end: int) -> list[Phase]:
    """What the gateway sees of a stream: the wait for its first token, and the rest.

    The wait is one phase: from here nobody can tell the backend's queue from its prefill.
    """
    met = min(max(start, first_token), end)  # clocks are set, forwards and back
    return [(QUEUE_PREFILL_SPAN, start, met), (DECODE_SPAN, met, end)]
