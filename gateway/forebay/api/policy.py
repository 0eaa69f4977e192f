"""The seam of routing: :class:`Policy` gives each backend a score, from an immutable snapshot.

A policy is arithmetic. What it would remember (turns, load, who has seen which prefix) the gateway
keeps and puts into the :class:`Snapshot`. See ``docs/writing-a-policy.md``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, ClassVar

from msgspec import Struct

from forebay.api.operations import Request

__all__ = [
    "BackendView",
    "Need",
    "Policy",
    "PolicyKind",
    "PolicySettings",
    "Score",
    "Snapshot",
]

#: 0 (worst) to 1 (best); None: not eligible.
Score = float | None


class Need(Enum):
    """Figures that cost something to compute; the gateway computes those a policy asks for."""

    #: ``prompt_tokens`` and ``prefix_tokens``.
    PREFIX = "prefix"


class BackendView(Struct, frozen=True, kw_only=True):
    """One candidate as it stands at the moment of decision."""

    name: str
    adapter: str = ""
    #: Relative share, from the configuration; greater than 0.
    weight: float = 1.0
    #: Requests sent by this gateway whose answers have not ended.
    in_flight: int = 0
    #: Greatest allowed ``in_flight``; 0: no limit.
    max_in_flight: int = 0
    #: Times this backend was chosen for this model; lifted when it (re)joins, so it gets no burst.
    turns: float = 0.0
    #: Uncached prompt tokens of requests sent there that have no first token yet (estimate).
    queued_tokens: int = 0
    #: The backend's own figures and their age in seconds; None: not reported.
    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    load_age: float | None = None
    #: Exponentially weighted mean seconds to the first token; None before the first answer.
    ttft: float | None = None
    #: Tokens of this request's prompt that the backend probably has in its cache (Need.PREFIX).
    prefix_tokens: int = 0


class Snapshot(Struct, frozen=True, kw_only=True):
    """The world, frozen: all that a policy may look at besides the request."""

    model: str
    backends: tuple[BackendView, ...]
    #: Requests decided for this model so far.
    turn: int = 0
    #: Fresh for each request; the only source of chance.
    seed: int = 0
    #: Estimated tokens of this request's prompt (Need.PREFIX), else 0.
    prompt_tokens: int = 0


class Policy(ABC):
    """Scores the candidates of one request. Pure: same input, same output, no I/O, no clock."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    #: Written into each decision; raise it when the arithmetic changes.
    version: ClassVar[str] = "1"

    @abstractmethod
    def score(self, request: Request, snapshot: Snapshot) -> Sequence[Score]:
        """One score for each of ``snapshot.backends``, in order: 0 (worst) to 1 (best).

        None vetoes a backend for this request. The best score wins; the gateway tries the others in
        descending order if the attempt fails before its first byte. Equal scores are drawn by
        ``snapshot.seed``. All backends in the snapshot are healthy and have room.
        """

    def propensity(self, request: Request, snapshot: Snapshot) -> Sequence[float] | None:
        """Over all seeds, the probability of each backend to win; needed by policies that draw.

        None (the default): ``score`` does not depend on the seed, ties are drawn evenly.
        """
        return None


class PolicySettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Base of a policy's options, e.g. `{name: prefix_affinity, ttft_weight: 4}`."""


class PolicyKind(Struct, frozen=True, kw_only=True):
    """How a plugin offers a policy."""

    #: What stands after ``policy:`` in the configuration. Unique.
    name: str
    build: Callable[[Any], Policy]
    settings: type[PolicySettings] = PolicySettings
    #: One line for ``forebay plugins``.
    summary: str = ""
