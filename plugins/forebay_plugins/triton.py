"""Adapter ``triton``: NVIDIA's Triton Inference Server by HTTP or gRPC (tried with 2.51).

Each backend is one model: an LLM (TensorRT-LLM's ensemble, BLS and LLM API, vLLM's backend), an
embedding model, or any other for `infer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from functools import cached_property
from typing import Any, Literal

from forebay.api import (
    Adapter,
    AdapterContext,
    AdapterKind,
    Attempt,
    BackendError,
    BackendFailed,
    BackendRefused,
    Capabilities,
    ConfigError,
    Delta,
    Embeddings,
    EmbedRequest,
    Endpoint,
    Event,
    Finished,
    GenerateRequest,
    HttpBackendSettings,
    InferRequest,
    Load,
    Operation,
    Result,
    Started,
    Unsupported,
    hookimpl,
)
from forebay_plugins import kserve
from forebay_plugins.chat_templates import ChatTemplate, chat_template
from forebay_plugins.http_server import HttpClient
from forebay_plugins.interleave import interleave
from forebay_plugins.kserve import Model
from forebay_plugins.prometheus_text import samples
from forebay_plugins.triton_answer import Choice, Tally
from forebay_plugins.triton_llm import Asked, Layout
from forebay_plugins.triton_openai import TritonOpenAIAdapter, TritonOpenAISettings
from forebay_plugins.triton_trtllm import Ensemble, LlmApi
from forebay_plugins.triton_vllm import VllmBackend
from forebay_plugins.triton_wire import HttpWire, Wire

__all__ = ["TritonAdapter", "TritonSettings"]

#: ``max_tokens`` of /v1/completions where none is given, by OpenAI's documentation.
COMPLETION_TOKENS = 16
#: Seconds after an answer's end in which the stream should end too, or the connection is dropped.
TRAILER = 0.25

#: Choices of one answer that are generated at the same time.
AT_ONCE = 8

Kind = Literal["auto", "tensorrtllm", "vllm", "embedding", "infer"]


class TritonSettings(HttpBackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: triton`; `model` names the model in Triton's repository."""

    protocol: Literal["http", "grpc"] = "http"
    """What is spoken at `url`; `grpc` (port 8001) needs `pip install forebay[triton-grpc]`."""
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


class TritonAdapter(Adapter):
    """One model of one Triton server."""

    def __init__(self, settings: TritonSettings, context: AdapterContext) -> None:
        """
        :raises ConfigError: what gRPC needs is not installed.
        """
        self.settings = settings
        self._context = context
        self._wire = _wire(settings, context)
        self._template: ChatTemplate | None = None
        self._model: Model | None = None
        self._version = ""

    @cached_property
    def _metrics(self) -> HttpClient:
        url = self.settings.metrics_url
        return HttpClient(HttpBackendSettings(adapter="triton", url=url), self._context)

    async def start(self) -> None:
        """
        :raises ConfigError: the chat template cannot be had.
        """
        if self.settings.chat_template:
            self._template = chat_template(self.settings.chat_template)

    async def probe(self) -> Capabilities:
        if not self.settings.model:
            raise BackendFailed("`model` must name the model in Triton's repository")
        await self._wire.check_ready()
        self._version = await self._wire.version()
        self._model = await self._wire.model()
        layout = self._layout(self._model)
        return Capabilities(
            endpoints=frozenset(self._endpoints(self._model, layout)),
            logprobs=layout is not None and layout.logprobs,
            schema=layout is not None and layout.schema,
            max_context=self.settings.max_context,
            slots=self.settings.slots,
            version=self._version,
            models=await self._wire.ready_models(),
        )

    def _endpoints(self, model: Model, layout: Layout | None) -> Iterable[Endpoint]:
        if not model.decoupled:
            yield "infer"
        if layout is not None:
            yield "completions"
            if self._template is not None:
                yield "chat"
        elif _vectors(self.settings, model) is not None:
            yield "embeddings"

    async def load(self) -> Load | None:
        """What TensorRT-LLM reports of its engine; of other models only the queue before them."""
        if not self.settings.metrics_url:
            return None
        page = await self._metrics.get("/metrics")
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
        """In the typed lane; several choices are generated at the same time."""
        model = await self._known()
        layout = self._layout(model)
        if layout is None:
            raise Unsupported("the backend's model generates no text")
        all_asked = [self._asked(request, index) for index in range(request.choices)]
        inputs = [layout.inputs(request, asked) for asked in all_asked]  # before any is sent
        choices = [
            Choice(index, request, asked, layout, self.settings.accumulates)
            for index, asked in enumerate(all_asked)
        ]
        answers = [
            self._answer(layout, choice, self._wire.generate(model, given, attempt))
            for choice, given in zip(choices, inputs, strict=True)
        ]
        started = False
        async with aclosing(interleave(answers, AT_ONCE)) as deltas:
            async for delta in deltas:
                if not started:
                    yield Started()
                    started = True
                yield delta
        tally = Tally()
        for index, choice in enumerate(choices):
            tally.add(choice, first=index % request.n == 0)
        yield Finished(tally.usage(), tally.timings(), model=self.settings.model)

    async def _answer(
        self, layout: Layout, choice: Choice, responses: AsyncGenerator[dict[str, Any], None]
    ) -> AsyncGenerator[Delta, None]:
        async with aclosing(responses):
            async for response in responses:
                for delta in choice.feed(layout.read(response)):
                    yield delta
                if choice.finished:
                    await _drain(responses)
                    break
        for delta in choice.end():
            yield delta

    async def _known(self) -> Model:
        """The model, also before the first probe."""
        self._model = self._model or await self._wire.model()
        return self._model

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
            return await self._wire.infer(request, attempt)
        if isinstance(request, EmbedRequest):
            return await self._embed(request, attempt)
        return await super().perform(request, attempt)

    async def _embed(self, request: EmbedRequest, attempt: Attempt) -> Embeddings:
        model = await self._known()
        tensors = _vectors(self.settings, model)
        if tensors is None:
            raise Unsupported("the backend's model gives no embeddings")
        refused = ["dimensions"] if request.dimensions is not None else list(request.extra)
        if refused:
            raise BackendRefused("a model behind Triton does not know this field", param=refused[0])
        texts = [text for text in request.inputs if isinstance(text, str)]
        if len(texts) < len(request.inputs):
            raise BackendRefused("a model behind Triton takes no token ids", param="input")
        found: list[tuple[float, ...]] = []
        for batch in kserve.batches(tensors[0], model, texts):
            asked = InferRequest(
                id=request.id,
                model=request.model,
                created=request.created,
                body=kserve.question(*tensors, batch),
            )
            found += kserve.vectors(await self._wire.infer(asked, attempt), len(batch))
        return Embeddings(tuple(found), model=self.settings.model)

    def _layout(self, model: Model) -> Layout | None:
        """How to ask the model for text; None if it gives none.

        :raises BackendFailed: it lacks the tensors of the configured kind.
        """
        kinds: dict[Kind, tuple[type[Layout], ...]] = {
            "tensorrtllm": (Ensemble, LlmApi),
            "vllm": (VllmBackend,),
        }
        wanted = self.settings.kind
        for kind, layouts in kinds.items():
            for layout in layouts:
                known = layout.known_by <= model.inputs.keys() and "text_output" in model.outputs
                if wanted in ("auto", kind) and known:
                    return layout(model, self._version, self.settings.neutral_sampling)
        if wanted in kinds:
            needed = " or ".join(str(sorted(layout.known_by)) for layout in kinds[wanted])
            raise BackendFailed(
                f"`kind: {wanted}`: the model must have {needed}, and text_output, "
                f"but has {sorted(model.inputs)} and {sorted(model.outputs)}"
            )
        return None

    async def aclose(self) -> None:
        await self._wire.aclose()
        if "_metrics" in self.__dict__:
            await self._metrics.aclose()


def _wire(settings: TritonSettings, context: AdapterContext) -> Wire:
    if settings.protocol == "http":
        return HttpWire(settings, context)
    try:
        from forebay_plugins.triton_grpc import GrpcWire
    except ImportError as missing:
        raise ConfigError(
            f"backends.{context.name}: `protocol: grpc` needs {missing.name}; "
            "run `pip install 'forebay[triton-grpc]'`"
        ) from None
    return GrpcWire(settings)


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
        ),
        AdapterKind(
            name="triton_openai",
            settings=TritonOpenAISettings,
            build=TritonOpenAIAdapter,
            summary="Triton's OpenAI frontend: only the fields it heeds.",
            provider="triton",
        ),
    ]
