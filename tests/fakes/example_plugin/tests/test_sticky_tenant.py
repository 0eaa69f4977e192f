"""The policy keeps the contract, and keeps tenants where they are."""

from __future__ import annotations

from collections import Counter

from forebay_example.sticky_tenant import StickyTenant

from forebay.api import Policy
from forebay.testing import PolicyContract, make_request, make_snapshot


class TestContract(PolicyContract):
    def policy(self) -> Policy:
        return StickyTenant()


def home(tenant: str, names: list[str]) -> str:
    scores = StickyTenant().score(make_request(tenant=tenant), make_snapshot(name=names))
    return max(zip(scores, names, strict=True))[1]


def test_only_the_tenants_of_a_lost_backend_move() -> None:
    names = ["a", "b", "c"]
    tenants = [f"tenant-{number}" for number in range(300)]
    before = {tenant: home(tenant, names) for tenant in tenants}
    after = {tenant: home(tenant, ["a", "c"]) for tenant in tenants}
    assert all(after[tenant] == before[tenant] for tenant in tenants if before[tenant] != "b")
    assert min(Counter(before.values()).values()) > 60
