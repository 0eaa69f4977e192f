"""least_connections: a table."""

from __future__ import annotations

from typing import Any

import pytest

from forebay.testing.policy import make_request, make_snapshot
from forebay_policies.least_connections import LeastConnections


@pytest.mark.parametrize(
    ("columns", "scores"),
    [
        ({"in_flight": [0]}, [1.0]),
        ({"in_flight": [3, 1, 1]}, [0.5, 1.0, 1.0]),
        ({"in_flight": [0, 0], "weight": [1.0, 2.0]}, [0.5, 1.0]),
        # Twice the weight carries twice the load: 3/1 against 6/2.
        ({"in_flight": [2, 5], "weight": [1.0, 2.0]}, [1.0, 1.0]),
        # Only answers in flight count, however long the prompts that wait.
        ({"in_flight": [1, 0], "queued_tokens": [0, 90_000]}, [0.5, 1.0]),
    ],
)
def test_scores(columns: dict[str, Any], scores: list[float]) -> None:
    assert LeastConnections().score(make_request(), make_snapshot(**columns)) == scores
