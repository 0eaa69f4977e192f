"""What is put before the conformance kit: each fake, the adapter for it, and its settings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from msgspec import Struct

from fake_servers.anthropic import Anthropic
from fake_servers.llamacpp import LlamaCpp, LlamaCppEmbedding, LlamaCppReranking
from fake_servers.ollama import Ollama
from fake_servers.plain_openai import PlainOpenAI
from fake_servers.serving import FakeServer
from fake_servers.sglang import Sglang, SglangEmbedding
from fake_servers.tgi import Tgi
from fake_servers.triton import Triton
from fake_servers.triton_openai import TritonOpenAI, TritonOpenAIEmbedding
from fake_servers.trtllm import TrtLlm
from fake_servers.vllm import Vllm, VllmPooling
from forebay.conformance import CHECKS, Check, Report, Subject, examine
from forebay.loader import load_plugins

__all__ = ["PLAYED", "Played", "examined"]


class Played(Struct, frozen=True):
    """One server and how it is examined. ``URL`` in a setting stands for the server's."""

    adapter: str
    server: type[FakeServer]
    settings: Mapping[str, Any] = {}
    #: Areas of checks; all if empty.
    areas: Sequence[str] = ()
    #: Its report is a column of docs/backends.md.
    shown: bool = False


_TRITON = {"chat_template": "gemma", "max_context": 4096, "metrics_url": "URL"}
_FRONTEND = {"tools": True, "vllm": True, "max_context": 4096, "slots": 4}
_OPERATIONS = ("operations",)

PLAYED: Mapping[str, Played] = {
    "anthropic": Played("anthropic", Anthropic, {"max_context": 4096, "slots": 4}, shown=True),
    "llamacpp": Played("llamacpp", LlamaCpp),
    "llamacpp-embedding": Played("llamacpp", LlamaCppEmbedding, areas=_OPERATIONS),
    "llamacpp-reranking": Played("llamacpp", LlamaCppReranking, areas=_OPERATIONS),
    "ollama": Played("ollama", Ollama, {"model": "gemma-3-270m:latest"}, shown=True),
    "openai": Played("openai", PlainOpenAI, {"slots": 4}, shown=True),
    "sglang": Played("sglang", Sglang, shown=True),
    "sglang-embedding": Played("sglang", SglangEmbedding, {"rerank": True}, _OPERATIONS),
    "tgi": Played("tgi", Tgi, shown=True),
    "triton-embedder": Played("triton", Triton, {"model": "embedder"}, _OPERATIONS),
    "triton-ensemble": Played("triton", Triton, {"model": "ensemble", **_TRITON}),
    "triton-vllm": Played("triton", Triton, {"model": "vllm_model", **_TRITON}),
    "triton_openai": Played("triton_openai", TritonOpenAI, _FRONTEND, shown=True),
    "triton_openai-embedding": Played(
        "triton_openai", TritonOpenAIEmbedding, {"endpoints": ["embeddings"]}, _OPERATIONS
    ),
    "trtllm": Played("trtllm", TrtLlm, {"tools": True, "max_context": 4096}, shown=True),
    "vllm": Played("vllm", Vllm),
    "vllm-pooling": Played("vllm", VllmPooling, areas=_OPERATIONS),
}


@asynccontextmanager
async def serving(played: Played) -> AsyncIterator[Subject]:
    async with played.server() as server:
        settings = {
            name: server.url if value == "URL" else value for name, value in played.settings.items()
        }
        yield Subject(
            adapter=played.adapter, target=server.url, settings=settings, fake=True, timeout=20
        )


async def examined(name: str) -> Report:
    played = PLAYED[name]
    checks: Sequence[Check] = [
        check for check in CHECKS if not played.areas or check.area in played.areas
    ]
    async with serving(played) as subject:
        return await examine(subject, load_plugins(), checks)
