"""Observers are told of each request, off the hot path."""

from __future__ import annotations

from forebay.api.decision import Decision

__all__ = ["Observer"]


class Observer:
    """Override what you want to know. Called in order, from a task of its own, after the fact.

    An observer that raises is logged and counted, and detached after ten failures in a row.
    """

    async def started(self, decision: Decision) -> None:
        """The request was routed; the first attempt is being opened."""

    async def first_token(self, decision: Decision, seconds: float) -> None:
        """The first byte of the answer has come, ``seconds`` after the request's arrival."""

    async def finished(self, decision: Decision) -> None:
        """The request has ended; ``decision.outcome`` is set."""

    async def aclose(self) -> None:
        """The gateway stops."""
