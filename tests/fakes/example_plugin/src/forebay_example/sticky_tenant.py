"""Policy ``sticky_tenant``: each tenant has a backend of its own, and a fixed order of spares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from forebay.api import Policy, PolicyKind, Request, Score, Snapshot, hookimpl


class StickyTenant(Policy):
    """Rendezvous hashing: the hash of tenant and backend *is* the score, so nothing is kept."""

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[Score]:
        tenant = request.identity.tenant
        return [affinity(tenant, backend.name) for backend in snapshot.backends]


def affinity(tenant: str, backend: str) -> float:
    digest = blake2b(f"{tenant}\0{backend}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32


@hookimpl
def policies() -> Iterable[PolicyKind]:
    kind = PolicyKind(
        name="sticky_tenant",
        build=lambda settings: StickyTenant(),
        summary="a backend for each tenant",
    )
    return [kind]
