"""Where a backend's reported seconds belong within the attempt that waited for them."""

from __future__ import annotations

from forebay.api import Timings
from forebay.telemetry.names import DECODE_SPAN, PREFILL_SPAN, QUEUE_SPAN

Phase = tuple[str, int, int]


def lay_out(timings: Timings, start: int, first_token: int | None, end: int) -> list[Phase]:
    """Place queue, prefill and decode one after the other: (name, start, end).

    All times are Unix nanoseconds. A backend reports durations and no times, so the one
    moment both sides have seen decides: prefill ends where the first token arrived. Without one (an
    answer in one piece) decode ends with the attempt. What does not fit is clipped to it.
    """
    # Never longer than the attempt: this also tames negative, infinite and NaN figures.
    longest = (end - start) / 1e9
    queue, prefill, decode = (
        None if seconds is None else round(min(max(0.0, seconds), longest) * 1e9)
        for seconds in (timings.queue, timings.prefill, timings.decode)
    )
    anchor = min(end if first_token is None else first_token, end - (decode or 0))
    at = max(start, anchor - (prefill or 0) - (queue or 0))
    phases: list[Phase] = []
    for name, length in ((QUEUE_SPAN, queue), (PREFILL_SPAN, prefill), (DECODE_SPAN, decode)):
        if length is not None:
            until = min(at + length, end)
            phases.append((name, at, until))
            at = until
    return phases
