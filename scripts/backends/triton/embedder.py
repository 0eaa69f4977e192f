"""A made-up embedding model for Triton's Python backend: texts that share words lie close.

Each word adds one of 64 directions, chosen by its CRC; the sum is made a unit vector.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

SIZE = 64


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        config.set_max_batch_size(8)
        config.set_dynamic_batching()
        config.add_input({"name": "text", "data_type": "TYPE_STRING", "dims": [1]})
        config.add_output({"name": "embedding", "data_type": "TYPE_FP32", "dims": [SIZE]})
        return config

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        texts = pb.get_input_tensor_by_name(request, "text").as_numpy().flatten()
        vectors = np.zeros((len(texts), SIZE), dtype=np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for word in text.split():
                vector[zlib.crc32(word) % SIZE] += 1.0
            vector /= np.linalg.norm(vector) or 1.0
        return pb.InferenceResponse([pb.Tensor("embedding", vectors)])
