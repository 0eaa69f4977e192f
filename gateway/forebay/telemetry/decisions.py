"""The last decisions, for `forebay explain` and the admin port."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from forebay.api import Decision


class DecisionStore:
    """A bounded store by request id; the oldest goes first. ``capacity`` 0 keeps none."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._decisions: OrderedDict[str, Decision] = OrderedDict()

    def put(self, decision: Decision) -> None:
        """Keep it; a later record of the same request takes the place of the earlier one."""
        self._decisions[decision.request_id] = decision
        self._decisions.move_to_end(decision.request_id)
        if len(self._decisions) > self._capacity:
            self._decisions.popitem(last=False)

    def get(self, request_id: str) -> Decision | None:
        return self._decisions.get(request_id)

    def recent(self, n: int) -> list[Decision]:
        """The latest, newest first; at most ``n``."""
        return list(islice(reversed(self._decisions.values()), max(0, n)))
