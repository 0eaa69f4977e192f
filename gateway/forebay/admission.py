"""Who may go to a backend now: a first-come queue per model, bounded in length and in time.

A permit is not a slot. Slots are counted by the backends in the fleet; admission only sees to it
that as many requests go on to routing as there are free slots, in the order in which they came.
"""

from __future__ import annotations

import asyncio
from collections import deque

from forebay.api import Overloaded
from forebay.config import Model
from forebay.fleet import Fleet


class Gate:
    """Of one model."""

    def __init__(self, name: str, settings: Model, fleet: Fleet) -> None:
        self._name = name
        self._settings = settings
        self._fleet = fleet
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._aside: list[asyncio.Future[None]] = []
        # Woken, but not yet counted as in flight by the fleet.
        self._going = 0

    @property
    def depth(self) -> int:
        """Requests waiting."""
        return len(self._waiting) + len(self._aside)

    def _room(self) -> bool:
        """Whether one more may go. Also true if no backend is healthy: routing then says so."""
        free = -self._going
        healthy = False
        for backend, _ in self._fleet.pool(self._name):
            if backend.state() != "healthy":
                continue
            if not backend.slots:
                return True
            healthy = True
            free += backend.slots - backend.in_flight
        return free > 0 or not healthy

    async def enter(self) -> None:
        """Wait for a turn. After it, :meth:`passed` must be called, before any await.

        :raises Overloaded: the queue is full, or the wait took too long.
        """
        if not self._waiting and self._room():
            self._going += 1
            return
        settings = self._settings
        if len(self._waiting) >= settings.max_queue:
            raise self._crowded(len(self._waiting))
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(settings.queue_timeout):
                await turn
        except TimeoutError:
            self._give_up(turn)
            raise Overloaded(
                f"no backend of {self._name!r} came free within {settings.queue_timeout:g} s",
                code="queue_timeout",
                retry_after=1.0,
            ) from None
        except asyncio.CancelledError:
            self._give_up(turn)
            raise

    def _crowded(self, waiting: int) -> Overloaded:
        return Overloaded(
            f"all backends of {self._name!r} are busy and {waiting} requests wait",
            retry_after=1.0,
        )

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif not turn.cancelled():
            # Woken and interrupted in the same moment: the turn goes to the next in line.
            self.passed()
            self.wake()

    async def wait_for_change(self) -> None:
        """For a request whose turn came while just those backends were full, or are examined,
        that it needs.

        It stands aside until something changes anywhere, and holds up nobody; then it has a turn.

        :raises Overloaded: too many wait, or the wait took too long.
        """
        if len(self._aside) >= self._settings.max_queue:
            raise self._crowded(len(self._aside))
        change = asyncio.get_running_loop().create_future()
        self._aside.append(change)
        try:
            async with asyncio.timeout(self._settings.queue_timeout):
                await change
        except TimeoutError:
            raise Overloaded(
                f"no backend of {self._name!r} that can do this came free within "
                f"{self._settings.queue_timeout:g} s",
                code="queue_timeout",
                retry_after=1.0,
            ) from None
        finally:
            if change in self._aside:
                self._aside.remove(change)
        self._going += 1

    def passed(self) -> None:
        """The request has been routed, or has given up its turn."""
        self._going -= 1

    def wake(self) -> None:
        """Slots may have come free: let as many go as there is room for."""
        while self._aside:
            change = self._aside.pop(0)
            if not change.done():
                change.set_result(None)
        self.pass_on()

    def pass_on(self) -> None:
        """Let those in line go for whom there is room, as after a turn that took no slot."""
        while self._waiting and self._room():
            turn = self._waiting.popleft()
            if not turn.done():
                self._going += 1
                turn.set_result(None)


class Admission:
    """The gates of all models, woken by the fleet."""

    def __init__(self, models: dict[str, Model], fleet: Fleet) -> None:
        self._gates = {name: Gate(name, model, fleet) for name, model in models.items()}
        fleet.on_change = self.wake

    def gate(self, model: str) -> Gate:
        return self._gates[model]

    def wake(self) -> None:
        for gate in self._gates.values():
            if gate.depth:
                gate.wake()

    def depths(self) -> dict[str, int]:
        """Requests that wait, by model."""
        return {name: gate.depth for name, gate in self._gates.items()}
