"""Throughput against concurrency: two roofs, fitted to what was measured.

A step gives each of n sequences one token. It reads the weights once and each sequence's cache,
W + n·K bytes, at B bytes a second, so that the rate is at most n·B / (W + n·K); and no more than C
tokens a second can be computed whatever n. The model is the lower of the two (the roofline model of
Williams, Waterman and Patterson, 2009), with W and K from the shape, and B and C fitted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from msgspec import Struct

from forebay.capacity.line import CapacityError

__all__ = ["Roofline", "fit", "read_profile"]


class Roofline(Struct, frozen=True):
    #: W, in bytes.
    weights: float
    #: K, in bytes a sequence.
    cache: float
    #: B, in bytes a second.
    bandwidth: float
    #: C, in tokens a second; infinite where no measurement shows it.
    compute: float

    def bandwidth_bound(self, streams: float) -> float:
        return streams * self.bandwidth / (self.weights + streams * self.cache)

    def rate(self, streams: float) -> float:
        return min(self.bandwidth_bound(streams), self.compute)

    @property
    def knee(self) -> float:
        """Streams from which on computing is the bound; infinite: it never is."""
        room = self.bandwidth - self.compute * self.cache
        return self.compute * self.weights / room if room > 0 else math.inf


def fit(points: Mapping[int, float], weights: float, cache: float) -> Roofline:
    """B and C with the least squared error of log(rate), over every way to split the points.

    Given which points lie under which roof, both are geometric means; so all are tried.

    :raises CapacityError: there are no points, or one is not positive.
    """
    if not points or any(n < 1 or rate <= 0 for n, rate in points.items()):
        raise CapacityError("--point: give at least one, as STREAMS=RATE, both positive")
    ordered = sorted(points.items())
    candidates = []
    for split in range(1, len(ordered) + 1):
        low, high = ordered[:split], ordered[split:]
        bandwidth = _mean([rate * (weights + n * cache) / n for n, rate in low])
        compute = _mean([rate for _, rate in high]) if high else math.inf
        candidates.append(Roofline(weights, cache, bandwidth, compute))
    # Where the second roof explains nothing, the first alone is said.
    return min(reversed(candidates), key=lambda roof: round(_error(roof, ordered), 9))


def read_profile(path: Path, engine: str | None) -> dict[int, float]:
    """Median rates by streams, from what ``benchmarks/engine_cpu.py --json`` wrote.

    :raises CapacityError: it is no such file, or ``engine`` is needed or not in it.
    """
    try:
        rounds: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rounds"]
        names = sorted({name for results in rounds for name in results})
    except OSError as error:
        raise CapacityError(f"--profile: {path} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CapacityError(
            f"--profile: {path} is not what `benchmarks/engine_cpu.py --json` writes; "
            "give the figures by --point STREAMS=RATE instead"
        ) from error
    if engine is None and len(names) == 1:
        engine = names[0]
    if engine not in names:
        asked = f"there is no engine {engine!r}" if engine else "there are several engines"
        raise CapacityError(f"--engine: {asked} in {path}; give one of: {', '.join(names)}")
    rates: dict[int, list[float]] = {}
    for results in rounds:
        for streams, point in results.get(engine, {}).get("points", {}).items():
            rates.setdefault(int(streams), []).append(point["rate"])
    return {streams: median(found) for streams, found in sorted(rates.items())}


def _mean(values: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(fmean(math.log(value) for value in values))


def _error(roof: Roofline, points: Sequence[tuple[int, float]]) -> float:
    return sum(math.log(roof.rate(n) / rate) ** 2 for n, rate in points)
