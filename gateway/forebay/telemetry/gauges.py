"""Metrics that are read at the scrape and not kept: backends, queues, counts of other parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from msgspec import Struct
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from forebay.api import Distribution, Load

#: What a metric's name can't have.
_UNFIT = re.compile(r"[^a-z0-9_]")


class FleetRow(Struct, frozen=True, kw_only=True):
    """One backend at the moment of a scrape. ``None``: the backend does not say."""

    backend: str
    #: Requests sent there whose answers have not ended.
    in_flight: int = 0
    healthy: bool = False
    #: The backend's own figures, and their age in seconds.
    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    load_age: float | None = None
    #: What is known to lie in its prefix cache.
    cached_blocks: int | None = None
    cached_tokens: int | None = None
    #: What else it tells.
    figures: Load = Load()


_FLEET = (
    ("in_flight", "forebay_in_flight", "Requests whose answers have not ended"),
    ("healthy", "forebay_backend_healthy", "1: gets requests, 0: does not"),
    ("running", "forebay_backend_running", "Requests the backend says it works on"),
    ("waiting", "forebay_backend_waiting", "Requests the backend says are in its queue"),
    ("kv_usage", "forebay_backend_kv_usage_ratio", "Share of the backend's KV cache in use"),
    ("load_age", "forebay_backend_load_age_seconds", "Age of the backend's own figures"),
    ("cached_blocks", "forebay_backend_cached_blocks", "Blocks known to be in its prefix cache"),
    ("cached_tokens", "forebay_backend_cached_tokens", "Tokens known to be in its prefix cache"),
)


class Reading(Collector):
    """A collector that asks a function."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


def fleet_gauges(rows: Iterable[FleetRow]) -> list[Metric]:
    """A gauge per figure; what a backend does not say has no sample."""
    rows = list(rows)
    families: list[Metric] = []
    for field, name, text in _FLEET:
        family = GaugeMetricFamily(name, text, labels=["backend"])
        for row in rows:
            value = getattr(row, field)
            if value is not None:
                family.add_metric([row.backend], float(value))
        families.append(family)
    return families


def engine_figures(rows: Iterable[FleetRow]) -> list[Metric]:
    """What backends tell beyond the common figures, each under its own name."""
    counts: dict[str, CounterMetricFamily] = {}
    gauges: dict[str, GaugeMetricFamily] = {}
    histograms: dict[str, HistogramMetricFamily] = {}
    for row in rows:
        for name, value in row.figures.counters.items():
            if name not in counts:
                counts[name] = CounterMetricFamily(_own(name), "Total", labels=["backend"])
            counts[name].add_metric([row.backend], value)
        for name, value in row.figures.gauges.items():
            if name not in gauges:
                gauges[name] = GaugeMetricFamily(_own(name), "Now", labels=["backend"])
            gauges[name].add_metric([row.backend], value)
        for name, found in row.figures.distributions.items():
            if name not in histograms:
                histograms[name] = HistogramMetricFamily(_own(name), "Times", labels=["backend"])
            histograms[name].add_metric([row.backend], _buckets(found), found.sum)
    return [*counts.values(), *gauges.values(), *histograms.values()]


def _own(name: str) -> str:
    return "forebay_engine_" + _UNFIT.sub("_", name)


def _buckets(found: Distribution) -> list[tuple[str, float]]:
    bounds = [*(str(float(bound)) for bound in found.bounds), "+Inf"]
    return list(zip(bounds, accumulate(found.counts), strict=True))


def queue_gauge(depths: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily("forebay_queue_depth", "Requests that wait", labels=["model"])
    for model, depth in depths.items():
        family.add_metric([model], depth)
    return family


def counters(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"forebay_{name}", text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
