"""What a check is: a promise to clients, and a small function that finds out whether it is kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec import Struct

from forebay.conformance.talk import Talk

__all__ = ["Check", "check"]

Function = Callable[[Talk], Awaitable[None]]


class Check(Struct, frozen=True, kw_only=True):
    """One promise. ``run`` returns if it holds, and raises ``Lacking`` or ``Broken`` if not."""

    #: ``area.name``
    id: str
    #: One sentence, without a full stop.
    promise: str
    run: Function
    #: The capability or endpoint that a backend claims who claims this; empty: nobody claims it.
    claim: str = ""
    #: Disturbs other checks or is disturbed by them: runs while no other does.
    alone: bool = False
    #: The same can be asked of the backend itself.
    compared: bool = True

    @property
    def area(self) -> str:
        return self.id.partition(".")[0]


def check(
    id_: str, promise: str, *, claim: str = "", alone: bool = False, compared: bool = True
) -> Callable[[Function], Check]:
    """Makes a :class:`Check` of an async function; see ``docs/conformance.md``."""

    def made(run: Function) -> Check:
        return Check(id=id_, promise=promise, run=run, claim=claim, alone=alone, compared=compared)

    return made
