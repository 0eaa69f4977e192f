"""What backends claim is put to the test, and requests go only where it holds.

Over real sockets: a server in the manner of vLLM, which can be told in which points to lie.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from msgspec import structs

from forebay import examiner
from forebay import questions as asking
from forebay.api import Adapter, AdapterKind, BackendSettings, Capabilities
from forebay.backend import Backend
from forebay.config import Config, Health, Model
from forebay.examination import Finding, questions
from forebay.examiner import Examiner
from forebay.health import Health as HealthState
from forebay.questions import examine
from forebay.testing import Exchange, ScriptedServer, adapter_context
from forebay_plugins.openai import OpenAIAdapter, OpenAISettings
from forebay_plugins.vllm import VllmAdapter, VllmSettings

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
PATHS = {"/v1/chat/completions": {}, "/v1/completions": {}}


class Server:
    """Serves text as vLLM does. A lie is what it ignores without a word; `no FIELD` is refused,
    `broken FIELD` fails."""

    def __init__(self, *lies: str) -> None:
        self.lies = set(lies)
        self.version = "1"
        self.working = 0
        #: Bodies of all requests for text.
        self.asked: list[dict[str, Any]] = []
        #: Requests for text wait for it.
        self.open = asyncio.Event()
        self.open.set()
        self.status = 200
        self._turn = itertools.count()
        #: Connections on which it has been asked for text.
        self._used: set[asyncio.Transport] = set()

    async def __call__(self, exchange: Exchange) -> None:
        if exchange.method == "GET":
            self._get(exchange)
            return
        asked = exchange.json
        self.asked.append(asked)
        if "keep-alive" in self.lies and exchange._transport in self._used:
            exchange.cut()
            return
        self._used.add(exchange._transport)
        if self.status != 200:
            exchange.answer(self.status, {"error": {"message": "not now"}})
        elif any(f"broken {name}" in self.lies for name in asked):
            exchange.answer(500, {"error": {"message": "a bug"}})
        elif refused := next((f"no {name}" for name in asked if f"no {name}" in self.lies), None):
            exchange.answer(400, {"error": {"message": f"{refused}!"}})
        else:
            await self._serve(exchange, asked)

    def _get(self, exchange: Exchange) -> None:
        answers: dict[str, object] = {
            "/health": b"",
            "/version": {"version": self.version},
            "/openapi.json": {"paths": PATHS},
            "/v1/models": {"data": [{"id": "m"}]},
            "/metrics": f"vllm:num_requests_running {self.working}\n".encode(),
        }
        exchange.answer(200, answers[exchange.path])

    async def _serve(self, exchange: Exchange, asked: dict[str, Any]) -> None:
        self.working += 1
        try:
            await self.open.wait()
            exchange.begin()
            async for delta, logprobs in self._pieces(asked):
                self._send(exchange, asked, delta, logprobs)
            if "usage" not in self.lies:
                usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
                self._chunk(exchange, [], usage=usage)
            exchange.send(b"data: [DONE]\n\n")
        finally:
            # One that does not notice that its client has left.
            self.working -= not ("cancel" in self.lies and asked["max_tokens"] > 100)

    async def _pieces(self, asked: dict[str, Any]) -> AsyncIterator[tuple[dict[str, Any], bool]]:
        chat = "messages" in asked
        given = asked.get("response_format")
        if given and chat and self.lies & {"half", "cut"}:
            yield {"content": '{"word":'}, False
            yield {"finish": "stop" if "half" in self.lies else "length"}, False
        elif given and ("schema" if chat else "completions") not in self.lies:
            yield {"content": json.dumps({"word": _word(given["json_schema"]["schema"])})}, False
            yield {"finish": "stop"}, False
        elif asked.get("tool_choice") and "tools" not in self.lies:
            function = asked["tools"][0]["function"]
            arguments = json.dumps({"word": _word(function["parameters"])})
            call = {"name": function["name"], "arguments": arguments}
            yield {"tool_calls": [{"index": 0, "id": "c", "function": call}]}, False
            yield {"finish": "tool_calls"}, False
        else:
            async for piece in self._text(asked):
                yield piece

    async def _text(self, asked: dict[str, Any]) -> AsyncIterator[tuple[dict[str, Any], bool]]:
        logprobs = asked.get("logprobs") is not None and "logprobs" not in self.lies
        shift = next(self._turn) if "moody" in self.lies else 0
        numbers = range(shift, shift + asked["max_tokens"])
        pieces, finish = [f"{WORDS[number % len(WORDS)]} " for number in numbers], "length"
        for stop in asked.get("stop", ()) if "stop" not in self.lies else ():
            text, found, _ = "".join(pieces).partition(stop)
            if found:
                pieces, finish = [text], "stop"
        for number, piece in enumerate(pieces):
            yield {"content": piece}, logprobs
            if number > 20:
                await asyncio.sleep(0.005)
        yield {"finish": finish}, False

    def _send(
        self, exchange: Exchange, asked: dict[str, Any], delta: dict[str, Any], logprobs: bool
    ) -> None:
        finish = delta.pop("finish", None)
        content = delta.get("content", "")
        known: dict[str, Any] | None = None
        if logprobs:
            known = {"content": [{"token": content, "logprob": -0.5, "top_logprobs": []}]}
        said = {"delta": delta} if "messages" in asked else {"text": content}
        self._chunk(exchange, [{"index": 0, **said, "finish_reason": finish, "logprobs": known}])

    def _chunk(self, exchange: Exchange, choices: list[Any], **more: object) -> None:
        chunk = {"id": "c", "created": 1, "model": "m", "choices": choices, **more}
        exchange.send(b"data: " + json.dumps(chunk).encode() + b"\n\n")


def _word(schema: dict[str, Any]) -> str:
    """The only one that the schema of an examination allows; any for a client's."""
    word: str = schema.get("properties", {}).get("word", {}).get("enum", ["free"])[0]
    return word


@asynccontextmanager
async def examined(server: Server, adapter: str = "vllm") -> AsyncIterator[Callable[[], Any]]:
    """A function that examines the server and returns the findings."""
    async with ScriptedServer(server) as scripted:
        made: Adapter
        if adapter == "vllm":
            made = VllmAdapter(VllmSettings(adapter="vllm", url=scripted.url), adapter_context())
        else:
            settings = OpenAISettings(adapter="openai", url=scripted.url)
            made = OpenAIAdapter(settings, adapter_context())

        async def findings() -> dict[str, Finding]:
            claims = await made.probe()
            return {
                question: finding
                async for question, finding in examine(
                    made, claims, "m", questions(claims), lambda: 0
                )
            }

        yield findings
        await made.aclose()


ALL = {"usage", "stop", "schema", "completions_schema", "tools", "logprobs", "cancel"}


async def test_a_server_that_keeps_its_word() -> None:
    server = Server()
    async with examined(server) as findings:
        assert await findings() == dict.fromkeys(ALL, Finding("holds"))
    assert server.working == 0
    assert sum(asked["max_tokens"] for asked in server.asked if asked["max_tokens"] < 1000) < 300


@pytest.mark.parametrize(
    ("lie", "question", "reason"),
    [
        ("usage", "usage", "without token counts"),
        ("stop", "stop", "came in the answer"),
        ("no stop", "stop", "refused: no stop!"),
        ("schema", "schema", "did not bind: 'one two"),
        ("completions", "completions_schema", "did not bind: 'one two"),
        ("half", "schema", """did not bind: '{"word":'"""),
        ("tools", "tools", "no call of a tool, but 'one two"),
        ("no tools", "tools", "refused: no tools!"),
        ("logprobs", "logprobs", "none came"),
        ("no logprobs", "logprobs", "refused: no logprobs!"),
        ("cancel", "cancel", "still at work"),
    ],
)
async def test_a_lie_is_found_out(
    monkeypatch: pytest.MonkeyPatch, lie: str, question: str, reason: str
) -> None:
    if lie == "cancel":
        monkeypatch.setattr(asking, "LEAVING", 0.3)
    async with examined(Server(lie)) as findings:
        found = await findings()
    told = found.pop(question)
    assert (told.verdict, reason in told.reason, told.again) == ("fails", True, False), told
    assert found == dict.fromkeys(ALL - {question}, Finding("holds"))


async def test_connections_that_are_not_kept_say_nothing() -> None:
    """llama.cpp drops them after each stream, and only its own adapter knows."""
    async with examined(Server("keep-alive")) as findings:
        assert await findings() == dict.fromkeys(ALL, Finding("holds"))


async def test_what_cannot_be_told_is_not_held_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with examined(Server(), "openai") as findings:
        assert (await findings())["cancel"] == Finding(
            "unknown", "it does not say what it is working on"
        )
    async with examined(Server("moody")) as findings:
        assert (await findings())["stop"].verdict == "unknown"
    async with examined(Server("cut")) as findings:
        assert (await findings())["schema"].verdict == "unknown"
    async with examined(Server("no tool_choice")) as findings:
        assert (await findings())["tools"].verdict == "unknown"
    async with examined(Server("no temperature")) as findings:
        found = await findings()
        assert found.keys() == ALL
        assert {(each.verdict, each.again) for each in found.values()} == {("unknown", False)}
        assert "no temperature!" in found["schema"].reason


async def test_what_it_fails_at_it_cannot_do_for_now() -> None:
    async with examined(Server("broken logprobs")) as findings:
        told = (await findings())["logprobs"]
        assert (told.verdict, told.again) == ("fails", True)


@pytest.mark.parametrize("how", ["busy", "broken", "slow"])
async def test_a_bad_moment_is_worth_asking_again(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    server = Server()
    async with examined(server) as findings:
        server.status = {"busy": 503, "broken": 500}.get(how, 200)
        with monkeypatch.context() as patch:
            if how == "slow":
                server.open.clear()
                patch.setattr(asking, "PATIENCE", 0.2)
            found = await findings()
        assert {(each.verdict, each.again) for each in found.values()} == {("unknown", True)}
        server.status = 200
        server.open.set()
        assert await findings() == dict.fromkeys(ALL, Finding("holds"))


def test_only_claims_are_asked_about() -> None:
    assert questions(Capabilities(endpoints=frozenset({"embeddings"}))) == ()
    bare = Capabilities(endpoints=frozenset({"completions"}), stop=False)
    assert questions(bare) == ("usage", "cancel")
    able = Capabilities(endpoints=frozenset({"completions"}), tools=True, schema=True)
    assert questions(able) == ("usage", "stop", "completions_schema", "cancel")


# In the gateway


@pytest.fixture
async def fleet(serve_gateway) -> AsyncIterator[Callable[..., Any]]:
    """``await fleet(a=Server(), …)``: a gateway over them that examines them."""
    async with AsyncExitStack() as stack:

        async def start(
            *, examine: bool = True, wait: bool = True, max_queue: int = 9, **servers: Server
        ) -> Any:
            backends = {
                name: VllmSettings(
                    adapter="vllm",
                    url=(await stack.enter_async_context(ScriptedServer(server))).url,
                    probe_interval=0.05,
                )
                for name, server in servers.items()
            }
            model = Model(backends=list(servers), policy="round_robin", max_queue=max_queue)
            config = Config(backends=backends, models={"m": model})
            gateway = await serve_gateway(config, examine=examine)
            if wait:
                await until(lambda: all(settled(gateway, name) for name in servers))
            return gateway

        yield start


def settled(gateway: Any, name: str) -> bool:
    found = gateway.app.fleet.backends[name].examination
    return found is not None and not found.pending


def findings_of(gateway: Any, name: str) -> dict[str, str]:
    found = gateway.app.fleet.backends[name].examination.findings
    return {question: finding.verdict for question, finding in found.items()}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def ask(client: httpx.AsyncClient, path: str = "chat/completions", **fields: Any) -> Any:
    return await client.post(f"/v1/{path}", json={**CHAT, "stream": True, **fields})


@pytest.mark.parametrize(
    ("lie", "fields", "words"),
    [
        ("schema", {"response_format": SCHEMA}, "keep to a schema"),
        ("no tools", {"tools": TOOLS}, "call tools"),
        ("logprobs", {"logprobs": True}, "give logprobs"),
        ("stop", {"stop": ["ninety"]}, "heed stop strings"),
    ],
)
async def test_requests_go_only_where_it_holds(
    fleet, lie: str, fields: dict[str, Any], words: str
) -> None:
    gateway = await fleet(liar=Server(lie), honest=Server())
    async with gateway.client() as client:
        plain = {(await ask(client)).headers["x-forebay-backend"] for _ in range(4)}
        assert plain == {"liar", "honest"}, "of other things it is capable"
        bound = {(await ask(client, **fields)).headers["x-forebay-backend"] for _ in range(4)}
        assert bound == {"honest"}
        gateway.app.fleet.backends["honest"].examination = None
        gateway.app.fleet.backends["honest"].capabilities = Capabilities(stop=False)
        refused = await ask(client, **fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unsupported"
    assert f"liar was found not to {words}" in refused.json()["error"]["message"]
    assert f"honest cannot {words}" in refused.json()["error"]["message"]


async def test_a_schema_may_bind_in_chats_alone(fleet) -> None:
    gateway = await fleet(liar=Server("completions"))
    async with gateway.client() as client:
        assert (await ask(client, response_format=SCHEMA)).status_code == 200
        body = {"model": "m", "prompt": "hi", "response_format": SCHEMA}
        assert (await client.post("/v1/completions", json=body)).status_code == 400


async def test_while_it_is_examined_only_what_needs_the_answer_waits(fleet) -> None:
    server = Server()
    server.open.clear()
    gateway = await fleet(a=server, wait=False)
    await until(lambda: server.working == 1)
    async with gateway.client() as client:
        bound = asyncio.create_task(ask(client, response_format=SCHEMA))
        await until(lambda: gateway.app.admission.depths() == {"m": 1})
        plain = asyncio.create_task(ask(client))
        await until(lambda: server.working == 2)
        assert gateway.app.fleet.backends["a"].in_flight == 1, "an examination is nobody's request"
        assert not bound.done()
        server.open.set()
        assert (await plain).status_code == 200
        assert (await bound).status_code == 200
        (decision,) = gateway.app.decisions.recent(1)
        assert decision.outcome.queue > 0


async def test_no_more_wait_for_the_answer_than_the_queue_allows(fleet) -> None:
    server = Server()
    server.open.clear()
    gateway = await fleet(a=server, wait=False, max_queue=1)
    async with gateway.client() as client:
        first = asyncio.create_task(ask(client, logprobs=True))
        await until(lambda: gateway.app.admission.depths() == {"m": 1})
        second = await ask(client, logprobs=True)
        assert (second.status_code, second.json()["error"]["code"]) == (503, "overloaded")
        server.open.set()
        assert (await first).status_code == 200


async def test_a_new_version_is_examined_anew_and_an_old_one_not(fleet) -> None:
    server = Server()
    gateway = await fleet(a=server)
    backend = gateway.app.fleet.backends["a"]
    asked, first = len(server.asked), backend.examination
    await asyncio.sleep(0.3)  # some probes
    assert len(server.asked) == asked
    server.lies.add("schema")
    server.version = "2"
    await until(lambda: backend.examination is not first and settled(gateway, "a"))
    assert findings_of(gateway, "a")["schema"] == "fails"
    assert backend.examination.version == "2"


async def test_it_is_nobodys_traffic(fleet) -> None:
    server = Server()
    gateway = await fleet(a=server)
    backend = gateway.app.fleet.backends["a"]
    assert server.asked
    assert (backend.requests, backend.failures, backend.in_flight) == (0, 0, 0)
    assert backend.ttft is None
    assert list(gateway.app.decisions.recent(9)) == []


async def test_failures_in_it_do_not_speak_against_its_health(fleet) -> None:
    server = Server()
    server.status = 500
    gateway = await fleet(a=server)
    assert set(findings_of(gateway, "a").values()) == {"unknown"}
    backend = gateway.app.fleet.backends["a"]
    assert (backend.state(), backend.failures) == ("healthy", 0)
    server.status = 200
    async with gateway.client() as client:
        answer = await ask(client, response_format=SCHEMA)
    assert answer.status_code == 200, "what could not be told is believed"


async def test_what_could_not_be_told_is_asked_again_but_not_for_ever(
    fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examiner, "PAUSE", 0.05)
    recovers, stays = Server(), Server()
    recovers.status = stays.status = 503
    gateway = await fleet(recovers=recovers, stays=stays)
    recovers.status = 200
    await until(lambda: set(findings_of(gateway, "recovers").values()) == {"holds"})
    await until(lambda: len(stays.asked) == 1 + examiner.RETRIES)
    await asyncio.sleep(1.2)  # the next would come after 0.8 s
    assert len(stays.asked) == 1 + examiner.RETRIES, "one plain request each time, and no more"


async def test_it_has_an_end(fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examiner, "LIMIT", 0.3)
    server = Server()
    server.open.clear()
    gateway = await fleet(a=server)
    found = gateway.app.fleet.backends["a"].examination.findings
    assert {(each.verdict, each.reason) for each in found.values()} == {
        ("unknown", "not told within 0.3 s")
    }
    await until(lambda: server.working == 0)


async def test_it_can_be_switched_off(fleet) -> None:
    server = Server("schema")
    gateway = await fleet(a=server, examine=False, wait=False)
    async with gateway.client() as client:
        assert (await ask(client, response_format=SCHEMA)).status_code == 200
    assert len(server.asked) == 1
    assert gateway.app.fleet.backends["a"].examination is None


@pytest.fixture
async def watched() -> AsyncIterator[tuple[Server, Backend, Examiner]]:
    """An examiner of a backend with one slot."""
    server = Server()
    async with ScriptedServer(server) as scripted:
        settings = VllmSettings(adapter="vllm", url=scripted.url, max_in_flight=1)
        kind = AdapterKind(name="vllm", settings=BackendSettings, build=VllmAdapter)
        adapter = VllmAdapter(settings, adapter_context())
        backend = Backend("a", settings, kind, adapter, HealthState(Health()))
        backend.health.probe_ok()
        examining = Examiner(backend, "m", lambda: None)
        yield server, backend, examining
        await examining.aclose()
        await adapter.aclose()


async def test_clients_come_first(watched) -> None:
    server, backend, examining = watched
    backend.in_flight = 1
    examining.probed(await backend.adapter.probe())
    await asyncio.sleep(0.3)
    assert server.asked == []
    backend.in_flight = 0
    await until(lambda: not backend.examination.pending)
    assert len(server.asked) > 5


@pytest.mark.parametrize("version", ["1", ""])
async def test_one_that_returns_without_a_version_may_be_another(watched, version: str) -> None:
    _, backend, examining = watched
    claims = structs.replace(await backend.adapter.probe(), version=version)
    examining.probed(claims)
    await until(lambda: not backend.examination.pending)
    before = backend.examination
    examining.lost()
    examining.probed(claims)
    assert (backend.examination is before) == (version == "1")


async def test_the_admin_port_tells(fleet) -> None:
    gateway = await fleet(a=Server("schema"))
    async with gateway.admin() as admin:
        (backend,) = (await admin.get("/backends")).json()["backends"]
    told = backend["examination"]
    assert (told["version"], told["pending"]) == ("1", [])
    assert told["seconds"] > 0
    assert told["findings"]["stop"] == {"verdict": "holds", "reason": "", "again": False}
    assert told["findings"]["schema"]["verdict"] == "fails"
    assert backend["capabilities"]["schema"] is True, "the claim stays visible"
