"""The native engine as a backend: our own process on this machine, reached over a Unix socket."""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Literal

from forebay.api import (
    Adapter,
    AdapterContext,
    AdapterKind,
    Attempt,
    BackendBusy,
    BackendFailed,
    BackendLacks,
    BackendRefused,
    BackendSettings,
    BackendTimeout,
    Capabilities,
    ConfigError,
    ConnectFailed,
    Delta,
    DetokenizeRequest,
    Embeddings,
    EmbedRequest,
    Endpoint,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    Load,
    Operation,
    PromptLogprob,
    Result,
    Started,
    StreamTruncated,
    Text,
    Timings,
    TokenizeRequest,
    TokenLogprob,
    Tokens,
    Usage,
    hookimpl,
)
from forebay_engine.client import (
    ENGINE_COMMAND,
    Accepted,
    DeadlinePassed,
    Detokenize,
    Done,
    Embed,
    EngineClient,
    EngineConfig,
    EngineDied,
    EngineError,
    EngineUnavailable,
    Output,
    RequestRefused,
    Status,
    Tokenize,
)
from forebay_plugins.native_echo import Echo
from forebay_plugins.native_guide import guide_of
from forebay_plugins.native_load import load_of
from forebay_plugins.native_request import (
    FIELDS,
    generate_command,
    message_fields,
    prompt_logprobs,
    unsupported,
)
from forebay_plugins.openai_errors import code_of


class NativeSettings(BackendSettings, kw_only=True, frozen=True):
    """A model on the native engine."""

    path: str
    """Model folder, GGUF file, or the name of a model that `forebay model pull` fetched."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is computed; `auto`: on a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and KV cache; `auto`: as stored. `float16` is for GPUs."""
    quantization: Literal["none", "int8", "int4", "fp8"] = "none"
    """Round the weights to 8 or 4 bits while loading; those of a quantised checkpoint stay;
    `fp8` is for GPUs, a CPU widens it again."""
    model_impl: Literal["auto", "native", "transformers"] = "auto"
    """Whose class computes the layers; `auto`: the engine's own, where it has one."""
    kv_cache_bytes: int = 0
    """Memory of the KV cache in bytes; 0: 512 MiB, on a GPU what `gpu_memory_share` leaves."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Type of the KV cache; `auto`: that of the weights; `fp8`: half the bytes of bfloat16."""
    gpu_memory_share: float = 0.9
    """Of a GPU's memory, how much the engine may take in all if it chooses the KV cache's size."""
    block_size: int = 32
    """Tokens in a page of the KV cache."""
    max_step_tokens: int = 512
    """Most tokens in one step, prompt chunks and decodes together."""
    max_sequences: int = 64
    """Most sequences that are worked on at once."""
    max_model_len: int = 0
    """Longest prompt and answer together, in tokens; 0: what model and KV cache allow."""
    prefix_cache: bool = True
    """Reuse the cached pages of equal prefixes; only within a tenant."""
    pooling: Literal["auto", "none", "last", "mean"] = "auto"
    """Embeddings from the last hidden state or their mean; `auto`: as the model's folder says."""
    watermark: str = ""
    """Mark every answer so that who has the key can tell it: `kgw` or `gumbel`, with parameters if
    others than the usual are wanted (`kgw gamma=0.5 delta=1`); empty: only where a request asks."""
    watermark_key_file: str = ""
    """File with the watermark's key; empty: `FOREBAY_WATERMARK_KEY` in the environment, if any."""
    threads: int = 0
    """Compute threads; 0: the engine measures and chooses."""
    speculation: str = "none"
    """Where guesses of the next tokens come from. `ngram`: what followed the last tokens where they
    occurred before; else a draft model with the same vocabulary, by folder or name as in `path`.
    Guesses change how fast an answer comes, not what it says."""
    speculation_tokens: int = 8
    """Most guesses verified in a step for each sequence."""
    exports_traces: bool = True
    """The engine exports spans of its own; false: none, they are synthesised from its timings."""


class NativeAdapter(Adapter):
    """Starts the engine with the gateway and speaks the typed lane."""

    def __init__(
        self,
        settings: NativeSettings,
        context: AdapterContext,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._settings = settings
        self._context = context
        self._command = command
        self._client: EngineClient | None = None

    async def start(self) -> None:
        """:raises ConfigError: there is no such model folder."""
        if self._client is None:
            self._client = EngineClient(
                self._config(), environment=self._environment(), command=self._command
            )
            await self._client.start()

    async def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncGenerator[Event]:
        command = generate_command(request, attempt)
        echo = Echo(request, prompt_logprobs(request)) if request.echo else None
        started = False
        try:
            async with aclosing(self._engine().generate(command)) as events:
                async for event in events:
                    started = True
                    found = _event(event, Path(self._settings.path).name)
                    for one in echo.pieces(event, found) if echo is not None else (found,):
                        yield one
        except RequestRefused as error:
            raise _refusal(error, request) from error
        except DeadlinePassed as error:
            raise BackendTimeout("total", attempt.timeouts.total) from error
        except EngineDied as error:
            if started:
                raise StreamTruncated(error.message) from error
            raise ConnectFailed(error.message) from error
        except EngineUnavailable as error:
            raise _unavailable(error) from error
        except EngineError as error:
            raise BackendFailed(error.message) from error

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        for name in request.extra:
            raise unsupported(f"the field {name!r}", name)
        try:
            match request:
                case EmbedRequest():
                    return await self._embed(request)
                case TokenizeRequest():
                    return await self._tokenize(request)
                case DetokenizeRequest():
                    command = Detokenize(token_ids=list(request.tokens))
                    return Text((await self._engine().detokenize(command)).text)
        except RequestRefused as error:
            raise BackendRefused(error.message, param=error.param) from error
        except EngineUnavailable as error:
            raise _unavailable(error) from error
        except EngineDied as error:
            raise ConnectFailed(error.message) from error
        except EngineError as error:
            raise BackendFailed(error.message) from error
        return await super().perform(request, attempt)

    async def _embed(self, request: EmbedRequest) -> Embeddings:
        command = Embed(
            inputs=[text if isinstance(text, str) else list(text) for text in request.inputs],
            salt=request.identity.tenant,
        )
        found = await self._engine().embed(command)
        vectors = tuple(struct.unpack(f"<{len(v) // 4}f", v) for v in found.vectors)
        size = len(vectors[0])
        if request.dimensions not in (None, size):
            raise unsupported(
                f"dimensions of {request.dimensions}: the vectors have {size}", "dimensions"
            )
        model = Path(self._settings.path).name
        return Embeddings(vectors, Usage(found.prompt_tokens, 0, 0), model)

    async def _tokenize(self, request: TokenizeRequest) -> Tokens:
        command = Tokenize(
            text=request.text or "",
            messages=None
            if request.text is not None
            else [message_fields(m) for m in request.chat],
            special=request.add_special_tokens,
            texts=request.with_texts,
        )
        found = await self._engine().tokenize(command)
        texts = None if found.texts is None else tuple(found.texts)
        return Tokens(tuple(found.token_ids), texts, found.max_model_len)

    async def probe(self) -> Capabilities:
        status = await self._status()
        if status.state == "loading":
            share = f"{100 * status.loaded:.0f} % of its weights are read"
            raise BackendBusy(
                f"the model is being loaded: {share}", code="loading", retry_after=1.0
            )
        return Capabilities(
            endpoints=_endpoints(status),
            schema=True,
            logprobs=True,
            scoring=True,
            extra_fields=False,
            fields=FIELDS,
            max_context=status.max_model_len,
            slots=status.max_sequences,
            version=status.version,
            models=(Path(self._settings.path).name,),
        )

    async def load(self) -> Load | None:
        return load_of(await self._status())

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _status(self) -> Status:
        try:
            return await self._engine().status()
        except EngineUnavailable as error:
            raise _unavailable(error) from error
        except EngineError as error:
            raise ConnectFailed(error.message) from error

    def _environment(self) -> Mapping[str, str]:
        given = self._context.environment
        if self._settings.exports_traces:
            return given
        return {name: value for name, value in given.items() if not name.startswith("OTEL_")}

    def _engine(self) -> EngineClient:
        if self._client is None:
            raise EngineUnavailable("the engine is not running")
        return self._client

    def _config(self) -> EngineConfig:
        settings = self._settings
        return EngineConfig(
            model=self._folder("path", settings.path),
            device=settings.device,
            dtype=settings.dtype,
            quantization=settings.quantization,
            model_impl=settings.model_impl,
            block_size=settings.block_size,
            kv_cache_bytes=settings.kv_cache_bytes,
            kv_cache_dtype=settings.kv_cache_dtype,
            gpu_memory_share=settings.gpu_memory_share,
            max_step_tokens=settings.max_step_tokens,
            max_sequences=settings.max_sequences,
            max_model_len=settings.max_model_len,
            prefix_cache=settings.prefix_cache,
            pooling=settings.pooling,
            watermark=settings.watermark,
            watermark_key_file=settings.watermark_key_file,
            threads=settings.threads,
            speculation=(
                settings.speculation
                if settings.speculation in ("none", "ngram")
                else self._folder("speculation", settings.speculation)
            ),
            speculation_tokens=settings.speculation_tokens,
        )

    def _folder(self, setting: str, name: str) -> str:
        """Of a model that is given by its folder, its GGUF file or its name."""
        path = Path(name).expanduser()
        pulled = self._context.data_dir.expanduser() / "models" / name
        for found in (path, pulled):
            if (found / "config.json").is_file() or _gguf(found):
                return str(found.absolute())
        raise ConfigError(
            f"backends.{self._context.name}.{setting}: no model at {path} nor at {pulled}; "
            f"fetch it with `forebay model pull {path.name}`"
        )


def _gguf(path: Path) -> bool:
    return path.is_file() if path.suffix == ".gguf" else any(path.glob("*.gguf"))


def _endpoints(status: Status) -> frozenset[Endpoint]:
    found: set[Endpoint] = {"tokenize", "detokenize"}
    if status.generates:
        found |= {"chat", "completions"}
    if status.embeds:
        found.add("embeddings")
    return frozenset(found)


def _event(event: Accepted | Output | Done, model: str) -> Event:
    match event:
        case Accepted():
            return Started()
        case Output():
            return _delta(event)
        case Done():
            return Finished(
                Usage(event.prompt_tokens, event.completion_tokens, event.cached_tokens),
                Timings(event.queue, event.prefill, event.decode, "forebay_engine"),
                model=model,
            )


def _delta(output: Output) -> Delta:
    reason: FinishReason | None = None
    if output.finish_reason is not None:
        reason = "length" if output.finish_reason == "length" else "stop"
    return Delta(
        index=output.index,
        text=output.text,
        finish_reason=reason,
        token_ids=tuple(output.token_ids),
        logprobs=tuple(
            TokenLogprob(item.token, item.logprob, tuple(item.top)) for item in output.logprobs
        ),
        prompt_logprobs=tuple(
            tuple(PromptLogprob(t.token_id, t.token, t.logprob, t.rank) for t in place)
            for place in output.prompt_logprobs
        ),
    )


def _refusal(error: RequestRefused, request: GenerateRequest) -> BackendRefused:
    """The error, with the field by the name under which this client sent it."""
    param = error.param
    guide = guide_of(request) if param == "guide" else None
    if guide is not None:
        # What our grammars can't express, another backend's may.
        return BackendLacks(error.message, param=guide[0])
    if param == "max_tokens" and "max_completion_tokens" in request.fields:
        param = "max_completion_tokens"
    return BackendRefused(error.message, param=param, code=code_of(error.message))


def _unavailable(error: EngineUnavailable) -> BackendBusy | ConnectFailed:
    if error.loading:
        return BackendBusy(error.message, code="loading", retry_after=1.0)
    return ConnectFailed(error.message)


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [
        AdapterKind(
            name="native",
            settings=NativeSettings,
            build=NativeAdapter,
            summary="Forebay's own engine, in a process of its own on this machine",
            provider="forebay",
        )
    ]
