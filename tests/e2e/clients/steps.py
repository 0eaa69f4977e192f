"""What the scripts share: the list of steps, and how each is taken and told of.

A script is called with one argument, a JSON object: `url` of the gateway, `admin` URL, `key`,
`model`, `embedder`, and what the model's backend `can` do. It prints a JSON line a step.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIVEN: dict[str, Any] = json.loads(sys.argv[1])
LIST = json.loads(Path(__file__).with_name("steps.json").read_text())
TEXTS: dict[str, str] = LIST["texts"]
TOOL: dict[str, Any] = LIST["tool"]
MODEL: str = GIVEN["model"]
EMBEDDER: str = GIVEN["embedder"]
KEY: str = GIVEN["key"]
#: So long that no backend is through with it before a client has left.
ENDLESS = TEXTS["endless"] * 400

Step = Callable[[], Any]
_steps: dict[str, Step] = {}


def step(function: Step) -> Step:
    """A step, by its function's name; what it returns is told."""
    _steps[function.__name__] = function
    return function


def raised(kind: type[Exception], call: Callable[[], Any]) -> Any:
    """The exception of this class that the call ends in."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def wait_for_load(in_flight: int) -> None:
    """Until the gateway has so many requests at this model's backend."""
    for _ in range(100):
        with urllib.request.urlopen(f"{GIVEN['admin']}/backends", timeout=10) as answer:
            backends = json.load(answer)["backends"]
        if next(b for b in backends if b["name"] == MODEL)["in_flight"] == in_flight:
            return
        time.sleep(0.1)
    raise AssertionError(f"{MODEL} has not come to {in_flight} requests")


async def load_comes_to(in_flight: int) -> None:
    """The same beside the event loop, which some clients need to close what they have left."""
    await asyncio.to_thread(wait_for_load, in_flight)


def _take(
    step: Step, runner: asyncio.Runner, lacking: str | None, refusal: type[Exception]
) -> tuple[bool, Any]:
    try:
        detail = step()
        if asyncio.iscoroutine(detail):
            detail = runner.run(detail)
    except refusal as error:
        if lacking is not None:
            return True, f"refused: {error}"
        return False, traceback.format_exc()
    except Exception:  # noqa: BLE001 - told in the step's line; the others go on
        return False, traceback.format_exc()
    return lacking is None, detail if lacking is None else f"answered without {lacking}"


def main(client: str, refusal: type[Exception]) -> None:
    """Takes all steps of this client. `refusal`: its class for 400."""
    asked = LIST["clients"][client]
    assert set(asked) == set(_steps), f"the list and the script differ: {set(asked) ^ set(_steps)}"
    names = [name for name in asked if name in GIVEN.get("only", asked)]
    # One event loop for all, as in any program: clients keep connections that belong to theirs.
    with asyncio.Runner() as runner:
        for name in names:
            need = LIST["needs"].get(name)
            lacking = need if need is not None and need not in GIVEN["can"] else None
            began = time.monotonic()
            ok, detail = _take(_steps[name], runner, lacking, refusal)
            seconds = round(time.monotonic() - began, 2)
            line = {"name": name, "ok": ok, "seconds": seconds, "detail": str(detail)}
            print(json.dumps(line), flush=True)
