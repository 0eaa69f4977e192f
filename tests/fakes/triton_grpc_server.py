"""Triton as its gRPC clients see it, in each scenario, made with NVIDIA's own messages.

What it says was recorded from a real server that ran the models of scripts/backends/triton, which
was of version 2.51: `version` says that, or a later one.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
from grpc import StatusCode
from tritonclient.grpc import service_pb2 as pb

from forebay.testing import Scenario

WORDS = (" Hello", " wörld", ' "quoted\\"', "\n", " 😀")
#: Answers a `ModelInferRequest` with responses, or bytes that are none.
Model = Callable[[Any, Any], AsyncIterator[Any]]


class Wires:
    """A listener before the server whose connections can be cut, as gRPC's own cannot."""

    def __init__(self) -> None:
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    @asynccontextmanager
    async def before(self, port: int) -> AsyncIterator[None]:
        self._to = port
        await self.reopen(0)
        try:
            yield
        finally:
            self.close()

    async def reopen(self, port: int) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._to)
        both = {writer, to_writer}
        self._writers |= both
        with suppress(OSError):
            await asyncio.gather(pipe(reader, to_writer), pipe(to_reader, writer))
        self._writers -= both

    def close(self) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def encoded(message: Any) -> bytes:
    return message if isinstance(message, bytes) else bytes(message.SerializeToString())


class GrpcServer:
    """``metadata`` as HTTP has it, by model."""

    def __init__(
        self, models: Mapping[str, Mapping[str, Any]], decoupled: bool, model: Model
    ) -> None:
        self._models = models
        self._decoupled = decoupled
        self._model = model
        self.ready = True
        self.version = "2.70.0"
        self.running = 0
        self.asked: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.wires = Wires()
        #: Set once its client has read a piece; without, connections are not cut.
        self.read = asyncio.Event()
        #: The status with which the repository's index is refused.
        self.index: tuple[StatusCode, str] | None = None

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Its URL."""
        server = grpc.aio.server()
        unary = {
            name.removesuffix("Request"): grpc.unary_unary_rpc_method_handler(
                answer, getattr(pb, name).FromString, encoded
            )
            for name, answer in self._unary().items()
        }
        handlers = {
            **unary,
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                self._stream, pb.ModelInferRequest.FromString, encoded
            ),
        }
        service = "inference.GRPCInferenceService"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with self.wires.before(port):
                yield f"http://127.0.0.1:{self.wires.port}"
        finally:
            await server.stop(None)

    def _unary(self) -> Mapping[str, Callable[[Any, Any], Awaitable[Any]]]:
        async def server_ready(request: Any, context: Any) -> Any:
            return pb.ServerReadyResponse(ready=self.ready)

        async def model_ready(request: Any, context: Any) -> Any:
            return pb.ModelReadyResponse(ready=self.ready)

        async def server_metadata(request: Any, context: Any) -> Any:
            return pb.ServerMetadataResponse(name="triton", version=self.version)

        async def model_metadata(request: Any, context: Any) -> Any:
            return pb.ModelMetadataResponse(**await self._known(request.name, context))

        async def model_config(request: Any, context: Any) -> Any:
            known = await self._known(request.name, context)
            answer = pb.ModelConfigResponse()
            answer.config.model_transaction_policy.decoupled = self._decoupled
            answer.config.max_batch_size = 16 if len(known["inputs"][0]["shape"]) > 1 else 0
            return answer

        async def index(request: Any, context: Any) -> Any:
            if self.index:
                await context.abort(*self.index)
            states = {**dict.fromkeys(self._models, "READY"), "sleeping": "UNAVAILABLE"}
            answer = pb.RepositoryIndexResponse()
            for name, state in states.items():
                answer.models.add(name=name, version="1", state=state)
            return answer

        async def infer(request: Any, context: Any) -> Any:
            self._note(request, context)
            return await anext(self._model(request, context))

        return {
            "ServerReadyRequest": server_ready,
            "ModelReadyRequest": model_ready,
            "ServerMetadataRequest": server_metadata,
            "ModelMetadataRequest": model_metadata,
            "ModelConfigRequest": model_config,
            "RepositoryIndexRequest": index,
            "ModelInferRequest": infer,
        }

    async def _known(self, name: str, context: Any) -> Mapping[str, Any]:
        if name not in self._models:
            details = f"Request for unknown model: '{name}' is not found"
            await context.abort(StatusCode.NOT_FOUND, details)
        return self._models[name]

    def _note(self, request: Any, context: Any) -> None:
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata()))

    async def _stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        self.running += 1
        try:
            async for request in requests:
                self._note(request, context)
                async for answer in self._model(request, context):
                    yield answer
        finally:
            self.running -= 1


def text(value: str) -> bytes:
    return struct.pack("<I", len(value.encode())) + value.encode()


def response(request: Any, final: bool = False, **tensors: tuple[str, bytes]) -> Any:
    """One of a stream; each tensor as its datatype and its bytes, with one element."""
    answer = pb.ModelStreamInferResponse()
    made = answer.infer_response
    made.model_name, made.model_version, made.id = request.model_name, "1", request.id
    made.parameters["triton_final_response"].bool_param = final
    for name, (datatype, data) in tensors.items():
        made.outputs.add(name=name, datatype=datatype, shape=[1])
        made.raw_output_contents.append(data)
    return answer


class Said:
    """What a model says to one request: the new tokens are counted by vLLM's, all by the other."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.vllm = request.model_name == "vllm_model"
        self.count = 0

    def piece(self, said: str, reason: str = "None") -> Any:
        self.count += 1
        tensors = {
            "text_output": ("BYTES", text(said)),
            "num_input_tokens": ("UINT32", struct.pack("<I", 11)),
            "num_output_tokens": ("UINT32", struct.pack("<I", 1 if self.vllm else self.count)),
        }
        if self.vllm:
            tensors["finish_reason"] = ("BYTES", text(reason))
        return response(self.request, **tensors)


ABORTS = {
    Scenario.BUSY: (StatusCode.UNAVAILABLE, "Exceeds maximum queue size"),
    Scenario.BROKEN: (StatusCode.INTERNAL, "failed to allocate"),
    Scenario.REFUSING: (StatusCode.INVALID_ARGUMENT, "max_tokens must be above 0"),
}


def model_in(scenario: Scenario, server: Callable[[], GrpcServer]) -> Model:
    async def model(request: Any, context: Any) -> AsyncIterator[Any]:
        said = Said(request)
        if scenario in ABORTS:
            await context.abort(*ABORTS[scenario])
        if scenario is Scenario.SILENT:
            await asyncio.Event().wait()
        if scenario is Scenario.GARBAGE:
            yield b"<html>It works!</html>"
        if scenario is Scenario.HEALTHY:
            for word in WORDS[:-1]:
                yield said.piece(word)
            yield said.piece(WORDS[-1], "stop")
            yield response(request, final=True)
            return
        for word in WORDS[:2]:
            yield said.piece(word)
            await asyncio.sleep(0.005)
        while scenario is Scenario.ENDLESS:
            yield said.piece(" on")
            await asyncio.sleep(0.005)
        if scenario is Scenario.FAILING:
            await context.abort(StatusCode.INTERNAL, "the engine has died")
        if scenario is Scenario.CUT:
            await server().read.wait()  # gRPC drops what has not been read when a connection breaks
            server().read.clear()
            server().wires.cut()
            await asyncio.Event().wait()

    return model
