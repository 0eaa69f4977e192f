"""Reading a few gauges out of a `/metrics` page.

``prometheus_client``'s parser builds an object a line: 15 ms for vLLM's page of 640 lines, once a
second and backend, on the event loop. Looking only for the names asked for takes 0.06 ms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite

__all__ = ["samples"]

#: What stands after a name: labels, in whose quoted values anything may stand, then the number.
_REST = re.compile(rb'(\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?[ \t]+(\S+)')


def samples(page: bytes, name: str, **labels: str) -> Sequence[float]:
    """The values of a metric, one for each set of labels; empty if the page does not have it.

    With ``labels`` only those that have these, whose values need no escaping. Prometheus text
    format 0.0.4 and OpenMetrics 1.0; a value that is no finite number is left out.
    """
    found = []
    wanted = [f',{label}="{value}"'.encode() for label, value in labels.items()]
    key = name.encode()
    start = 0
    while (at := page.find(key, start)) >= 0:
        start = at + len(key)
        if at and page[at - 1 : at] != b"\n":
            continue
        rest = _REST.match(page, start)
        if rest is not None and _has(rest[1] or b"", wanted):
            try:
                value = float(rest[2])
            except ValueError:
                continue
            if isfinite(value):
                found.append(value)
    return found


def _has(labels: bytes, wanted: Sequence[bytes]) -> bool:
    return not wanted or all(part in b"," + labels[1:] for part in wanted)
