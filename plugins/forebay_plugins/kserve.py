"""KServe v2 as Triton speaks it: models, errors, and vectors out of tensors.

Read in triton-inference-server/server `src/http_server.cc` and tried with Triton 2.51.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from forebay.api import (
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    Inference,
    StreamTruncated,
    UpstreamResponse,
)
from forebay_plugins.kserve_tensors import unpack
from forebay_plugins.openai_errors import error_of
from forebay_plugins.sse import MAX_EVENT

__all__ = [
    "JSON_LENGTH",
    "Config",
    "Metadata",
    "Model",
    "Tensor",
    "batches",
    "failure_of",
    "is_unready",
    "question",
    "refusal_of",
    "release_of",
    "responses",
    "vectors",
]

#: The header with the bytes of JSON in a body that has tensors in binary behind it.
JSON_LENGTH = "inference-header-content-length"


class Tensor(Struct, frozen=True):
    name: str
    datatype: str
    #: With the batch's dimension, if the model has one; -1: any size.
    shape: tuple[int, ...]


class Metadata(Struct, frozen=True):
    """`GET /v2/models/{model}`."""

    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()


class TransactionPolicy(Struct, frozen=True):
    decoupled: bool = False


class Config(Struct, frozen=True):
    """What is read of `GET /v2/models/{model}/config`."""

    max_batch_size: int = 0
    model_transaction_policy: TransactionPolicy = TransactionPolicy()


class Model(Struct, frozen=True):
    """What a model takes and gives."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    #: It may give any number of responses to a request, so plain `infer` refuses it.
    decoupled: bool = False
    max_batch_size: int = 0

    @classmethod
    def of(cls, metadata: Metadata, config: Config) -> Model:
        return cls(
            inputs={tensor.name: tensor for tensor in metadata.inputs},
            outputs={tensor.name: tensor for tensor in metadata.outputs},
            decoupled=config.model_transaction_policy.decoupled,
            max_batch_size=config.max_batch_size,
        )

    @property
    def embeds(self) -> tuple[Tensor, Tensor] | None:
        """The one text it takes and the numbers it gives; None if it is no such model."""
        numbers = [one for one in self.outputs.values() if one.datatype in ("FP32", "FP64")]
        if len(self.inputs) != 1 or not numbers or self.decoupled:
            return None
        (text,) = self.inputs.values()
        return (text, numbers[0]) if text.datatype == "BYTES" else None


def failure_of(status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
    """The error that an answer with this status is.

    Triton says 400 where it is not ready, and 404 for a model that is not loaded just now. On
    `generate_stream` a model's own refusal is an event of a stream whose status is not 200.
    """
    body = body.strip().removeprefix(b"data: ")
    if status in (400, 404) and is_unready(body.decode(errors="replace")):
        return BackendBusy("the backend's model is not ready")
    error = error_of(status, headers, body)
    if status == 501:  # a kind of request that this model does not take, now or later
        return BackendRefused(error.message)
    return error


def release_of(version: str) -> tuple[int, int]:
    """Of Triton's version, e.g. `2.63.0`; (0, 0): it is none."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def is_unready(message: str) -> bool:
    """The server speaks of a model that is not loaded just now."""
    return "has no available versions" in message or "not ready" in message


def refusal_of(message: str) -> BackendError:
    """The error that this message is, where it comes without a status before any response."""
    if is_unready(message):
        return BackendBusy("the backend's model is not ready")
    if "maximum queue size" in message:
        return BackendBusy(message)
    if "unknown model" in message:
        return BackendFailed(f"the backend does not know the model: check `model` ({message})")
    return BackendRefused(message)


async def responses(response: UpstreamResponse) -> AsyncGenerator[dict[str, Any], None]:
    """The responses in a `generate_stream`; the stream's end is the end of the body.

    :raises BackendError: one is an error, or the stream breaks off.
    """
    rest = b""
    async for chunk in response.chunks():
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            yield _response(event)
        if len(rest) > MAX_EVENT:
            raise BackendGarbage(f"an event of the backend is longer than {MAX_EVENT} bytes")
    if rest.strip():
        raise StreamTruncated("the backend's stream ended within an event")


def _response(event: bytes) -> dict[str, Any]:
    try:
        content = msgspec.json.decode(event.strip().removeprefix(b"data:"))
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BackendGarbage("an event of the backend is not JSON") from None
    if not isinstance(content, dict):
        raise BackendGarbage("an event of the backend is not a JSON object")
    if "error" in content:
        raise error_of(500, {}, event.strip().removeprefix(b"data:"))
    return content


def batches(text: Tensor, model: Model, texts: Sequence[str]) -> list[list[str]]:
    """The texts as the model takes them at once: as many as it says, or one by one."""
    size = (model.max_batch_size or len(texts)) if text.shape[0] == -1 else 1
    return [list(texts[at : at + size]) for at in range(0, len(texts), size)]


def question(text: Tensor, output: Tensor, batch: Sequence[str]) -> bytes:
    """The body of `infer` for a batch; the vectors in binary, which takes a tenth of the time."""
    shape = [len(batch)] + [1] * (len(text.shape) - 1)
    tensor = {"name": text.name, "shape": shape, "datatype": "BYTES", "data": batch}
    wanted = {"name": output.name, "parameters": {"binary_data": True}}
    return msgspec.json.encode({"inputs": [tensor], "outputs": [wanted]})


class Numbers(Struct):
    name: str
    datatype: str
    shape: list[int]


class Answer(Struct):
    outputs: list[Numbers]


def vectors(answer: Inference, count: int) -> list[tuple[float, ...]]:
    """The vectors of a batch of ``count`` texts.

    :raises BackendGarbage: there is not one vector for each.
    """
    try:
        length = int(answer.headers[JSON_LENGTH])
        (numbers,) = msgspec.json.decode(answer.body[:length], type=Answer).outputs
        data: Sequence[Any] = unpack(numbers.datatype, answer.body[length:])
    except (msgspec.DecodeError, KeyError, ValueError) as wrong:
        raise BackendGarbage(f"the backend's answer holds no vectors: {wrong!r}") from None
    size, rest = divmod(len(data), count)
    if rest or not size or numbers.shape[-1] != size:
        raise BackendGarbage(
            f"the backend sent a tensor of shape {numbers.shape} for {count} texts: "
            "there must be one vector for each"
        )
    return [tuple(data[at : at + size]) for at in range(0, len(data), size)]
