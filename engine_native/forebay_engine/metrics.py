"""What the engine measures for those who watch it: distributions of the times that clients feel.

The scheduler counts, and how full things are is read when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Items

from forebay_engine.request import Choice, Request, durations
from forebay_engine.wire import Distribution

#: Seconds: a millisecond to five minutes, about three to a decade.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
#: Tenths.
_SHARES = tuple(tenth / 10 for tenth in range(1, 11))


class Histogram:
    """How often a value lay between each two bounds."""

    def __init__(self, bounds: tuple[float, ...] = _SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def read(self) -> Distribution:
        return Distribution(self._bounds, tuple(self._counts), self._sum)


class Metrics:
    """Distributions since the start, in seconds and shares, by vLLM's names where it has them."""

    def __init__(self) -> None:
        self._first_token = Histogram()
        self._inter_token = Histogram()
        self._queue = Histogram()
        self._prefill = Histogram()
        self._decode = Histogram()
        self._acceptance = Histogram(_SHARES)

    def tokens(self, came: Items[tuple[Choice, int]], now: float) -> None:
        """So many tokens of each choice have come; each counts with its share of the time."""
        # Whose last token came with the same step share one observation.
        gaps: dict[float, int] = {}
        for choice, count in came:
            last, choice.last_token = choice.last_token, now
            if last is not None:
                gap = (now - last) / count
                gaps[gap] = gaps.get(gap, 0) + count
            elif choice.request.first_token is None:
                choice.request.first_token = now
                # From arrival on, tokenising included.
                self._first_token.observe(now - choice.request.submitted)
        for gap, count in gaps.items():
            self._inter_token.observe(gap, count)

    def ended(self, request: Request) -> None:
        """A request got its whole answer."""
        phases = zip((self._queue, self._prefill, self._decode), durations(request), strict=True)
        for histogram, seconds in phases:
            histogram.observe(seconds)
        for sequence in (choice.sequence for choice in request.choices):
            if sequence.num_drafted:
                self._acceptance.observe(sequence.num_accepted / sequence.num_drafted)

    def read(self) -> dict[str, Distribution]:
        return {
            "time_to_first_token_seconds": self._first_token.read(),
            "inter_token_latency_seconds": self._inter_token.read(),
            "request_queue_time_seconds": self._queue.read(),
            "request_prefill_time_seconds": self._prefill.read(),
            "request_decode_time_seconds": self._decode.read(),
            "spec_decode_acceptance_ratio": self._acceptance.read(),
        }
