"""Adapter ``triton``: NVIDIA's Triton Inference Server by HTTP (tried with 2.51).

Each backend is one model. LLMs (TensorRT-LLM's ensemble, vLLM's backend) are asked by
`generate_stream` alone: Triton does not notice that the client of a plain `generate` has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import cached_property
from typing import Literal
from urllib.parse import quote

from msgspec import Struct

from forebay.api import (
    AdapterContext,
    AdapterKind,
    Attempt,
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendRefused,
    Capabilities,
    Embeddings,
    EmbedRequest,
    Endpoint,
    Event,
    Finished,
    GenerateRequest,
    HttpBackendSettings,
    Inference,
    InferRequest,
    Load,
    Operation,
    Result,
    Started,
    Unsupported,
    Upstream,
    UpstreamResponse,
    hookimpl,
)
from forebay_plugins import kserve
from forebay_plugins.chat_templates import ChatTemplate, chat_template
from forebay_plugins.http_server import HttpServer
from forebay_plugins.kserve import Model
from forebay_plugins.prometheus_text import samples
from forebay_plugins.triton_answer import Choice, Tally
from forebay_plugins.triton_llm import Asked, Ensemble, Layout, VllmBackend

__all__ = ["TritonAdapter", "TritonSettings"]

#: ``max_tokens`` of /v1/completions where none is given, by OpenAI's documentation.
COMPLETION_TOKENS = 16
#: Seconds after an answer's end in which the stream should end too, or the connection is dropped.
TRAILER = 0.25

Kind = Literal["auto", "tensorrtllm", "vllm", "embedding", "infer"]


class TritonSettings(HttpBackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: triton`; `model` names the model in Triton's repository."""

    kind: Kind = "auto"
    """What kind of model it is; `auto`: found out by its tensors."""
    chat_template: str = ""
    """Form of chat prompts, as Triton takes plain text: `plain`, `chatml`, `llama3`, `gemma`, or
    the path of a Jinja file. Empty: no chat."""
    max_tokens: int = 1024
    """Limit of chat answers whose client sets none; Triton has to be given one."""
    accumulates: bool = False
    """Each response holds the whole text so far (`accumulate_tokens` of `tensorrt_llm_bls`)."""
    max_context: int = 0
    """Tokens of prompt and answer together; 0: not known."""
    slots: int = 0
    """Requests it works on at once; 0: not known."""
    metrics_url: str = ""
    """Base URL of its metrics port, e.g. `http://127.0.0.1:8002`; empty: its load is not read."""
    engine: str = "tensorrt_llm"
    """The TensorRT-LLM model behind the ensemble, under whose name the load is reported."""


class Server(Struct):
    version: str = ""


class Listed(Struct):
    name: str
    state: str = ""


class TritonAdapter(HttpServer):
    """One model of one Triton server."""

    settings: TritonSettings

    def __init__(self, settings: TritonSettings, context: AdapterContext) -> None:
        super().__init__(settings, context)
        self._template: ChatTemplate | None = None
        self._model: Model | None = None
        self._path = f"/v2/models/{quote(settings.model, safe='')}"

    @cached_property
    def _metrics(self) -> Upstream:
        return self._context.connect(self.settings.metrics_url)

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
        return kserve.failure_of(status, headers, body)

    async def start(self) -> None:
        """
        :raises ConfigError: the chat template cannot be had.
        """
        if self.settings.chat_template:
            self._template = chat_template(self.settings.chat_template)

    async def probe(self) -> Capabilities:
        if not self.settings.model:
            raise BackendFailed("`model` must name the model in Triton's repository")
        for path in ("/v2/health/ready", f"{self._path}/ready"):
            status = await self.status("GET", path)
            if status == 400:
                raise BackendBusy("the backend or its model is not ready")
            if status != 200:
                raise BackendFailed(f"GET {path} of the backend: HTTP {status}; check `url`")
        self._model = await self._read_model()
        layout = _layout(self.settings, self._model)
        return Capabilities(
            endpoints=frozenset(self._endpoints(self._model, layout)),
            logprobs=layout is not None and layout.logprobs,
            schema=layout is not None and layout.schema,
            max_context=self.settings.max_context,
            slots=self.settings.slots,
            version=(await self.get_json("/v2", Server)).version,
            models=await self._ready_models(),
        )

    async def _read_model(self) -> Model:
        metadata = await self.get_json(self._path, kserve.Metadata)
        return Model.of(metadata, await self.get_json(f"{self._path}/config", kserve.Config))

    def _endpoints(self, model: Model, layout: Layout | None) -> Iterable[Endpoint]:
        if not model.decoupled:
            yield "infer"
        if layout is not None:
            yield "completions"
            if self._template is not None:
                yield "chat"
        elif _vectors(self.settings, model) is not None:
            yield "embeddings"

    async def _ready_models(self) -> tuple[str, ...]:
        """Those of the repository; servers may restrict its index."""
        try:
            listed = await self.post_json("/v2/repository/index", {}, list[Listed], Attempt())
        except (BackendRefused, BackendFailed):
            return (self.settings.model,)
        return tuple(dict.fromkeys(model.name for model in listed if model.state == "READY"))

    async def load(self) -> Load | None:
        """What TensorRT-LLM reports of its engine; of other models only the queue before them."""
        if not self.settings.metrics_url:
            return None
        response = await self._metrics.send("GET", "/metrics")
        try:
            await self._check(response, "")
            page = await response.read()
        finally:
            await response.aclose()
        requests, engine = "nv_trt_llm_request_metrics", self.settings.engine
        active = samples(page, requests, model=engine, request_type="active")
        waiting = samples(page, requests, model=engine, request_type="waiting")
        cache = "nv_trt_llm_kv_cache_block_metrics"
        kv = samples(page, cache, model=engine, kv_cache_block_type="fraction")
        if not waiting:
            pending = "nv_inference_pending_request_count"
            waiting = samples(page, pending, model=self.settings.model)
        return Load(
            running=int(sum(active)) if active else None,
            waiting=int(sum(waiting)) if waiting else None,
            kv_usage=sum(kv) / len(kv) if kv else None,
        )

    async def stream(
        self, request: GenerateRequest, attempt: Attempt
    ) -> AsyncGenerator[Event, None]:
        """In the typed lane. Several choices are generated one after the other."""
        self._model = self._model or await self._read_model()
        layout = _layout(self.settings, self._model)
        if layout is None:
            raise Unsupported("the backend's model generates no text")
        asked = [self._asked(request, index) for index in range(request.choices)]
        bodies = [layout.body(request, choice) for choice in asked]  # refused before any is sent
        tally = Tally()
        for index, body in enumerate(bodies):
            async with self._open("generate_stream", body, attempt) as response:
                if index == 0:
                    yield Started()
                choice = Choice(index, request, asked[index], layout, self.settings.accumulates)
                async with aclosing(kserve.responses(response)) as pieces:
                    async for piece in pieces:
                        for delta in choice.feed(layout.read(piece)):
                            yield delta
                        if choice.finished:
                            await _drain(pieces)
                            break
                    for delta in choice.end():
                        yield delta
                tally.add(choice, first=index % request.n == 0)
        yield Finished(tally.usage(), tally.timings(), model=self.settings.model)

    def _asked(self, request: GenerateRequest, index: int) -> Asked:
        """
        :raises BackendRefused: the prompt is not text, or the chat template does not take it.
        """
        sampling = request.sampling
        seed = sampling.seed
        if seed is not None:
            seed += index % request.n  # or all choices would be the same
        if request.endpoint == "completions":
            prompt = request.prompts[index // request.n]
            if not isinstance(prompt, str):
                raise BackendRefused("Triton's LLMs take no token ids", param="prompt")
            limit = sampling.max_tokens or COMPLETION_TOKENS
            return Asked(prompt, limit, sampling.stop, seed)
        if self._template is None:
            raise Unsupported("the backend has no `chat_template`")
        prompt = self._template.render(request.messages)
        limit = sampling.max_tokens or self.settings.max_tokens
        stop = tuple(dict.fromkeys((*sampling.stop, *self._template.stop)))
        return Asked(prompt, limit, stop, seed)

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        if isinstance(request, InferRequest):
            return await self._infer(request, attempt)
        if isinstance(request, EmbedRequest):
            return await self._embed(request, attempt)
        return await super().perform(request, attempt)

    async def _infer(self, request: InferRequest, attempt: Attempt) -> Inference:
        path = f"versions/{quote(request.version, safe='')}/infer" if request.version else "infer"
        async with self._open(path, request.body, attempt, request.headers) as response:
            headers = {
                name: value
                for name, value in response.headers.items()
                if name in ("content-encoding", "inference-header-content-length")
            }
            content_type = response.headers.get("content-type", "application/json")
            body = await response.read()
            return Inference(body, content_type, headers, model=self.settings.model)

    async def _embed(self, request: EmbedRequest, attempt: Attempt) -> Embeddings:
        self._model = self._model or await self._read_model()
        tensors = _vectors(self.settings, self._model)
        if tensors is None:
            raise Unsupported("the backend's model gives no embeddings")
        refused = ["dimensions"] if request.dimensions is not None else list(request.extra)
        if refused:
            raise BackendRefused("a model behind Triton does not know this field", param=refused[0])
        texts = [text for text in request.inputs if isinstance(text, str)]
        if len(texts) < len(request.inputs):
            raise BackendRefused("a model behind Triton takes no token ids", param="input")
        found: list[tuple[float, ...]] = []
        for batch in kserve.batches(tensors[0], self._model, texts):
            body = kserve.question(*tensors, batch)
            async with self._open("infer", body, attempt) as response:
                found += kserve.vectors(await response.read(), len(batch))
        return Embeddings(tuple(found), model=self.settings.model)

    @asynccontextmanager
    async def _open(
        self, path: str, body: bytes, attempt: Attempt, headers: Mapping[str, str] = {}
    ) -> AsyncIterator[UpstreamResponse]:
        """A 200 of this model.

        :raises BackendError: it is none, or of another kind than asked for.
        """
        response = await self.post(f"{self._path}/{path}", body, attempt, headers)
        try:
            streams = path == "generate_stream"
            await self._check(response, "text/event-stream" if streams else "application/")
            yield response
        finally:
            await response.aclose()

    async def aclose(self) -> None:
        await super().aclose()
        if "_metrics" in self.__dict__:
            await self._metrics.aclose()


def _layout(settings: TritonSettings, model: Model) -> Layout | None:
    """How to ask the model for text; None if it gives none.

    :raises BackendFailed: it lacks the tensors of the configured kind.
    """
    kinds: dict[Kind, type[Layout]] = {"tensorrtllm": Ensemble, "vllm": VllmBackend}
    for kind, layout in kinds.items():
        known = layout.known_by <= model.inputs.keys() and "text_output" in model.outputs
        if settings.kind == kind and not known:
            raise BackendFailed(
                f"`kind: {kind}`: the model must have {sorted(layout.known_by)} and text_output, "
                f"but has {sorted(model.inputs)} and {sorted(model.outputs)}"
            )
        if settings.kind in ("auto", kind) and known:
            return layout(model)
    return None


def _vectors(settings: TritonSettings, model: Model) -> tuple[kserve.Tensor, kserve.Tensor] | None:
    """The tensors of an embedding model; None if it is none.

    :raises BackendFailed: it was configured to be one.
    """
    if settings.kind not in ("auto", "embedding"):
        return None
    if settings.kind == "embedding" and model.embeds is None:
        raise BackendFailed(
            "`kind: embedding`: the model must have one input, of type BYTES, and an output of "
            f"type FP32 or FP64, but has {sorted(model.inputs)} and {sorted(model.outputs)}"
        )
    return model.embeds


async def _drain(pieces: AsyncIterator[object]) -> None:
    """Read to the stream's end, without which the connection could not be used again."""
    try:
        async with asyncio.timeout(TRAILER):
            async for _ in pieces:
                pass
    except (TimeoutError, BackendError):
        return  # the answer is complete all the same; closing the connection stops the model


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [
        AdapterKind(
            name="triton",
            settings=TritonSettings,
            build=TritonAdapter,
            summary="Triton Inference Server: TensorRT-LLM, vLLM, embeddings, any model's infer.",
            provider="triton",
        )
    ]
