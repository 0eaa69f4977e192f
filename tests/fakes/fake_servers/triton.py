"""Triton Inference Server 2.51 by HTTP, with TensorRT-LLM's ``ensemble``, vLLM's backend and an
embedding model.

Routes, shapes and sentences were recorded from the real server running models that stand in for the
two backends, and are compared with it by ``tests/e2e/test_fakes_are_true.py``. Read at
triton-inference-server: ``tensorrtllm_backend:all_models`` (tensors; the prompt is repeated, stop
words stay, nothing says why an answer ends), ``vllm_backend:src/model.py`` (sampling parameters,
the word ``None``), ``server:src/http_server.cc`` (statuses).
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fake_servers.answer import Holding, Piece, pieces
from fake_servers.constraint import Impossible, by_grammar, by_regex, by_schema
from fake_servers.model import BOS, EOS, Ask, tokenize
from fake_servers.serving import FakeServer, Refusal, compact, event, reply, vector
from forebay.testing import Exchange

__all__ = ["Triton"]


def tensors(shape: Sequence[int], **kinds: str) -> list[dict[str, Any]]:
    return [{"name": n, "datatype": kind, "shape": list(shape)} for n, kind in kinds.items()]


_ENSEMBLE = {
    "name": "ensemble",
    "versions": ["1"],
    "platform": "ensemble",
    "inputs": [
        *tensors((-1, 1), text_input="BYTES", max_tokens="INT32"),
        *tensors((-1, -1), bad_words="BYTES", stop_words="BYTES"),
        *tensors((-1, 1), exclude_input_in_output="BOOL", end_id="INT32", top_k="INT32"),
        *tensors((-1, 1), top_p="FP32", temperature="FP32", repetition_penalty="FP32"),
        *tensors((-1, 1), presence_penalty="FP32", frequency_penalty="FP32", min_tokens="INT32"),
        *tensors((-1, 1), seed="UINT64", return_log_probs="BOOL"),
        *tensors((-1, 1), return_num_input_tokens="BOOL", return_num_output_tokens="BOOL"),
        *tensors((-1, 1), guided_decoding_guide_type="BYTES", guided_decoding_guide="BYTES"),
        *tensors((-1, 1), beam_width="INT32", stream="BOOL"),
    ],
    "outputs": [
        *tensors((-1, -1), text_output="BYTES", output_log_probs="FP32"),
        *tensors((-1, -1), num_input_tokens="INT32", num_output_tokens="INT32"),
    ],
}
_VLLM = {
    "name": "vllm_model",
    "versions": ["1"],
    "platform": "vllm",
    "inputs": [
        *tensors((1,), text_input="BYTES", sampling_parameters="BYTES", stream="BOOL"),
        *tensors((1,), exclude_input_in_output="BOOL", return_finish_reason="BOOL"),
        *tensors((1,), return_num_input_tokens="BOOL", return_num_output_tokens="BOOL"),
    ],
    "outputs": [
        *tensors((-1,), text_output="BYTES", finish_reason="BYTES"),
        *tensors((-1,), num_input_tokens="UINT32", num_output_tokens="UINT32"),
    ],
}
_EMBEDDER = {
    "name": "embedder",
    "versions": ["1"],
    "platform": "python",
    "inputs": tensors((-1, 1), text="BYTES"),
    "outputs": tensors((-1, 64), embedding="FP32"),
}
_MODELS = {"embedder": _EMBEDDER, "ensemble": _ENSEMBLE, "vllm_model": _VLLM}
_BATCH = 8
_BYTES = "text/event-stream; charset=utf-8"


class Triton(FakeServer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._unnoticed: set[asyncio.Task[None]] = set()

    async def __aexit__(self, *raised: object) -> None:
        for task in self._unnoticed:
            task.cancel()
        await asyncio.gather(*self._unnoticed, return_exceptions=True)
        await super().__aexit__(*raised)

    async def script(self, exchange: Exchange) -> None:
        path = exchange.path.partition("?")[0]
        try:
            if path.startswith("/v2/models/"):
                await self.of_model(exchange, path.removeprefix("/v2/models/"))
            else:
                self.of_server(exchange, path)
        except Refusal as refusal:
            self.refuse(exchange, refusal)

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        """A model's own refusal is the first response of a stream: an event."""
        if refusal.kind == "event":
            data = event({"error": refusal.message})
            exchange.answer(refusal.status, data, {"content-type": _BYTES})
        else:
            plain = {"content-type": "text/plain"} if refusal.kind == "plain" else {}
            reply(exchange, refusal.status, {"error": refusal.message}, plain)

    def of_server(self, exchange: Exchange, path: str) -> None:
        if path in ("/v2/health/ready", "/v2/health/live"):
            exchange.answer(200)
        elif path == "/v2":
            extensions = ["model_repository", "binary_tensor_data", "parameters", "statistics"]
            about = {"name": "triton", "version": "2.51.0", "extensions": extensions}
            reply(exchange, 200, about)
        elif path == "/v2/repository/index":
            index = [{"name": name, "version": "1", "state": "READY"} for name in _MODELS]
            reply(exchange, 200, index)
        elif path == "/metrics":
            exchange.answer(200, self.metrics().encode())
        else:
            exchange.answer(404)

    def metrics(self) -> str:
        labels = 'model="tensorrt_llm",version="1"'
        requests, pending = "nv_trt_llm_request_metrics", "nv_inference_pending_request_count"
        lines = [f'{pending}{{model="{name}",version="1"}} 0' for name in _MODELS]
        for kind, value in (("active", self.running), ("waiting", self.waiting)):
            lines.append(f'{requests}{{request_type="{kind}",{labels}}} {value}')
        cache = "nv_trt_llm_kv_cache_block_metrics"
        lines.append(f'{cache}{{kv_cache_block_type="fraction",{labels}}} 0')
        return "\n".join([*lines, ""])

    async def of_model(self, exchange: Exchange, path: str) -> None:
        name, _, action = path.partition("/")
        if action.startswith("versions/"):
            action = action.removeprefix("versions/").partition("/")[2]
        model = _MODELS.get(name)
        if action == "ready":
            if model is None:
                raise Refusal(400, "Model version not ready", "plain")
            exchange.answer(200)
        elif model is None:
            raise Refusal(404, f"Request for unknown model: '{name}' is not found")
        elif exchange.method == "GET":
            reply(exchange, 200, config_of(model) if action == "config" else model)
        elif action == "infer":
            await self.infer(exchange, model)
        elif action == "generate_stream":
            await self.generate_stream(exchange, model)
        elif action == "generate":
            task = asyncio.ensure_future(self.generate(exchange, model))
            self._unnoticed.add(task)
            task.add_done_callback(self._unnoticed.discard)
            await asyncio.shield(task)  # that the client has left is not noticed
        else:
            exchange.answer(404)

    def inputs(self, exchange: Exchange, model: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors by name; any other key is a parameter, and ignored.

        :raises Refusal: one is of the wrong type, or missing.
        """
        try:
            body = exchange.json
        except ValueError as wrong:
            raise Refusal(400, f"failed to parse the request JSON buffer: {wrong}") from None
        kinds = {tensor["name"]: tensor["datatype"] for tensor in model["inputs"]}
        given = {name: value for name, value in body.items() if name in kinds}
        for name, value in given.items():
            if kinds[name].startswith(("INT", "UINT")) and not isinstance(value, int):
                sign = "unsigned" if kinds[name].startswith("U") else "signed"
                message = f"attempt to access JSON non-{sign}-integer as {sign}-integer"
                raise Refusal(500, f"Unable to parse 'data': {message}")
        required = ["text_input", "max_tokens"] if model is _ENSEMBLE else ["text_input"]
        missing = [name for name in required if name not in given]
        if missing:
            message = (
                f"[request id: <id_unknown>] expected number of inputs between {len(required)}"
            )
            message += f" and {len(kinds)} but got {len(given)} inputs for model '{model['name']}'."
            message += f" Got input(s) {sorted(given)}, but missing required input(s) {missing}."
            raise Refusal(400, f"{message} Please provide all required input(s).")
        return given

    def ask(self, model: Mapping[str, Any], said: Mapping[str, Any]) -> Ask:
        text = said["text_input"]
        prompt = (BOS, *tokenize(text if isinstance(text, str) else str(text)))
        ask = self.tensorrt_ask(prompt, said) if model is _ENSEMBLE else self.vllm_ask(prompt, said)
        if len(prompt) >= self.context:
            raise Refusal(500, self.too_long(model, len(prompt)), "event")
        return ask

    def too_long(self, model: Mapping[str, Any], prompt: int) -> str:
        """TensorRT-LLM's sentence, and vLLM's."""
        if model is _ENSEMBLE:
            message = f"Prompt length ({prompt}) exceeds maximum input length ({self.context}). Set"
            message += " log level to info and check TRTGptModel logs for how maximum input length"
            return f"{message} is set"
        message = f"The decoder prompt (length {prompt}) is longer than the maximum model length of"
        return f"Error generating stream: {message} {self.context}."

    def tensorrt_ask(self, prompt: tuple[int, ...], said: Mapping[str, Any]) -> Ask:
        if said["max_tokens"] < 1:
            raise Refusal(400, f"max_tokens must be above 0, is {said['max_tokens']}", "event")
        stop = said.get("stop_words") or ()
        kind, guide = said.get("guided_decoding_guide_type"), said.get("guided_decoding_guide")
        makers = {"json_schema": lambda text: by_schema(json.loads(text)), "regex": by_regex}
        makers |= {"json": lambda text: '{"one": "two"}', "ebnf_grammar": by_grammar}
        try:
            forced = makers[kind](guide) if kind else None
        except Impossible as why:
            raise Refusal(400, f"Grammar error: {why}", "event") from None
        return Ask(
            prompt=prompt,
            max_tokens=said["max_tokens"],
            # Its default is one candidate, whatever the temperature.
            top_k=said.get("top_k", 0 if "top_p" in said else 1),
            temperature=said.get("temperature", 1.0),
            top_p=said.get("top_p", 1.0),
            frequency_penalty=said.get("frequency_penalty", 0.0),
            presence_penalty=said.get("presence_penalty", 0.0),
            repetition_penalty=said.get("repetition_penalty", 1.0),
            min_tokens=said.get("min_tokens", 0),
            seed=said.get("seed", 0),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            ignore_eos=said.get("end_id") == -1,
            forced=forced,
        )

    def vllm_ask(self, prompt: tuple[int, ...], said: Mapping[str, Any]) -> Ask:
        try:
            given = json.loads(said.get("sampling_parameters") or "{}")
        except ValueError as wrong:
            raise Refusal(400, str(wrong), "event") from None
        stop = given.pop("stop", None) or ()
        known = {
            **dict.fromkeys(("temperature", "top_p", "min_p", "frequency_penalty"), float),
            **dict.fromkeys(("presence_penalty", "repetition_penalty"), float),
            **dict.fromkeys(("max_tokens", "top_k", "seed", "min_tokens", "ignore_eos"), int),
        }
        bias = {int(token): value for token, value in (given.pop("logit_bias", None) or {}).items()}
        tokens = frozenset(given.pop("stop_token_ids", None) or ())
        try:
            parameters = {name: known[name](value) for name, value in given.items()}
        except KeyError as unknown:
            message = f"Unexpected keyword argument {unknown}"
            raise Refusal(500, f"Error generating stream: {message}", "event") from None
        return Ask(
            prompt=prompt,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_tokens=tokens,
            logit_bias=bias,
            **{"max_tokens": 16, **parameters},
        )

    async def responses(
        self, model: Mapping[str, Any], said: Mapping[str, Any], ask: Ask
    ) -> AsyncIterator[dict[str, Any]]:
        """Keys in Triton's order: by the alphabet. The last has no text."""
        holding: Holding = "tokens" if model is _ENSEMBLE else "longest"
        count = 0
        for place, piece in enumerate(pieces(ask, holding)):
            await self.tick(place)
            count += len(piece.steps)
            yield self.response(model, said, ask, piece, count)
        if model is _ENSEMBLE and piece.steps[-1].token != EOS:
            yield self.response(model, said, ask, Piece("", []), count)

    def response(
        self, model: Mapping[str, Any], said: Mapping[str, Any], ask: Ask, piece: Piece, count: int
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"model_name": model["name"], "model_version": "1"}
        if said.get("return_num_input_tokens"):
            content["num_input_tokens"] = len(ask.prompt)
        if said.get("return_num_output_tokens"):
            fresh = len(piece.steps)
            content["num_output_tokens"] = count if model is _ENSEMBLE else fresh
        if said.get("return_finish_reason"):
            content["finish_reason"] = piece.finish or "None"
        if said.get("return_log_probs"):
            logprobs = [step.logprob for step in piece.steps]
            content["output_log_probs"] = logprobs[0] if len(logprobs) == 1 else logprobs
        content["text_output"] = piece.text
        return dict(sorted(content.items()))

    async def generate_stream(self, exchange: Exchange, model: Mapping[str, Any]) -> None:
        said = self.inputs(exchange, model)
        if model is _EMBEDDER:
            raise Refusal(400, "inference input 'text' is missing")
        ask = self.ask(model, said)
        if not said.get("stream"):
            await self.generate(exchange, model)
            return
        async with self.slot():
            begun = False
            async for response in self.responses(model, said, ask):
                if not begun:
                    exchange.begin(_BYTES)
                    begun = True
                exchange.send(event(response))

    async def generate(self, exchange: Exchange, model: Mapping[str, Any]) -> None:
        said = self.inputs(exchange, model)
        ask = self.ask(model, said)
        async with self.slot():
            found = [response async for response in self.responses(model, said, ask)]
        if said.get("stream"):
            message = "generate expects model to produce exactly 1 response, use generate stream"
            raise Refusal(400, f"{message} for model types that may not produce exactly 1 response")
        text = "".join(response["text_output"] for response in found)
        before = "" if said.get("exclude_input_in_output") else str(said["text_input"])
        last = {**found[-1], "text_output": before + text}
        if "num_output_tokens" in last and model is _VLLM:
            last["num_output_tokens"] = sum(each["num_output_tokens"] for each in found)
        reply(exchange, 200, last)

    async def infer(self, exchange: Exchange, model: Mapping[str, Any]) -> None:
        """Inputs as JSON alone; the output as JSON, or in binary if that is asked for."""
        if model is not _EMBEDDER:
            message = "HTTP end point doesn't support models with decoupled transaction policy"
            raise Refusal(501, message, "plain")
        try:
            body = exchange.json
        except ValueError as wrong:
            raise Refusal(400, f"failed to parse the request JSON buffer: {wrong}") from None
        if not body.get("inputs"):
            message = (
                "expected 1 inputs but got 0 inputs for model 'embedder'. Got input(s) [], but"
            )
            message += " missing required input(s) ['text']. Please provide all required input(s)."
            raise Refusal(400, f"[request id: <id_unknown>] {message}")
        tensor = body["inputs"][0]
        self.check(tensor)
        values = [vector(str(text), 64) for text in flat(tensor["data"])]
        data = [value for one in values for value in one]
        shape = [len(values), 64]
        output: dict[str, Any] = {
            "name": "embedding",
            "datatype": "FP32",
            "shape": shape,
            "data": data,
        }
        head = {"id": body["id"]} if "id" in body else {}
        head |= {"model_name": "embedder", "model_version": "1"}
        wanted = [one.get("parameters") or {} for one in body.get("outputs") or ()]
        if not any(one.get("binary_data") for one in wanted):
            reply(exchange, 200, {**head, "outputs": [output]})
            return
        raw = struct.pack(f"<{len(data)}f", *data)
        del output["data"]
        output["parameters"] = {"binary_data_size": len(raw)}
        text = compact({**head, "outputs": [output]})
        headers = {"inference-header-content-length": str(len(text))}
        headers["content-type"] = "application/octet-stream"
        reply(exchange, 200, text + raw, headers)

    def check(self, tensor: Mapping[str, Any]) -> None:
        unknown, name = "[request id: <id_unknown>]", tensor["name"]
        if name != "text":
            raise Refusal(400, f"unexpected inference input '{name}' for model 'embedder'")
        if tensor["datatype"] != "BYTES":
            message = f"inference input 'text' data-type is '{tensor['datatype']}', but model"
            raise Refusal(400, f"{unknown} {message} 'embedder' expects 'BYTES'")
        shape = tensor["shape"]
        if len(shape) != 2 or shape[1] != 1:
            shown = ",".join(map(str, shape))
            message = "unexpected shape for input 'text' for model 'embedder'. Expected [-1,1], got"
            raise Refusal(400, f"{unknown} {message} [{shown}].")
        if shape[0] > _BATCH:
            message = f"inference request batch-size must be <= {_BATCH} for 'embedder'"
            raise Refusal(400, f"{unknown} {message}")


def flat(data: Sequence[Any]) -> list[Any]:
    return [one for each in data for one in (each if isinstance(each, list) else [each])]


def config_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """What is read of it."""
    batch = {"embedder": _BATCH, "ensemble": 16, "vllm_model": 0}[model["name"]]
    config: dict[str, Any] = {"name": model["name"], "platform": "", "max_batch_size": batch}
    if model is not _EMBEDDER:
        config["model_transaction_policy"] = {"decoupled": True}
    return config
