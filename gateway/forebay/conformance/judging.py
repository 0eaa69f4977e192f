"""Running the checks: through the gateway, and where that can be, of the backend itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

import httpx

from forebay.api import Capabilities
from forebay.conformance.answer import Broken, Finding, Lacking
from forebay.conformance.check import Check
from forebay.conformance.checks import CHECKS
from forebay.conformance.report import HOLDS, Report, Result, Verdict
from forebay.conformance.subject import Stage, Subject, staged
from forebay.conformance.talk import Talk
from forebay.registry import Registry

__all__ = ["examine", "judge"]

#: Checks at once; no more, so that small servers are not overrun.
_AT_ONCE = 4
#: Seconds that the backend itself is waited for: some go on for ever.
_DIRECT = 30.0

Told = Callable[[Result], None]


async def examine(
    subject: Subject,
    registry: Registry,
    checks: Sequence[Check] = CHECKS,
    told: Told = lambda result: None,
) -> Report:
    """Put the gateway before the subject and run the checks.

    ``told`` hears each result as it comes.

    :raises ConfigError: the subject's adapter, target or settings are wrong.
    :raises NoBackend: the backend did not become ready, and why.
    """
    began = time.monotonic()
    async with staged(subject, registry) as stage:
        results = await _run(stage, subject.timeout, checks, told)
    return Report(
        adapter=subject.adapter,
        model=stage.model,
        backend_version=stage.claims.version,
        forebay_version=version("forebay"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        target="fake" if subject.fake else "live",
        claims=tuple(sorted({*stage.claims.endpoints, *filter(_claims(stage.claims), _FLAGS)})),
        duration=round(time.monotonic() - began, 1),
        results=tuple(results[check.id] for check in checks),
    )


async def _run(
    stage: Stage, timeout: float, checks: Sequence[Check], told: Told
) -> dict[str, Result]:
    results: dict[str, Result] = {}
    turns = asyncio.Semaphore(_AT_ONCE)

    async def run(check: Check) -> None:
        async with turns:
            results[check.id] = await judge(check, stage, timeout)
            told(results[check.id])

    async with asyncio.TaskGroup() as group:
        for check in checks:
            if not check.alone:
                group.create_task(run(check))
    for check in checks:
        if check.alone:
            await run(check)
    return results


_FLAGS = ("tools", "schema", "logprobs", "multimodal")


def _claims(claims: Capabilities) -> Callable[[str], bool]:
    return lambda name: name in claims.endpoints or getattr(claims, name, False) is True


async def judge(check: Check, stage: Stage, timeout: float) -> Result:
    """Passed: holds both ways. Repaired: only through the gateway. Lacking: refused. Or broken."""
    began = time.monotonic()
    found = await _holds(check, stage.gateway, timeout)
    other: Finding | None = None
    compared = check.compared and stage.direct is not None
    if compared and stage.direct is not None:
        other = await _holds(check, stage.direct, min(timeout, _DIRECT))
    direct = (other.reason if other else HOLDS) if compared else None
    reason = found.reason if found else ""
    if isinstance(found, Lacking) and check.claim and _claims(stage.claims)(check.claim):
        found, reason = Broken(reason), f"claims {check.claim}, but: {reason}"
    verdict: Verdict
    if found is None:
        verdict = "repaired" if other else "passed"
    else:
        verdict = "lacking" if isinstance(found, Lacking) else "broken"
    return Result(
        id=check.id,
        area=check.area,
        promise=check.promise,
        verdict=verdict,
        reason=reason,
        direct=direct,
        seconds=round(time.monotonic() - began, 2),
    )


async def _holds(check: Check, talk: Talk, timeout: float) -> Finding | None:
    """None if the promise holds."""
    try:
        async with asyncio.timeout(timeout):
            await check.run(talk)
    except Finding as finding:
        return finding
    except TimeoutError:
        return Broken(f"no answer within {timeout:g} s")
    except httpx.HTTPError as error:
        return Broken(f"the connection: {error or type(error).__name__}")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        # A check reads what it was sent; what it stumbles over is not of the promised shape.
        return Broken(f"the answer's shape: {type(error).__name__} {error}")
    return None
