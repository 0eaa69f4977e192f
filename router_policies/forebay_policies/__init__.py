"""The routing policies that come with Forebay, one a module."""

from __future__ import annotations

from collections.abc import Iterable

from forebay.api import PolicyKind, hookimpl
from forebay_policies import least_connections, power_of_two, prefix_affinity, round_robin


@hookimpl
def policies() -> Iterable[PolicyKind]:
    return (
        round_robin.KIND,
        least_connections.KIND,
        power_of_two.KIND,
        prefix_affinity.KIND,
    )
