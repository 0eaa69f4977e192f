"""Load as servers report it with their answers: ORCA's ``endpoint-load-metrics`` header.

Asked for with ``endpoint-load-metrics-format``, answered as ``TEXT named_metrics.NAME=VALUE, …`` or
``JSON {"named_metrics": {NAME: VALUE}}``. Source: the xDS load report's header forms, and vLLM 0.32
(``entrypoints/serve/utils/orca_metrics.py``), from which the names are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import msgspec
from msgspec import Struct

from forebay.api import Load

__all__ = ["ASK", "load_in"]

#: The request header that asks for it.
ASK: Mapping[str, str] = {"endpoint-load-metrics-format": "TEXT"}


class Report(Struct):
    named_metrics: dict[str, float] = {}


def load_in(headers: Mapping[str, str]) -> Load | None:
    """The load that an answer's headers tell; None if they tell none. How many run is not said.

    Of several data-parallel engines, which the text form lists one after another, requests are
    summed and the share of KV in use is averaged.
    """
    form, _, report = headers.get("endpoint-load-metrics", "").partition(" ")
    try:
        figures = _json(report) if form == "JSON" else _text(report) if form == "TEXT" else []
    except (ValueError, msgspec.MsgspecError):
        return None
    waiting, usage = _named(figures, "num_requests_waiting"), _named(figures, "kv_cache_usage_perc")
    if not waiting and not usage:
        return None
    return Load(
        waiting=int(sum(waiting)) if waiting else None,
        kv_usage=sum(usage) / len(usage) if usage else None,  # called «perc», it is 0 to 1
    )


def _json(report: str) -> list[tuple[str, float]]:
    return list(msgspec.json.decode(report, type=Report).named_metrics.items())


def _text(report: str) -> list[tuple[str, float]]:
    pairs = (
        pair.strip().removeprefix("named_metrics.").partition("=") for pair in report.split(",")
    )
    return [(name, float(value)) for name, _, value in pairs]


def _named(figures: list[tuple[str, float]], wanted: str) -> list[float]:
    return [value for name, value in figures if name == wanted and isfinite(value)]
