"""The admin port: health, metrics, fleet, plugins, decisions. For operators, on loopback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, get
from litestar.types import ASGIApp

from forebay.api import Decision
from forebay.backend import describe
from forebay.fleet import Fleet
from forebay.loader import Failed, Loaded
from forebay.telemetry.decisions import DecisionStore
from forebay.telemetry.metrics import Metrics


def build_admin_app(
    fleet: Fleet,
    metrics: Metrics,
    decisions: DecisionStore,
    plugins: Sequence[Loaded | Failed],
    draining: Callable[[], bool],
) -> ASGIApp:
    """The admin port's ASGI application. ``plugins``: the loader's report."""

    @get("/healthz", sync_to_thread=False)
    def healthz() -> Response[bytes]:
        """The process lives."""
        return _json({"status": "ok"})

    @get("/readyz", sync_to_thread=False)
    def readyz() -> Response[bytes]:
        """It takes requests: not draining, and every model has a healthy backend."""
        dark = [
            model
            for model in fleet.models
            if all(backend.state() != "healthy" for backend, _ in fleet.pool(model))
        ]
        ready = not dark and not draining()
        answer = {"ready": ready, "draining": draining(), "models_without_backend": dark}
        return _json(answer, 200 if ready else 503)

    @get("/metrics", sync_to_thread=True)
    def exposition() -> Response[bytes]:
        """Prometheus text. Rendered in a thread: a scrape must not hold up the streams."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @get("/backends", sync_to_thread=False)
    def backends() -> Response[bytes]:
        serves = {
            name: [m for m in fleet.models if any(b.name == name for b, _ in fleet.pool(m))]
            for name in fleet.backends
        }
        return _json(
            {"backends": [describe(b, serves[name]) for name, b in fleet.backends.items()]}
        )

    @get("/plugins", sync_to_thread=False)
    def plugin_report() -> Response[bytes]:
        return _json({"plugins": [_plugin(entry) for entry in plugins]})

    @get("/decisions", sync_to_thread=False)
    def recent(request: Request[Any, Any, Any]) -> Response[bytes]:
        given = request.query_params.get("limit", "20")
        if not given.isdigit():
            return _error(400, f"limit: must be a whole number, not {given!r}", "invalid_request")
        limit = int(given)
        return _json({"decisions": [_decision(d) for d in decisions.recent(limit)]})

    @get("/decisions/{request_id:str}", sync_to_thread=False)
    def decision(request: Request[Any, Any, Any]) -> Response[bytes]:
        request_id = str(request.path_params["request_id"])
        found = decisions.get(request_id)
        if found is None:
            return _error(404, f"no decision with id {request_id!r} is kept", "not_found")
        return _json(_decision(found))

    return Litestar(
        route_handlers=[healthz, readyz, exposition, backends, plugin_report, recent, decision],
        openapi_config=None,
        logging_config=None,
    )


def _json(value: object, status: int = 200) -> Response[bytes]:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def _error(status: int, message: str, code: str) -> Response[bytes]:
    return _json({"error": {"message": message, "code": code}}, status)


def _plugin(entry: Loaded | Failed) -> dict[str, object]:
    return {
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "provides": entry.provides if isinstance(entry, Loaded) else [],
        "error": entry.reason if isinstance(entry, Failed) else None,
    }


def _decision(decision: Decision) -> dict[str, object]:
    return {
        **msgspec.to_builtins(decision),
        "chosen": decision.chosen,
        "runner_up": decision.runner_up,
        "served_by": decision.served_by,
    }
