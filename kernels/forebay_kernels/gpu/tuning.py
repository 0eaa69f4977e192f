"""Which tile sizes, warps and stages a kernel runs with: tables in the package, read once.

Nothing is tried out on the request path: a first request would wait for it, and a captured graph
would hold whatever won a noisy race. ``benchmarks/gpu`` measures and writes the tables, one a
compute capability; a device without a table of its own takes that of the nearest older one, or the
oldest there is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources

import torch

#: Rows of a kernel: which shapes a row is for, as ``name: [least, most]``, and what to use there.
Row = Mapping[str, Mapping[str, list[int] | int]]


def choose(kernel: str, device: torch.device, **shape: int) -> dict[str, int]:
    """Settings of ``kernel`` for this shape: those of the first row whose ranges all hold.

    :raises KeyError: no such kernel, or no row for the shape: the last row of each kernel must
        have no ranges.
    """
    for row in table(capability(device))[kernel]:
        if all(least <= shape[name] <= most for name, (least, most) in row["when"].items()):  # type: ignore[misc]
            return dict(row["use"])  # type: ignore[arg-type]
    raise KeyError(f"{kernel}: no row for {shape}")


@cache
def capability(device: torch.device) -> int:
    """Compute capability, 90 for Hopper; so, too, where kernels are interpreted without a GPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def table(wanted: int) -> dict[str, list[Row]]:
    """All kernels' rows for a compute capability."""
    folder = resources.files("forebay_kernels.gpu") / "tables"
    names = {int(path.name[3:-5]): path for path in folder.iterdir() if path.name.endswith(".json")}
    older = [number for number in names if number <= wanted]
    found: dict[str, list[Row]] = json.loads(
        names[max(older) if older else min(names)].read_text()
    )["kernels"]
    return found
