"""`forebay explain`: one decision, and why it fell so."""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import quote

import click
from msgspec import Struct
from rich.console import Console
from rich.text import Text

from forebay.api import Candidate, Decision, Outcome
from forebay.cli.admin import admin_option, fetch, json_option
from forebay.cli.group import Failed
from forebay.cli.output import console, facts, figure, print_json, seconds, table


class Decisions(Struct):
    decisions: list[Decision]


@click.command()
@click.argument("request_id", required=False, metavar="ID")
@click.option("--last", is_flag=True, help="The latest request, whatever its id.")
@admin_option
@json_option
def explain(request_id: str | None, last: bool, admin_url: str, as_json: bool) -> None:
    """Show why the request ID went where it went: candidates, scores, attempts, outcome.

    ID is what the answer's x-request-id header says.
    """
    if (request_id is None) is not last:
        raise click.UsageError("give either the ID of a request or --last")
    decision = _last(admin_url) if request_id is None else _decision(admin_url, request_id)
    if as_json:
        print_json(decision)
    else:
        _show(decision, console())


def _decision(admin_url: str, request_id: str) -> Decision:
    missing = (
        f"no decision is kept for request {request_id}. The id is in the answer's x-request-id "
        "header; only the latest requests are kept (`decisions` in the configuration)"
    )
    return fetch(admin_url, f"/decisions/{quote(request_id, safe='')}", Decision, missing=missing)


def _last(admin_url: str) -> Decision:
    found = fetch(admin_url, "/decisions?limit=1", Decisions).decisions
    if not found:
        raise Failed("no request has been served yet")
    return found[0]


def _show(decision: Decision, out: Console) -> None:
    when = datetime.fromtimestamp(decision.time, UTC).astimezone()
    known = {
        "request": decision.request_id,
        "asked": f"{when:%Y-%m-%d %H:%M:%S}, {decision.endpoint}, model {decision.model}",
        "by": f"{decision.identity.key}, tenant {decision.identity.tenant}",
        "policy": f"{decision.policy}, version {decision.policy_version}, seed {decision.seed}",
        "decision": _verdict(decision),
        "outcome": "still in flight" if decision.outcome is None else _ending(decision.outcome),
    }
    if decision.trace_id:
        known["trace"] = decision.trace_id
    out.print(facts(known.items()), "", _candidates(decision), sep="\n")
    if decision.attempts:
        out.print("", _attempts(decision), sep="\n")


def _verdict(decision: Decision) -> str:
    if decision.chosen is None:
        return "no backend was eligible"
    scores = {candidate.backend: candidate.score for candidate in decision.candidates}
    text = f"{decision.chosen} with {figure(scores.get(decision.chosen), '{:.3f}')}"
    if decision.runner_up is not None:
        text += f", before {decision.runner_up} with {figure(scores[decision.runner_up], '{:.3f}')}"
    return f"{text}; chosen with probability {decision.probability:.3g}"


def _ending(outcome: Outcome) -> str:
    parts = [f"{outcome.result}, HTTP {outcome.status}, after {seconds(outcome.duration)}"]
    if outcome.error:
        parts.append(outcome.error)
    parts.append(f"queued {seconds(outcome.queue)}, first token after {seconds(outcome.ttft)}")
    parts.append(f"overhead {seconds(outcome.overhead)}")
    if outcome.usage is not None:
        usage = outcome.usage
        counted = " (counted)" if usage.source == "counted" else ""
        parts.append(f"{usage.prompt_tokens} tokens in, {usage.completion_tokens} out{counted}")
    if outcome.finish_reasons:
        parts.append(f"finish: {', '.join(outcome.finish_reasons)}")
    if outcome.lane:
        parts.append(f"{outcome.lane} lane, events: {outcome.events}")
    return "; ".join(parts)


def _candidates(decision: Decision) -> object:
    rows = table(
        *("candidate", "score", "in flight", "cached prefix", "load age", "verdict"),
        numbers=("score", "in flight", "cached prefix", "load age"),
    )
    ranks = {name: rank for rank, name in enumerate(decision.order)}
    for item in sorted(decision.candidates, key=lambda c: ranks.get(c.backend, len(ranks))):
        rows.add_row(
            item.backend,
            figure(item.score, "{:.3f}"),
            str(item.in_flight),
            f"{item.prefix_tokens} tokens",
            seconds(item.load_age),
            _place(item, ranks),
        )
    return rows


def _place(item: Candidate, ranks: dict[str, int]) -> Text:
    rank = ranks.get(item.backend)
    if rank is None:
        return Text(f"out: {item.veto or 'not eligible'}", style="red")
    return Text("winner", style="green") if rank == 0 else Text(f"place {rank + 1}")


def _attempts(decision: Decision) -> object:
    rows = table(
        "attempt", "backend", "began after", "took", "result", numbers=("began after", "took")
    )
    for number, item in enumerate(decision.attempts, start=1):
        result = (
            Text(f"failed: {item.error}", style="red") if item.error else Text("served", "green")
        )
        rows.add_row(
            str(number), item.backend, seconds(item.started), seconds(item.duration), result
        )
    return rows
