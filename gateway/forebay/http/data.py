"""The data port: what clients see."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, asgi, get, route
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from forebay.access import Access
from forebay.api import ForebayError, RequestError, UnknownModel
from forebay.config import Limits
from forebay.dispatch import Dispatch
from forebay.http import anthropic
from forebay.http.decode import decode_chat, decode_completion
from forebay.http.operations import OPERATIONS
from forebay.http.relay import Relay
from forebay.http.reply import Dialect, error_object, openai_error, send_error
from forebay.http.response_store import ResponseStore, response_routes
from forebay.http.responses import responses_dialect
from forebay.telemetry.tracing import Tracing

AnyRequest = Request[Any, Any, Any]


class NoRoute(RequestError):
    kind = "not_found"
    status = 404


class WrongMethod(RequestError):
    kind = "method_not_allowed"
    status = 405


DIALECTS = (
    Dialect("chat", "/v1/chat/completions", decode_chat, openai_error),
    Dialect("completions", "/v1/completions", decode_completion, openai_error),
    *anthropic.DIALECTS,
    *OPERATIONS,
)


def build_data_app(
    dispatch: Dispatch,
    access: Access,
    limits: Limits,
    tracing: Tracing,
    middleware: Iterable[Callable[[ASGIApp], ASGIApp]],
) -> ASGIApp:
    """The data port's ASGI application, plugins' middleware around it."""
    store = ResponseStore(limits.stored_bytes)
    app: ASGIApp = Litestar(
        route_handlers=[
            *(
                _post_only(dialect, Relay(dialect, dispatch, access, limits, tracing))
                for dialect in (*DIALECTS, responses_dialect(store))
            ),
            *response_routes(store, access),
            *_model_routes(dispatch, access),
        ],
        exception_handlers={ForebayError: _refused, HTTPException: _not_routed},
        openapi_config=None,
        logging_config=None,
    )
    for wrap in reversed(list(middleware)):
        app = wrap(app)
    return app


def _post_only(dialect: Dialect, relay: Relay) -> BaseRouteHandler:
    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "POST":
            await relay(scope, receive, send)
        else:
            error = WrongMethod(f"{dialect.template} takes POST")
            await send_error(send, dialect, error, [(b"allow", b"POST")])

    if "{" not in dialect.route:
        return asgi(dialect.route, copy_scope=False)(handle)

    # Litestar 2.25 finds no ASGI handler with path parameters; any other may hand over to one.
    @route(dialect.route, http_method=["DELETE", "GET", "PATCH", "POST", "PUT"])
    async def hand_over() -> ASGIApp:
        return handle

    return hand_over


def _model_routes(dispatch: Dispatch, access: Access) -> list[HTTPRouteHandler]:
    started = int(time.time())
    started_at = datetime.fromtimestamp(started, UTC).isoformat().replace("+00:00", "Z")

    def card(name: str) -> dict[str, object]:
        """OpenAI's and Anthropic's in one, as both are asked for by the same path."""
        openai = {"id": name, "object": "model", "created": started, "owned_by": "forebay"}
        theirs = {"type": "model", "display_name": name, "created_at": started_at}
        return {**openai, **theirs, "lifecycle": "active"}

    @get("/v1/models", sync_to_thread=False)
    def models(request: AnyRequest) -> Response[bytes]:
        access.identify(request.headers)
        names = list(dispatch.models)
        pages = {"has_more": False, "first_id": names[0], "last_id": names[-1]} if names else {}
        return _json({"object": "list", "data": [card(name) for name in names], **pages})

    @get("/v1/models/{name:path}", sync_to_thread=False)
    def model(request: AnyRequest) -> Response[bytes]:
        access.identify(request.headers)
        name = str(request.path_params["name"]).removeprefix("/")
        if name not in dispatch.models:
            raise UnknownModel(
                f"the model {name!r} does not exist here; GET /v1/models lists those that do",
                param="model",
            )
        return _json(card(name))

    return [models, model]


def _json(value: object, status: int = 200) -> Response[bytes]:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def _refused(_: AnyRequest, error: ForebayError) -> Response[bytes]:
    return _json(error_object(error), error.status)


def _not_routed(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    if error.status_code == WrongMethod.status:
        return _refused(request, WrongMethod(f"{request.url.path} does not take {request.method}"))
    if error.status_code == NoRoute.status:
        return _refused(request, NoRoute(f"there is no {request.url.path} here"))
    return _json(error_object(ForebayError(error.detail)), error.status_code)
