"""KServe v2 over gRPC: one channel to a server, its calls, and what a call's end means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode
from grpc.aio import EOF, AioRpcError, Channel, UsageError

from forebay.api import (
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    BackendTimeout,
    ConnectFailed,
    StreamTruncated,
)
from forebay_plugins.kserve import is_unready, refusal_of
from forebay_plugins.kserve_proto import MESSAGES, SERVICE

__all__ = ["KServeChannel"]

#: Bytes of the longest message that is taken; as of an HTTP body.
_LONGEST = 64 << 20
_OPTIONS = [
    ("grpc.max_receive_message_length", _LONGEST),
    ("grpc.max_send_message_length", -1),
    # A server that is back must be found by the next probe; gRPC would wait up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Finds connections that are silently gone. Triton ends those that are pinged more often than
    # every 300 s where no data flow.
    ("grpc.keepalive_time_ms", 301_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]
#: Seconds in which a stream should end after its final response.
_TRAILER = 0.25
_REFUSED = {StatusCode.INVALID_ARGUMENT, StatusCode.UNIMPLEMENTED, StatusCode.ALREADY_EXISTS}
_KEY = {StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED}


class KServeChannel:
    """Connections to the gRPC port of one server. Made and used in one event loop.

    ``headers`` go with every call; names in lower case.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        port = parts.port or (443 if parts.scheme == "https" else 80)
        self._target = f"{host}:{port}"
        self._headers = headers
        if parts.scheme == "https":
            credentials = grpc.ssl_channel_credentials()
            self._channel: Channel = grpc.aio.secure_channel(
                self._target, credentials, options=_OPTIONS
            )
        else:
            self._channel = grpc.aio.insecure_channel(self._target, options=_OPTIONS)

    async def connect(self, seconds: float) -> None:
        """
        :raises ConnectFailed: there is no connection within this time.
        """
        try:
            async with asyncio.timeout(seconds):
                state = self._channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise ConnectFailed(f"no gRPC connection to {self._target}")
                    await self._channel.wait_for_state_change(state)
                    state = self._channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise ConnectFailed(
                f"no gRPC connection to {self._target} within {seconds:g} s"
            ) from None

    async def ask(
        self,
        method: str,
        request: Any,
        *,
        headers: Mapping[str, str] = {},
        connect_timeout: float,
        timeout: float,
    ) -> Any:
        """The answer to one request; ``timeout`` 0: no deadline.

        :raises BackendError: there is none.
        """
        await self.connect(connect_timeout)
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")(
            request.SerializeToString(),
            metadata=self._metadata(headers),
            timeout=timeout or None,
        )
        try:
            answer = await call
        except AioRpcError as error:
            raise self._status(error.code(), error.details(), timeout) from None
        finally:
            call.cancel()
        return _decoded(f"{method}Response", answer)

    async def responses(
        self,
        request: Any,
        *,
        headers: Mapping[str, str],
        connect_timeout: float,
        timeout: float,
        statuses: bool,
    ) -> AsyncGenerator[Any, None]:
        """The `ModelInferResponse`s to one request, on a stream of its own, up to the final one.

        ``statuses``: errors are to end the stream with a status, instead of standing in it.
        Closing the generator cancels the request at the server.

        :raises BackendError: an error comes instead, or the stream ends without the final one.
        """
        await self.connect(connect_timeout)
        metadata = self._metadata(headers)
        if statuses:
            metadata += (("triton_grpc_error", "true"),)
        call = self._channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(
            metadata=metadata, timeout=timeout or None
        )
        begun = False
        try:
            await call.write(request.SerializeToString())
            await call.done_writing()
            while (data := await call.read()) is not EOF:
                said = _decoded("ModelStreamInferResponse", data)
                if said.error_message:
                    raise _failure_in(said.error_message, begun)
                begun = True
                yield said.infer_response
                if said.infer_response.parameters["triton_final_response"].bool_param:
                    await _end(call)
                    return
            code = await call.code()
            if code is StatusCode.OK:
                raise StreamTruncated("the backend's stream ended before its final response")
            raise self._status(code, await call.details(), timeout, begun)
        except AioRpcError as error:
            raise self._status(error.code(), error.details(), timeout, begun) from None
        except (UsageError, asyncio.InvalidStateError):  # the call was over before all was written
            raise self._status(await call.code(), await call.details(), timeout) from None
        finally:
            call.cancel()

    def _metadata(self, headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        return tuple({**headers, **self._headers}.items())

    def _status(
        self, code: StatusCode, details: str | None, timeout: float, begun: bool = False
    ) -> BackendError:
        """The error that a call's end is; ``begun``: it had brought a response."""
        said = details or f"the backend ended the call with {code.name}"
        if "protocol is restricted" in said:  # to those with a header; it comes as UNAVAILABLE
            return BackendFailed(f"the backend refuses the gateway: check `headers` ({said})")
        if code is StatusCode.UNAVAILABLE:
            # The server's word, or gRPC's own for a connection that broke.
            if begun or self._channel.get_state() is not grpc.ChannelConnectivity.READY:
                return StreamTruncated(f"the connection to the backend broke: {said}")
            return BackendBusy(said)
        if is_unready(said):
            return BackendBusy("the backend's model is not ready")
        if code is StatusCode.DEADLINE_EXCEEDED:
            return BackendTimeout("total", timeout)
        if code in _REFUSED:
            return BackendRefused(said)
        if code in _KEY:
            return BackendFailed(f"the backend refuses the gateway's key: check `api_key` ({said})")
        if code is StatusCode.NOT_FOUND:
            return BackendFailed(f"the backend does not know the model: check `model` ({said})")
        return BackendFailed(said)

    async def aclose(self) -> None:
        await self._channel.close()


async def _end(call: Any) -> None:
    """Let a complete stream end by itself: to the server a cancellation would look like one that
    comes too late."""
    with suppress(TimeoutError, AioRpcError):
        async with asyncio.timeout(_TRAILER):
            while await call.read() is not EOF:
                pass


def _failure_in(message: str, begun: bool) -> BackendError:
    """Within a stream: before the first response it is of what is wrong with the request."""
    return BackendFailed(message) if begun else refusal_of(message)


def _decoded(kind: str, data: bytes) -> Any:
    try:
        return MESSAGES[kind].FromString(data)
    except DecodeError:
        raise BackendGarbage(f"the backend's answer is no {kind}") from None
