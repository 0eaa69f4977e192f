"""One model of a Triton server by gRPC; each answer of a generator on a stream of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import cached_property
from typing import Any

import msgspec
from msgspec import Raw

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    HttpBackendSettings,
    Inference,
    InferRequest,
)
from forebay_plugins.kserve import Model, Tensor, release_of
from forebay_plugins.kserve_grpc import KServeChannel
from forebay_plugins.kserve_infer import inference, message, set_parameter
from forebay_plugins.kserve_proto import MESSAGES
from forebay_plugins.kserve_tensors import flat, pack, unpack
from forebay_plugins.triton_wire import Wire

__all__ = ["GrpcWire"]


#: The server's first version (26.04) in which errors of a stream may be asked for as statuses:
#: before, it dies of a model that ends a stream some time after its error.
_STATUSES = (2, 68)


class GrpcWire(Wire):
    def __init__(self, settings: HttpBackendSettings) -> None:
        self._settings = settings
        self._version = ""

    @cached_property
    def _channel(self) -> KServeChannel:
        headers = {name.lower(): value for name, value in self._settings.headers.items()}
        if self._settings.api_key:
            headers["authorization"] = f"Bearer {self._settings.api_key}"
        return KServeChannel(self._settings.url, headers)

    async def _probe(self, method: str, **fields: object) -> Any:
        request, seconds = MESSAGES[f"{method}Request"](**fields), self._settings.probe_timeout
        return await self._channel.ask(method, request, connect_timeout=seconds, timeout=seconds)

    async def check_ready(self) -> None:
        server = await self._probe("ServerReady")
        model = await self._probe("ModelReady", name=self._settings.model)
        if not server.ready or not model.ready:
            raise BackendBusy("the backend or its model is not ready")

    async def version(self) -> str:
        self._version = str((await self._probe("ServerMetadata")).version)
        return self._version

    async def model(self) -> Model:
        metadata = await self._probe("ModelMetadata", name=self._settings.model)
        config = (await self._probe("ModelConfig", name=self._settings.model)).config
        return Model(
            inputs=_tensors(metadata.inputs),
            outputs=_tensors(metadata.outputs),
            decoupled=config.model_transaction_policy.decoupled,
            max_batch_size=config.max_batch_size,
        )

    async def ready_models(self) -> tuple[str, ...]:
        try:
            listed = (await self._probe("RepositoryIndex")).models
        except (BackendRefused, BackendFailed):
            return (self._settings.model,)
        return tuple(dict.fromkeys(model.name for model in listed if model.state == "READY"))

    async def generate(
        self, model: Model, inputs: Mapping[str, object], attempt: Attempt
    ) -> AsyncGenerator[dict[str, Any], None]:
        request = MESSAGES["ModelInferRequest"](model_name=self._settings.model)
        set_parameter(request, "triton_enable_empty_final_response", True)
        for name, value in inputs.items():
            tensor = model.inputs[name]
            values = list(flat(msgspec.json.decode(value) if isinstance(value, Raw) else value))
            try:
                request.raw_input_contents.append(pack(tensor.datatype, values))
            except ValueError as wrong:
                raise BackendRefused(str(wrong), param=name) from None
            shape = [1] * (model.max_batch_size > 0) + [len(values)]
            request.inputs.add(name=name, datatype=tensor.datatype, shape=shape)
        answers = self._channel.responses(
            request,
            headers=attempt.headers,
            connect_timeout=attempt.timeouts.connect,
            timeout=attempt.timeouts.total,
            statuses=release_of(self._version or await self.version()) >= _STATUSES,
        )
        async with aclosing(answers):
            async for answer in answers:
                if answer.outputs:  # the final response may be empty
                    yield _named(answer)

    async def infer(self, request: InferRequest, attempt: Attempt) -> Inference:
        asked, binary = message(request, self._settings.model)
        answer = await self._channel.ask(
            "ModelInfer",
            asked,
            headers=attempt.headers,
            connect_timeout=attempt.timeouts.connect,
            timeout=attempt.timeouts.total,
        )
        found = inference(answer, binary)
        return msgspec.structs.replace(found, model=self._settings.model)

    async def aclose(self) -> None:
        if "_channel" in self.__dict__:
            await self._channel.aclose()


def _tensors(listed: Any) -> dict[str, Tensor]:
    return {one.name: Tensor(one.name, one.datatype, tuple(one.shape)) for one in listed}


def _named(answer: Any) -> dict[str, Any]:
    """As `generate_stream` has it.

    :raises BackendGarbage: its tensors are not what it says of them.
    """
    found: dict[str, Any] = {}
    try:
        pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
        for output, content in pairs:
            values = unpack(output.datatype, content)
            found[output.name] = values[0] if len(values) == 1 else values
    except ValueError as wrong:
        raise BackendGarbage(f"the backend's response cannot be read: {wrong}") from None
    return found
