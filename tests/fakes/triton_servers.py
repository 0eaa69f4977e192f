"""Triton 2.51 as its clients see it, byte for byte, in each scenario.

The shapes were recorded from a real server that ran the models of scripts/backends/triton.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from forebay.testing import Bench, Exchange, Scenario, ScriptedServer, adapter_context
from forebay_plugins import triton

WORDS = (" Hello", " wörld", ' "quoted\\"', "\n", " 😀")
ENGINE = b'model="tensorrt_llm",version="1"}'
METRICS = b"""# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="ensemble",version="1"} 0
nv_inference_pending_request_count{model="vllm_model",version="1"} 3
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 2
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 5
nv_trt_llm_request_metrics{model="other",request_type="active",version="1"} 100
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",ENGINE 0.25
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="free",ENGINE 300
""".replace(b"ENGINE", ENGINE)


def tensors(batched: bool = True, **kinds: str) -> list[dict[str, Any]]:
    shape = [-1, 1] if batched else [1]
    return [{"name": n, "datatype": kind, "shape": shape} for n, kind in kinds.items()]


ENSEMBLE = {
    "name": "ensemble",
    "versions": ["1"],
    "platform": "ensemble",
    "inputs": tensors(
        text_input="BYTES",
        max_tokens="INT32",
        bad_words="BYTES",
        stop_words="BYTES",
        exclude_input_in_output="BOOL",
        end_id="INT32",
        top_k="INT32",
        top_p="FP32",
        temperature="FP32",
        repetition_penalty="FP32",
        presence_penalty="FP32",
        frequency_penalty="FP32",
        min_length="INT32",
        random_seed="UINT64",
        return_log_probs="BOOL",
        return_num_input_tokens="BOOL",
        return_num_output_tokens="BOOL",
        return_perf_metrics="BOOL",
        guided_decoding_guide="BYTES",
        guided_decoding_guide_type="BYTES",
        beam_width="INT32",
        stream="BOOL",
    ),
    "outputs": tensors(
        text_output="BYTES",
        output_log_probs="FP32",
        arrival_time_ns="INT64",
        first_scheduled_time_ns="INT64",
        first_token_time_ns="INT64",
        last_token_time_ns="INT64",
    ),
}
VLLM = {
    "name": "vllm_model",
    "versions": ["1"],
    "platform": "vllm",
    "inputs": tensors(
        False,
        text_input="BYTES",
        stream="BOOL",
        sampling_parameters="BYTES",
        exclude_input_in_output="BOOL",
        return_finish_reason="BOOL",
        return_num_input_tokens="BOOL",
        return_num_output_tokens="BOOL",
    ),
    "outputs": tensors(False, text_output="BYTES", finish_reason="BYTES"),
}
MODELS = {"ensemble": ENSEMBLE, "vllm_model": VLLM}


#: Of the engine's clock; 0 before the last response.
TIMES = {
    "arrival_time_ns": 8_000_000_000_000,
    "first_scheduled_time_ns": 8_000_001_000_000,
    "first_token_time_ns": 8_000_003_000_000,
    "last_token_time_ns": 8_000_006_000_000,
}


def event(content: object) -> bytes:
    data = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return b"data: " + data.encode() + b"\n\n"


class Said:
    """What a model says to one request."""

    def __init__(self, exchange: Exchange) -> None:
        self.model = exchange.path.split("/")[3]
        self.asked = exchange.json
        self.vllm = self.model == "vllm_model"
        self.count = 0

    def piece(self, text: str, reason: str | None = None) -> bytes:
        """TensorRT-LLM counts all tokens so far, vLLM's backend the new ones."""
        self.count += bool(text)
        content: dict[str, Any] = {"model_name": self.model, "model_version": "1"}
        if self.vllm:
            content |= {"finish_reason": reason or "None", "num_output_tokens": int(bool(text))}
        elif self.asked["return_num_output_tokens"]:
            content["num_output_tokens"] = self.count
        if self.asked.get("return_perf_metrics"):
            content |= TIMES if reason else dict.fromkeys(TIMES, 0)
        return event({**content, "num_input_tokens": 11, "text_output": text})


def get(exchange: Exchange, scenario: Scenario, decoupled: bool = True) -> None:
    parts = exchange.path.split("/")
    model = MODELS.get(parts[3] if len(parts) > 3 else "")
    if exchange.path.endswith("/ready"):
        if scenario is Scenario.BROKEN:
            exchange.answer(400, b'{"error":"Model version not ready"}')
        else:
            exchange.answer(200, b"")
    elif exchange.path == "/v2":
        exchange.answer(200, {"name": "triton", "version": "2.51.0", "extensions": []})
    elif exchange.path == "/metrics":
        exchange.answer(200, METRICS)
    elif model is None:
        exchange.answer(404, {"error": "Request for unknown model: 'x' is not found"})
    elif exchange.path.endswith("/config"):
        exchange.answer(200, {"model_transaction_policy": {"decoupled": decoupled}})
    else:
        exchange.answer(200, model)


async def serve(exchange: Exchange, scenario: Scenario = Scenario.HEALTHY) -> None:
    if exchange.method == "GET":
        get(exchange, scenario)
    elif exchange.path == "/v2/repository/index":
        listed = [{"name": name, "version": "1", "state": "READY"} for name in MODELS]
        exchange.answer(200, [*listed, {"name": "sleeping", "state": "UNAVAILABLE"}])
    elif scenario is Scenario.SILENT:
        await asyncio.Event().wait()
    elif scenario is Scenario.BUSY:
        exchange.answer(503, {"error": "Exceeds maximum queue size"})
    elif scenario is Scenario.BROKEN:
        exchange.answer(500, {"error": "failed to allocate"})
    elif scenario is Scenario.REFUSING:
        content_type = {"content-type": "text/event-stream; charset=utf-8"}
        exchange.answer(400, event({"error": "max_tokens must be above 0"}), content_type)
    elif scenario is Scenario.GARBAGE:
        exchange.answer(200, b"<html>It works!</html>", {"content-type": "text/html"})
    else:
        await stream(exchange, scenario)


async def stream(exchange: Exchange, scenario: Scenario) -> None:
    said = Said(exchange)
    exchange.begin("text/event-stream; charset=utf-8")
    if scenario is Scenario.HEALTHY:
        for word in WORDS:
            exchange.send(said.piece(word))
            await asyncio.sleep(0)
        exchange.send(said.piece("", "stop"))
        return
    for word in WORDS[:2]:
        exchange.send(said.piece(word))
        await asyncio.sleep(0.005)
    while scenario is Scenario.ENDLESS:
        exchange.send(said.piece(" on"))
        await asyncio.sleep(0.005)
    if scenario is Scenario.CUT:
        exchange.send(said.piece(WORDS[2])[:30])
        await asyncio.sleep(0.005)
        exchange.cut()
    elif scenario is Scenario.FAILING:
        exchange.send(event({"error": "the engine has died"}))


def adapter_for(url: str, model: str, **settings: Any) -> triton.TritonAdapter:
    made = triton.TritonSettings(
        adapter="triton", url=url, model=model, chat_template="plain", **settings
    )
    return triton.TritonAdapter(made, adapter_context())


@asynccontextmanager
async def bench(model: str, scenario: Scenario) -> AsyncIterator[Bench]:
    """The adapter in front of such a model, by HTTP."""

    async def script(exchange: Exchange) -> None:
        await serve(exchange, scenario)

    async with ScriptedServer(script) as server:
        url = "http://127.0.0.1:9" if scenario is Scenario.DEAD else server.url
        adapter = adapter_for(url, model, metrics_url=url)
        await adapter.start()
        try:
            yield Bench(adapter, lambda: len(server.running))
        finally:
            await adapter.aclose()
