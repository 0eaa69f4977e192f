"""The clients that people use, each with its list of steps, before every kind of real backend."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ROOT / "scripts" / "backends" / "backends.sh"
CLIENTS = ROOT / "tests" / "e2e" / "clients"
INSTALLED = Path(os.environ.get("BACKENDS_DIR", Path.home() / ".cache/forebay-backends"), "clients")
STEPS = json.loads((CLIENTS / "steps.json").read_text())
KEY = "sk-of-the-clients"
SCRIPTS = {
    "openai-python": "openai_python.py",
    "openai-node": "openai_node.mjs",
    "anthropic": "anthropic_python.py",
    "langchain-openai": "langchain_with_openai.py",
    "langchain-anthropic": "langchain_with_anthropic.py",
    "llama-index": "llama_index_steps.py",
}
#: What each backend is known to be able to do. More may be found; the rest has to be refused.
ABLE = {
    "native": {"logprobs", "tokenize"},
    "llama": {"logprobs", "tokenize", "schema"},
    "vllm": {"logprobs", "tokenize", "schema", "tools"},
    "triton": {"logprobs"},
}
#: The documentation's blocks of code, with their language.
BLOCK = re.compile(r"```(python|js)\n(.*?)```", re.S)
SHOWN = BLOCK.findall((ROOT / "docs" / "clients.md").read_text())


@pytest.fixture(scope="module")
def run_script(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script, by its name or a new one with its text, in the clients' environment."""
    if subprocess.check_output([BACKENDS, "missing", "clients"]):
        pytest.fail("not installed: run scripts/backends/backends.sh install clients")
    folder = tmp_path_factory.mktemp("scripts") / "clients"
    shutil.copytree(CLIENTS, folder)
    # Node looks for modules beside the script, and nowhere else.
    (folder / "node_modules").symlink_to(INSTALLED / "node_modules")
    interpreters = {".py": str(INSTALLED / "venv/bin/python"), ".mjs": "node"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(name: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        script = folder / name
        if text:
            script.write_text(text)
        command = [interpreters[script.suffix], str(script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


@pytest.fixture(scope="module")
def front(backends: dict[str, Any], triton_server: Any, start_gateway: Callable[..., Any]) -> Any:
    """A gateway that asks for a key, with each backend behind a model of its name."""
    triton = {"adapter": "triton", "url": triton_server.url}
    behind = {name: backends[name] for name in ("native", "llama", "vllm")}
    behind["triton"] = {**triton, "model": "ensemble", "chat_template": "gemma"}
    behind["embedder"] = {**triton, "model": "embedder"}
    # Four engines share the machine: whether one is slow is not the question here.
    patient = {"timeouts": {"first_token": 300, "inter_token": 120}}
    models = {name: {"backends": [name], **patient} for name in behind}
    config = {
        "backends": behind,
        # Under the name that the documentation uses.
        "models": {**models, "gemma-3-270m": models["vllm"]},
        "keys": {"clients": {"hash": f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"}},
    }
    gateway = start_gateway("clients", config)
    for name in behind:
        gateway.wait_until(name, state="healthy")
        gateway.wait_until_examined(name)
    return gateway


def capabilities(gateway: Any, backend: str) -> set[str]:
    found = gateway.backend(backend)["capabilities"]
    flags = {name for name in ("tools", "schema", "logprobs", "multimodal") if found[name]}
    return flags | set(found["endpoints"])


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("client", SCRIPTS)
def test_steps(front: Any, run_script: Callable[..., Any], client: str, backend: str) -> None:
    can = capabilities(front, backend)
    assert can >= ABLE[backend]
    given = {
        "url": front.url,
        "admin": front.admin,
        "key": KEY,
        "model": backend,
        "embedder": "embedder",
        "can": sorted(can),
    }
    done = run_script(SCRIPTS[client], json.dumps(given))
    taken = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [f"{step['name']}: {step['detail']}" for step in taken if not step["ok"]]
    assert not failed, "\n".join(failed)
    assert [step["name"] for step in taken] == STEPS["clients"][client], done.stderr


@pytest.mark.parametrize("number", range(len(SHOWN)))
def test_the_documentation(front: Any, run_script: Callable[..., Any], number: int) -> None:
    language, code = SHOWN[number]
    text = code.replace("http://127.0.0.1:8000", front.url).replace("sk-...", KEY)
    name = f"shown{number}.{'py' if language == 'python' else 'mjs'}"
    done = run_script(name, text=text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
