"""What the scheduler counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Totals since the start, in sequences and tokens."""

    admitted: int = 0
    finished: int = 0
    aborted: int = 0
    expired: int = 0
    failed: int = 0
    preempted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    steps: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
