"""Take turns, in proportion to the weights, as evenly spread as possible.

Formula
    With t turns had, weight w, and T and W their sums over the candidates:

    share    = w / W * (T + 1)     turns due once this request is decided
    eligible = t < share           not ahead of its share
    deadline = (t + 1) / w         virtual time by which the next turn is due

    The eligible backend with the earliest deadline is next, ties go to the first in the fleet.
    Scores fall evenly with the rank in that order, those that are ahead come last.

Intent
    Equal work for equal machines when requests are alike. Blind to load and to caches: a prompt of
    100,000 tokens counts like one of ten.

Why not the deadline alone
    With weights 10 and ten times 1, the least deadline gives the heavy backend the first nine
    turns where five are its due. With the eligibility test no backend is ever a whole turn away
    from its share (Balinski and Young, "The Quota Method of Apportionment", 1975), which is also
    what "smooth" weighted round robin is after.

Options
    none; ``weight`` belongs to the backend's entry in the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from forebay.api import Policy, PolicyKind, Request, Score, Snapshot

__all__ = ["KIND", "RoundRobin"]


class RoundRobin(Policy):
    """Smooth weighted round robin over ``BackendView.turns``."""

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[Score]:
        backends = snapshot.backends
        count = len(backends)
        due = (sum(b.turns for b in backends) + 1) / sum(b.weight for b in backends)

        def urgency(index: int) -> tuple[bool, float, int]:
            view = backends[index]
            ahead = view.turns >= due * view.weight
            return ahead, (view.turns + 1) / view.weight, index

        scores = [0.0] * count
        for rank, index in enumerate(sorted(range(count), key=urgency)):
            scores[index] = (count - rank) / count
        return scores


KIND = PolicyKind(
    name="round_robin",
    build=lambda settings: RoundRobin(),
    summary="each in turn, by weight",
)
