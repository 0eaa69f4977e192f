"""Every policy that ships passes the contract, and so do those with options at their ends."""

from __future__ import annotations

import random

import pytest

import forebay_policies
from forebay.api import GenerateRequest, Policy, Score, Snapshot
from forebay.testing.policy import PolicyContract
from forebay_policies.prefix_affinity import PrefixAffinity, Settings

KINDS = {kind.name: kind for kind in forebay_policies.policies()}


@pytest.mark.parametrize("name", sorted(KINDS))
class TestBuiltIn(PolicyContract):
    @pytest.fixture(autouse=True)
    def _choose(self, name: str) -> None:
        self.kind = KINDS[name]

    def policy(self) -> Policy:
        return self.kind.build(self.kind.settings())


class TestTightestBound(PolicyContract):
    def policy(self) -> Policy:
        return PrefixAffinity(Settings(ttft_weight=0.01, bound=1.0, slack=1))


class Broken(Policy):
    """Breaks one rule, told by name."""

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.asked = 0

    def score(self, request: GenerateRequest, snapshot: Snapshot) -> list[Score]:
        size = len(snapshot.backends)
        self.asked += 1
        scores: dict[str, list[Score]] = {
            "short": [1.0] * (size - 1),
            "above": [1.5] * size,
            "nan": [float("nan")] * size,
            "state": [1 / self.asked] * size,
            "seed": [((snapshot.seed + i) % 7) / 7 for i in range(size)],
            "chance": [random.random() for _ in range(size)],
            "one": [1.0, *[0.5] * (size - 1)],
            "veto": [None] * size,
        }
        return scores[self.rule]

    def propensity(self, request: GenerateRequest, snapshot: Snapshot) -> list[float] | None:
        size = len(snapshot.backends)
        return [1 / size] * size if self.rule in {"one", "veto"} else None


class Suite(PolicyContract):
    examples = 5

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def policy(self) -> Policy:
        return Broken(self.rule)


@pytest.mark.parametrize(
    ("rule", "test"),
    [
        ("short", "test_scores_every_backend_within_0_and_1"),
        ("above", "test_scores_every_backend_within_0_and_1"),
        ("nan", "test_scores_every_backend_within_0_and_1"),
        ("state", "test_is_deterministic_and_keeps_no_state"),
        ("chance", "test_is_deterministic_and_keeps_no_state"),
        ("seed", "test_propensity_is_the_frequency_over_seeds"),
        ("one", "test_propensity_is_the_frequency_over_seeds"),
        ("veto", "test_propensity_sums_to_one_over_the_eligible"),
    ],
)
def test_the_contract_catches(rule: str, test: str) -> None:
    with pytest.raises(AssertionError):
        getattr(Suite(rule), test)()
