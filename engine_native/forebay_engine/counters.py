"""What the scheduler counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from forebay_engine.sequence import FinishReason, Sequence


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
    generated_tokens: int = 0
    #: Guesses that were verified, and those of them that came true.
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0

    def count_end(self, reason: FinishReason) -> None:
        match reason:
            case FinishReason.ABORT:
                self.aborted += 1
            case FinishReason.DEADLINE:
                self.expired += 1
            case FinishReason.ERROR:
                self.failed += 1
            case _:
                self.finished += 1

    def count_guesses(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        sequence.num_drafted += drafted
        sequence.num_accepted += accepted

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
