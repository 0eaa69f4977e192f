"""Settings of the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    #: Folder with config.json, safetensors and tokenizer, or a GGUF file.
    model: str
    #: Where the model is computed: ``cpu``, ``cuda``, or ``auto``: on a GPU where there is one.
    device: str = "auto"
    #: ``auto``: as stored; else ``float32``, ``bfloat16``, or on a GPU ``float16``.
    dtype: str = "auto"
    #: Of weights that are stored plainly: ``none``, ``int8``, ``int4`` or
    #: ``fp8``.
    quantization: str = "none"
    #: Who computes the layers: ``native`` (a class of ours), ``transformers``, or ``auto``: ours
    #: where there is one.
    model_impl: str = "auto"
    #: Tokens in a page of the KV cache.
    block_size: int = 32
    #: Pages; 0: as many as ``kv_cache_bytes`` holds.
    num_blocks: int = 0
    #: 0: 512 MiB on a processor; on a GPU what ``gpu_memory_share`` leaves.
    kv_cache_bytes: int = 0
    #: Of keys and values: ``auto``: the weights' type, or ``fp8`` (e4m3).
    kv_cache_dtype: str = "auto"
    #: Of a GPU's memory, what the engine may take in all if it chooses the size of the KV cache.
    gpu_memory_share: float = 0.9
    #: Most tokens in one step, prompt chunks and decodes together.
    max_step_tokens: int = 512
    #: Most sequences in one step.
    max_sequences: int = 64
    #: Longest prompt and answer together; 0: the model's own limit.
    max_model_len: int = 0
    #: Reuse pages of equal prefixes.
    prefix_cache: bool = True
    #: Embeddings from the ``last`` hidden state or their ``mean``; ``auto``: as the folder's
    #: ``1_Pooling`` says, or ``none``.
    pooling: str = "auto"
    #: Of every answer: a scheme with its parameters (``watermark.parse``); empty: where asked.
    watermark: str = ""
    #: File with the watermark's key; empty: it is in the environment, or there is none.
    watermark_key_file: str = ""
    #: Compute threads; 0: the engine measures and chooses.
    threads: int = 0
    #: Where guesses of the next tokens come from: ``none``; ``ngram``: what followed the last
    #: tokens where they occurred before; or the folder of a draft model with the same vocabulary.
    speculation: str = "none"
    #: Most guesses verified in a step for each sequence.
    speculation_tokens: int = 8

    @property
    def draft_model(self) -> str | None:
        """Folder of the draft model; None: there is none."""
        return None if self.speculation in ("none", "ngram") else self.speculation
