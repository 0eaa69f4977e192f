"""The conformance kit finds what is planted, and nothing else."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from forebay.api import (
    Adapter,
    AdapterKind,
    Attempt,
    BackendRefused,
    BackendSettings,
    Capabilities,
    Delta,
    Endpoint,
    Event,
    Finished,
    GenerateRequest,
    Started,
    Usage,
    hookimpl,
)
from forebay.cli import conformance as command
from forebay.cli import main
from forebay.config import Logging
from forebay.conformance import CHECKS, Check, Report, Result, Subject, examine, markdown
from forebay.conformance.judging import judge
from forebay.conformance.subject import staged
from forebay.loader import Registry, load_plugins
from forebay.telemetry import logs
from forebay.testing import ScriptedServer

FAST = {"examine": False, "decode_rate": 1000, "prefill_rate": 0, "answer_tokens": 2000}


@pytest.fixture(autouse=True)
def _quiet(logging_as_before: None) -> None:
    logs.configure(Logging(level="error", format="console"))


def honest(faults: set[str]) -> Any:
    path = Path(__file__).parents[1] / "fakes" / "honest_openai.py"
    spec = importlib.util.spec_from_file_location("honest_openai", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.server(faults)


def plain(url: str) -> Subject:
    """Not examined by the gateway itself, whose findings would get before the kit's."""
    settings = {"examine": False}
    return Subject(adapter="openai", target=url, settings=settings, fake=True, timeout=10)


@asynccontextmanager
async def examined(*faults: str) -> AsyncIterator[Subject]:
    async with ScriptedServer(honest(set(faults))) as server:
        yield plain(server.url)


def checks(*names: str) -> list[Check]:
    return [check for check in CHECKS if {check.id, check.area} & set(names)]


def test_there_are_some_eighty_promises_and_more() -> None:
    assert len(CHECKS) >= 80
    assert len({check.id for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert check.promise[0].isupper() or check.promise[0] == "`", check.id
        assert not check.promise.endswith("."), check.id
        assert re.fullmatch(r"[a-z]+\.[a-z0-9-]+", check.id)


def test_areas_stand_together() -> None:
    areas = [check.area for check in CHECKS]
    assert areas == sorted(areas, key=areas.index)


PLANTED = {
    ("ids", "shapes.id-constant"): "repaired",
    ("created", "shapes.created-constant"): "repaired",
    ("model", "shapes.model-name"): "repaired",
    ("finish", "shapes.chat"): "repaired",
    ("two roles", "streaming.role-once"): "repaired",
    ("no role", "streaming.first-chunk"): "repaired",
    ("no done", "streaming.done"): "repaired",
    ("two dones", "streaming.done"): "repaired",
    ("one piece", "streaming.pieces"): "broken",
    ("comments", "streaming.lines"): "repaired",
    ("usage with choices", "usage.stream"): "repaired",
    ("usage everywhere", "usage.stream-once"): "repaired",
    ("usage unasked", "usage.stream-unasked"): "repaired",
    ("sum", "usage.adds-up"): "broken",
    ("limit", "length.max-tokens"): "broken",
    ("stop", "stop.string"): "broken",
    ("one choice", "sampling.choices"): "broken",
    ("top_k", "sampling.top-k"): "broken",
    ("cut characters", "text.multibyte"): "broken",
    ("unguided", "guidance.json-schema"): "broken",
    ("refused", "guidance.json-schema"): "broken",
}


async def test_each_planted_fault_is_found_and_nothing_without_it() -> None:
    """By the check for it, in the server, and by its verdict what the adapter makes of it."""
    faults: set[str] = set()
    found: dict[tuple[str, str], Result] = {}
    clean: set[tuple[str, str | None]] = set()
    async with (
        ScriptedServer(honest(faults)) as server,
        staged(plain(server.url), load_plugins()) as stage,
    ):
        for fault, name in PLANTED:
            (check,) = checks(name)
            faults.clear()
            result = await judge(check, stage, 10)
            clean.add((result.verdict, result.direct))
            faults.add(fault)
            found[fault, name] = await judge(check, stage, 10)
    assert clean == {("passed", "holds")}
    assert [planted for planted in found if found[planted].direct == "holds"] == []
    assert {planted: result.verdict for planted, result in found.items()} == PLANTED


async def test_an_honest_server_is_told_so() -> None:
    async with examined() as subject:
        report = await examine(subject, load_plugins(), checks("shapes", "streaming", "usage"))
    assert {result.id: result.reason for result in report.broken} == {}
    assert report.model == "honest"
    assert report.target == "fake"


async def test_simulated() -> None:
    """Its tokenizer counts bytes where its generator counts words: the kit is right to say so."""
    subject = Subject(adapter="simulated", settings=FAST)
    told: list[Result] = []
    report = await examine(subject, load_plugins(), told=told.append)
    assert [result.id for result in report.broken] == ["dialects.count-tokens"]
    assert [result.id for result in report.results] == [check.id for check in CHECKS]
    assert {result.id for result in told} == {check.id for check in CHECKS}
    assert {result.direct for result in report.results} == {None}
    assert report.counts["repaired"] == 0
    verdicts = {result.id: result.verdict for result in report.results}
    assert verdicts["tools.forced"] == "lacking"
    assert verdicts["operations.rerank"] == "passed"
    assert verdicts["disconnect.stream-stops"] == "passed"


class Stub(Adapter):
    """Claims more than it can do, or refuses, or lies; as its test says."""

    claims = Capabilities(slots=4)

    async def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        if request.sampling.seed is not None:
            raise BackendRefused("seeds are not supported here", param="seed")
        yield Started()
        for word in ("a", " b", " c", " d"):
            yield Delta(0, word)
        yield Delta(0, finish_reason="stop")
        yield Finished(Usage(3, 4))

    async def probe(self) -> Capabilities:
        return self.claims


def stubbed(claims: Capabilities = Stub.claims) -> Registry:
    class Plugin:
        @hookimpl
        def adapters(self) -> list[AdapterKind]:
            return [AdapterKind(name="stub", settings=BackendSettings, build=self.build)]

        def build(self, settings: object, context: object) -> Adapter:
            stub = Stub()
            stub.claims = claims
            return stub

    return load_plugins(extra={"stub": Plugin()})


async def verdicts_of(*names: str, claims: Capabilities = Stub.claims) -> dict[str, str]:
    """Of the stub: ``verdict reason`` by check."""
    subject = Subject(adapter="stub", timeout=5, settings={"examine": False})
    report = await examine(subject, stubbed(claims), checks(*names))
    return {result.id: f"{result.verdict} {result.reason}" for result in report.results}


async def test_what_is_ignored_is_broken_and_what_is_refused_is_lacking() -> None:
    found = await verdicts_of("shapes.chat", "sampling.seed", "sampling.logit-bias", "tools.forced")
    assert found["shapes.chat"] == "passed "
    assert found["sampling.seed"].startswith("lacking HTTP 400: seed: seeds are not supported")
    assert found["sampling.logit-bias"].startswith("broken")
    assert found["tools.forced"].startswith("lacking")
    assert "cannot call tools" in found["tools.forced"]


async def test_what_is_claimed_must_hold() -> None:
    endpoints = frozenset[Endpoint]({"chat", "embeddings"})
    claims = Capabilities(endpoints=endpoints, tools=True)
    found = await verdicts_of("tools.forced", "operations.embeddings", claims=claims)
    assert found["tools.forced"].startswith("broken")
    assert found["operations.embeddings"].startswith("broken claims embeddings, but: ")


async def test_a_report_survives_its_json_and_is_readable() -> None:
    async with examined("ids", "limit") as subject:
        report = await examine(subject, load_plugins(), checks("shapes", "length"))
    again = msgspec.json.decode(msgspec.json.encode(report), type=Report)
    assert again == report
    text = markdown(report)
    assert "not the real server" in text
    assert "127.0.0.1" not in text
    assert "| id-constant | `id` is the same in all chunks, and not empty | repaired |" in text
    assert "| max-tokens |" in text


async def test_what_the_gateway_finds_out_itself_is_lacking_and_not_broken() -> None:
    async with ScriptedServer(honest({"unguided"})) as server:
        subject = Subject(adapter="openai", target=server.url, timeout=20)
        report = await examine(subject, load_plugins(), checks("guidance.json-schema"))
    (result,) = report.results
    assert result.verdict == "lacking"
    assert "schema" not in report.claims


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`forebay conformance …`: its exit code, and what it prints."""
    monkeypatch.setattr(command, "load_plugins", stubbed)

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["conformance", *arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        return done.exit_code, done.output

    return run


def test_the_exit_code_tells_of_a_broken_promise(run: Run, tmp_path: Path) -> None:
    plain_stub = ["--adapter", "stub", "--set", "examine=false"]
    code, output = run(*plain_stub, "--only", "length.one", "--only", "shapes")
    assert code == 1
    assert "length.one\n    it has 4 tokens instead of 1" in output
    files = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    code, output = run(*plain_stub, "--only", "sampling.seed", "--fake", *files)
    assert code == 0
    assert "HTTP 400: seed: seeds are not supported here" in output
    report = msgspec.json.decode((tmp_path / "a.json").read_bytes(), type=Report)
    assert (report.target, report.counts["lacking"]) == ("fake", 1)
    assert "seeds are not supported here" in (tmp_path / "a.md").read_text()


def test_all_checks_can_be_listed(run: Run) -> None:
    code, output = run("--list")
    assert code == 0
    assert all(check.id in output for check in CHECKS)
    assert "shapes.chat" not in run("--list", "--only", "usage")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:9"], "--adapter NAME"),
        (["http://127.0.0.1:9", "--adapter", "vlm"], "did you mean 'vllm'?"),
        (["--adapter", "vllm"], "the adapter 'vllm' needs a target: its url"),
        (["--adapter", "simulated", "x"], "leave the target 'x' out"),
        (["http://127.0.0.1:9", "--adapter", "vllm"], "the backend is not ready"),
        (["http://127.0.0.1:9", "--adapter", "vllm", "--model", "m"], "the backend is not ready"),
        (["--adapter", "simulated", "--set", "slots"], "write KEY=VALUE"),
        (["--adapter", "simulated", "--set", "slots=many"], "expected a whole number"),
        (["--adapter", "simulated", "--set", "slot=1"], "did you mean"),
        (["--adapter", "simulated", "--only", "shapes.chatt"], "did you mean 'shapes.chat'?"),
        (["no-such-model", "--adapter", "native"], "no model at"),
        (["--adapter", "simulated", "--json", "/no/such/a.json"], "in a folder that is there"),
    ],
)
def test_mistakes_are_told_with_their_remedy(run: Run, arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert code in (1, 2)
    assert message in " ".join(output.split())
