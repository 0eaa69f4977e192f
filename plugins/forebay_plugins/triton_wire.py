"""How one model of a Triton server is reached: by HTTP here, by gRPC in :mod:`triton_grpc`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct

from forebay.api import (
    AdapterContext,
    Attempt,
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendRefused,
    HttpBackendSettings,
    Inference,
    InferRequest,
    UpstreamResponse,
)
from forebay_plugins import kserve
from forebay_plugins.http_server import HttpClient
from forebay_plugins.kserve import Model

__all__ = ["HttpWire", "Wire"]


class Wire(ABC):
    """All raise BackendError where the server does not do as asked."""

    @abstractmethod
    async def check_ready(self) -> None:
        """
        :raises BackendBusy: the server or its model is not ready.
        """

    @abstractmethod
    async def version(self) -> str:
        """The server's."""

    @abstractmethod
    async def model(self) -> Model: ...

    @abstractmethod
    async def ready_models(self) -> tuple[str, ...]:
        """Names in the server's repository; servers may restrict its index: then this one's."""

    @abstractmethod
    def generate(
        self, model: Model, inputs: Mapping[str, object], attempt: Attempt
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The model's responses to one request, each by the names of its tensors.

        Tensors of one element are bare values. Closing the generator stops the model.
        """

    @abstractmethod
    async def infer(self, request: InferRequest, attempt: Attempt) -> Inference: ...

    @abstractmethod
    async def aclose(self) -> None: ...


class Server(Struct):
    version: str = ""


class Listed(Struct):
    name: str
    state: str = ""


class HttpWire(HttpClient, Wire):
    """Triton does not notice that the client of a plain `generate` has left, so none is sent."""

    def __init__(self, settings: HttpBackendSettings, context: AdapterContext) -> None:
        super().__init__(settings, context)
        self._path = f"/v2/models/{quote(settings.model, safe='')}"

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
        return kserve.failure_of(status, headers, body)

    async def check_ready(self) -> None:
        for path in ("/v2/health/ready", f"{self._path}/ready"):
            status = await self.status("GET", path)
            if status == 400:
                raise BackendBusy("the backend or its model is not ready")
            if status != 200:
                raise BackendFailed(f"GET {path} of the backend: HTTP {status}; check `url`")

    async def version(self) -> str:
        server: Server = await self.get_json("/v2", Server)
        return server.version

    async def model(self) -> Model:
        metadata = await self.get_json(self._path, kserve.Metadata)
        return Model.of(metadata, await self.get_json(f"{self._path}/config", kserve.Config))

    async def ready_models(self) -> tuple[str, ...]:
        try:
            listed = await self.post_json("/v2/repository/index", {}, list[Listed], Attempt())
        except (BackendRefused, BackendFailed):
            return (self.settings.model,)
        return tuple(dict.fromkeys(model.name for model in listed if model.state == "READY"))

    async def generate(
        self, model: Model, inputs: Mapping[str, object], attempt: Attempt
    ) -> AsyncGenerator[dict[str, Any], None]:
        body = msgspec.json.encode(inputs)
        async with (
            self._open("generate_stream", "text/event-stream", body, attempt) as response,
            aclosing(kserve.responses(response)) as responses,
        ):
            async for found in responses:
                yield found

    async def infer(self, request: InferRequest, attempt: Attempt) -> Inference:
        path = f"versions/{quote(request.version, safe='')}/infer" if request.version else "infer"
        opened = self._open(path, "application/", request.body, attempt, request.headers)
        async with opened as response:
            headers = {
                name: value
                for name, value in response.headers.items()
                if name in ("content-encoding", kserve.JSON_LENGTH)
            }
            content_type = response.headers.get("content-type", "application/json")
            body = await response.read()
            return Inference(body, content_type, headers, model=self.settings.model)

    @asynccontextmanager
    async def _open(
        self,
        path: str,
        content_type: str,
        body: bytes,
        attempt: Attempt,
        headers: Mapping[str, str] = {},
    ) -> AsyncIterator[UpstreamResponse]:
        """A 200 of this model.

        :raises BackendError: it is none, or of another kind.
        """
        response = await self.post(f"{self._path}/{path}", body, attempt, headers)
        try:
            await self._check(response, content_type)
            yield response
        finally:
            await response.aclose()
