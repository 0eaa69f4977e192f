"""A made-up generator behind the tensors of three real backends, for Triton's Python backend.

It says the prompt's words again, one a token, each with a space before it, and then falls silent.
As model `ensemble` it has the tensors of TensorRT-LLM's ensemble, and like it leaves stop words in
the text; as `vllm_model` those of vLLM's backend; as `tensorrt_llm` those of TensorRT-LLM's LLM
API, whose every response has the whole text so far. The latter two end before a stop string,
wherever that begins. Each ignores what it does not know. With `end_id` -1 (`ignore_eos`) the words
go round until `max_tokens`. A token takes $TRITON_TOKEN_MS (10). The prompt `break` fails after two
tokens.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

SECONDS = float(os.environ.get("TRITON_TOKEN_MS", "10")) / 1000
FINAL = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL

ENSEMBLE_INPUTS = {
    "text_input": "STRING",
    "max_tokens": "INT32",
    "bad_words": "STRING[]",
    "stop_words": "STRING[]",
    "exclude_input_in_output": "BOOL",
    "end_id": "INT32",
    "top_k": "INT32",
    "top_p": "FP32",
    "temperature": "FP32",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "min_tokens": "INT32",
    "random_seed": "UINT64",
    "return_log_probs": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
    "return_perf_metrics": "BOOL",
    "beam_width": "INT32",
    "stream": "BOOL",
}
ENSEMBLE_OUTPUTS = {
    "text_output": "STRING",
    "output_log_probs": "FP32",
    "num_input_tokens": "INT32",
    "num_output_tokens": "INT32",
    "arrival_time_ns": "INT64",
    "first_scheduled_time_ns": "INT64",
    "first_token_time_ns": "INT64",
    "last_token_time_ns": "INT64",
}
VLLM_INPUTS = {
    "text_input": "STRING",
    "sampling_parameters": "STRING",
    "stream": "BOOL",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_logprobs": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
VLLM_OUTPUTS = {
    "text_output": "STRING",
    "finish_reason": "STRING",
    "logprobs": "STRING",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
TIMES = ("arrival", "first_scheduled", "first_token", "last_token")
LLMAPI_INPUTS = {
    "text_input": "STRING[]",
    "streaming": "BOOL",
    "sampling_param_temperature": "FP32",
    "sampling_param_top_k": "INT32",
    "sampling_param_top_p": "FP32",
    "sampling_param_frequency_penalty": "FP32",
    "sampling_param_presence_penalty": "FP32",
    "sampling_param_max_tokens": "INT32",
    "sampling_param_stop": "STRING[]",
    "sampling_param_seed": "UINT64",
    "sampling_param_exclude_input_from_output": "BOOL",
    "return_finish_reason": "BOOL",
}
LLMAPI_OUTPUTS = {"text_output": "STRING", "finish_reason": "STRING"}
MODELS = {
    "ensemble": (16, ENSEMBLE_INPUTS, ENSEMBLE_OUTPUTS),
    "vllm_model": (0, VLLM_INPUTS, VLLM_OUTPUTS),
    "tensorrt_llm": (0, LLMAPI_INPUTS, LLMAPI_OUTPUTS),
}
REQUIRED = {"text_input", "max_tokens"}


def values(request: Any, name: str) -> list[Any]:
    tensor = pb.get_input_tensor_by_name(request, name)
    return [] if tensor is None else tensor.as_numpy().flatten().tolist()


def value(request: Any, name: str, default: Any) -> Any:
    found = next(iter(values(request, name)), default)
    return found.decode() if isinstance(found, bytes) else found


def strings(request: Any, name: str) -> tuple[str, ...]:
    return tuple(word.decode() for word in values(request, name))


def tensor(name: str, kind: Any, data: Any) -> Any:
    return pb.Tensor(name, np.array([data], dtype=kind))


def string(name: str, data: str) -> Any:
    return pb.Tensor(name, np.array([data.encode()], dtype=np.object_))


def likely(text: str, count: int) -> list[dict[int, dict[str, Any]]]:
    """Of the one token ``text``: itself, which is the second likeliest, and so many beside it."""
    if not text:
        return []
    chosen = {7: {"logprob": -1.0, "rank": 2, "decoded_token": text}}
    others = [(1, -0.5), (2, -1.0), (3, -2.0)][:count]
    return [
        chosen
        | {
            100 + rank: {"logprob": logprob, "rank": rank, "decoded_token": f"<{rank}>"}
            for rank, logprob in others
            if rank != 2
        }
    ]


class Asked:
    """What a request wants, in the backend's words."""

    def __init__(self, request: Any, model: str, arrived: int) -> None:
        #: By a clock of its own: when it came, was begun, and gave its first and last tokens.
        self.times = dict.fromkeys(TIMES, time.monotonic_ns()) | {"arrival": arrived}
        self.prompt = value(request, "text_input", "")
        self.stream = value(request, "stream", False) or value(request, "streaming", False)
        self.endless = False
        if model == "vllm_model":
            said = json.loads(value(request, "sampling_parameters", "{}"))
            self.limit = said.get("max_tokens", 16)
            self.endless = said.get("ignore_eos", False)
            self.stop = tuple(said.get("stop") or ())
            wanted = value(request, "return_logprobs", False)
            self.logprobs = said.get("logprobs") if wanted else None
        elif model == "ensemble":
            self.limit = value(request, "max_tokens", 0)
            self.endless = value(request, "end_id", 0) == -1
            self.stop = strings(request, "stop_words")
        else:
            self.limit = value(request, "sampling_param_max_tokens", 32)
            self.stop = strings(request, "sampling_param_stop")
        if self.limit <= 0:
            raise ValueError(f"max_tokens must be above 0, is {self.limit}")

    def tokens(self) -> Iterator[str]:
        words = self.prompt.split()
        return itertools.islice(itertools.cycle(words) if self.endless else words, self.limit)


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        batch, inputs, outputs = MODELS[config.as_dict()["name"]]
        config.set_max_batch_size(batch)
        config.set_model_transaction_policy({"decoupled": True})
        for name, kind in inputs.items():
            dims = [-1] if kind.endswith("[]") else [1]
            entry = {"name": name, "data_type": f"TYPE_{kind.removesuffix('[]')}", "dims": dims}
            config.add_input({**entry, "optional": name not in REQUIRED})
        for name, kind in outputs.items():
            config.add_output({"name": name, "data_type": f"TYPE_{kind}", "dims": [-1]})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        self.model = args["model_name"]
        self.running: set[threading.Thread] = set()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            arrived = time.monotonic_ns()
            thread = threading.Thread(target=self.answer, args=(request, arrived, sender))
            self.running.add(thread)
            thread.start()

    def finalize(self) -> None:
        for thread in list(self.running):
            thread.join()

    def answer(self, request: Any, arrived: int, sender: Any) -> None:
        try:
            self.generate(request, Asked(request, self.model, arrived), sender)
        except Exception as error:  # noqa: BLE001 - else the client would wait for ever
            wrong = isinstance(error, ValueError)
            code = pb.TritonError.INVALID_ARG if wrong else pb.TritonError.INTERNAL
            failure = pb.InferenceResponse(error=pb.TritonError(str(error), code))
            sender.send(failure, flags=FINAL)
        finally:
            self.running.discard(threading.current_thread())

    def generate(self, request: Any, asked: Asked, sender: Any) -> None:
        text, count, stopped = "", 0, False
        for word in asked.tokens():
            time.sleep(SECONDS)
            if sender.is_cancelled():
                pb.Logger.log_info(f"cancelled after {count} tokens")
                raise RuntimeError("cancelled")
            if asked.prompt == "break" and count == 2:
                raise RuntimeError("broken in mid-stream")
            count += 1
            asked.times["last_token"] = time.monotonic_ns()
            if count == 1:
                asked.times["first_token"] = asked.times["last_token"]
            sent, text = len(text), f"{text} {word}"
            stopped = bool(asked.stop) and text.endswith(asked.stop)
            if self.model != "ensemble":
                ends = [at for stop in asked.stop if (at := text.find(stop)) >= 0]
                stopped, text = bool(ends), text[: min(ends, default=None)]
            if asked.stream:
                said = text if self.model == "tensorrt_llm" else text[sent:]
                sender.send(self.response(request, asked, said, count))
            if stopped:
                break
        reason = "length" if count == asked.limit and not stopped else "stop"
        last = "" if asked.stream and self.model != "tensorrt_llm" else text
        sender.send(self.response(request, asked, last, count, reason), flags=FINAL)

    def response(self, request: Any, asked: Asked, text: str, count: int, reason: str = "") -> Any:
        """Of one token, or with ``reason`` the last, whose text is empty in a stream."""
        words = len(asked.prompt.split())
        if self.model != "ensemble":
            outputs = [string("text_output", text), string("finish_reason", reason or "None")]
            if self.model == "vllm_model":
                new = count if reason and not asked.stream else 0 if reason else 1
                outputs.append(pb.Tensor("num_input_tokens", np.array([words], dtype=np.uint32)))
                outputs.append(pb.Tensor("num_output_tokens", np.array([new], dtype=np.uint32)))
                if asked.logprobs is not None:
                    outputs.append(string("logprobs", json.dumps(likely(text, asked.logprobs))))
            return pb.InferenceResponse(outputs)
        outputs = [tensor("text_output", np.object_, [text.encode()])]
        if value(request, "return_log_probs", False):
            outputs.append(
                tensor("output_log_probs", np.float32, [-len(text) / 10] if text else [])
            )
        if value(request, "return_num_input_tokens", False):
            outputs.append(tensor("num_input_tokens", np.int32, [words]))
        if value(request, "return_num_output_tokens", False):
            outputs.append(tensor("num_output_tokens", np.int32, [count]))
        if reason and value(request, "return_perf_metrics", False):
            outputs += [
                tensor(f"{name}_time_ns", np.int64, [moment])
                for name, moment in asked.times.items()
            ]
        return pb.InferenceResponse(outputs)
