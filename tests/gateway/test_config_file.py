from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Meta

from forebay.access import hash_of
from forebay.api import (
    AdapterKind,
    BackendSettings,
    ConfigError,
    GenerateRequest,
    HttpBackendSettings,
    Policy,
    PolicyKind,
    Snapshot,
    Timeouts,
    hookimpl,
)
from forebay.config import (
    Admin,
    Config,
    Health,
    Key,
    Limits,
    Listen,
    Logging,
    Model,
    Plugins,
    Section,
    Share,
    Tracing,
)
from forebay.config_file import InvalidConfig, build, load, parse, read_tree, warnings
from forebay.config_file.reader import Reader
from forebay.loader import Registry, load_plugins


class LlamaSettings(HttpBackendSettings, kw_only=True, frozen=True):
    slots: Annotated[int, Meta(ge=1)] = 1


class NativeSettings(BackendSettings, kw_only=True, frozen=True):
    path: str
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32"):
            raise ValueError("dtype must be auto or float32")


def _never_built(*_: Any) -> Any:
    raise AssertionError("reading a configuration builds no adapter")


class StandInPlugin:
    """Two adapters and a policy, offered as any plugin would."""

    @hookimpl
    def adapters(self) -> list[AdapterKind]:
        return [
            AdapterKind(name="llamacpp", settings=LlamaSettings, build=_never_built),
            AdapterKind(name="native", settings=NativeSettings, build=_never_built),
        ]

    @hookimpl
    def policies(self) -> list[PolicyKind]:
        names = ("round_robin", "prefix_affinity")
        return [PolicyKind(name=name, build=lambda _: StandInPolicy()) for name in names]


class StandInPolicy(Policy):
    def score(self, request: GenerateRequest, snapshot: Snapshot) -> list[float]:
        raise AssertionError("not part of reading a configuration")


def registry() -> Registry:
    return load_plugins([], {"stand-in": StandInPlugin()})


@pytest.fixture(autouse=True)
def _nothing_else_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay.loader.entry_points", lambda group: [])


GOOD = """
models:
  gemma:
    policy: round_robin
    backends: [native, llama]
backends:
  native: {adapter: native, path: gemma-3-270m}
  llama: {adapter: llamacpp, url: "http://127.0.0.1:8081"}
"""


def mistakes(section: str) -> list[tuple[str, str]]:
    """The pairs of one section of ``config_mistakes.txt``."""
    whole = (Path(__file__).parent / "config_mistakes.txt").read_text()
    lines = whole.split(f"[{section}]\n")[1].split("\n\n")[0].splitlines()
    texts = [line.replace("\\n", "\n").replace("\\x07", "\x07") for line in lines[::2]]
    return list(zip(texts, (line.strip().removeprefix("-> ") for line in lines[1::2]), strict=True))


def read(text: str, environ: dict[str, str] | None = None, *, insecure: bool = False) -> Config:
    return parse(text, registry(), environ or {}, Path("/etc/forebay"), insecure=insecure)


def problems(text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(InvalidConfig) as caught:
        read(text, environ)
    return list(caught.value.problems)


def test_backends_get_the_settings_of_their_adapter() -> None:
    config = read(GOOD)
    assert config.backends["native"] == NativeSettings(adapter="native", path="gemma-3-270m")
    assert isinstance(config.backends["llama"], LlamaSettings)
    assert config.models["gemma"].backends == ["native", "llama"]


def test_an_empty_file_is_the_default_configuration() -> None:
    assert read("") == Config() == read("# nothing\n")


def test_weights_and_timeouts_are_typed() -> None:
    text = GOOD.replace("[native, llama]", "{llama: {weight: 2}, native: {}}")
    config = read(text.replace("policy: round_robin", "timeouts: {total: 5, first_token: 0}"))
    assert config.models["gemma"].backends == {"llama": Share(weight=2.0), "native": Share()}
    assert config.models["gemma"].timeouts == Timeouts(first_token=0.0, total=5.0)


@pytest.mark.parametrize(("text", "line"), mistakes("sections"))
def test_each_mistake_names_its_place_and_the_remedy(text: str, line: str) -> None:
    backends = GOOD[GOOD.index("backends:\n") :]
    assert problems(f"{text}\n{backends}") == [line]


@pytest.mark.parametrize(("backend", "line"), mistakes("backends"))
def test_each_mistake_in_a_backend_is_named(backend: str, line: str) -> None:
    assert problems(f"backends: {{b: {backend}}}\nmodels: {{m: {{backends: [b]}}}}") == [line]


def test_names_of_backends_must_fit_into_headers() -> None:
    lines = problems('backends: {"a b": {adapter: native, path: x}}')
    assert lines[0].startswith('backends."a b": not a good name for a backend')


def test_one_hash_is_one_key() -> None:
    one = hash_of("fb-1")
    (line,) = problems(f"keys: {{a: {{hash: '{one}'}}, b: {{hash: '{one}'}}}}")
    assert line == "keys.b.hash: the same as that of a; make a key for each"


def test_all_problems_are_shown_together_in_one_message() -> None:
    text = "lissten: {}\nadmin: {prt: 1}\nmodels: {m: {backends: [x], max_queue: -1}}"
    with pytest.raises(InvalidConfig) as caught:
        read(text)
    assert caught.value.message.splitlines() == [
        "the configuration has 4 problems:",
        "  lissten: unknown key; did you mean listen?",
        "  admin.prt: unknown key; did you mean port?",
        "  models.m.max_queue: expected a whole number of at least 0, got -1",
        "  models.m.backends[0]: no backend named x; there is none",
    ]


def test_a_broken_backend_is_not_also_reported_as_missing() -> None:
    assert problems("backends: {b: {adapter: nope}}\nmodels: {m: {backends: [b]}}") == [
        "backends.b.adapter: no adapter is named 'nope'; there are: llamacpp, native"
    ]


@pytest.mark.parametrize(("text", "line"), mistakes("yaml"))
def test_mistakes_in_the_yaml_name_the_line(text: str, line: str) -> None:
    assert problems(text) == [line]


def test_merge_keys_may_be_overridden_without_counting_as_twice() -> None:
    text = GOOD.replace("native: {", "native: &n {") + "  other: {<<: *n, path: other}\n"
    other = read(text).backends["other"]
    assert other == NativeSettings(adapter="native", path="other")


def test_the_environment_fills_in_texts_and_numbers() -> None:
    text = (
        "listen: {port: '${PORT}'}\ndrain_timeout: ${DRAIN:-2.5}\n"
        "backends: {b: {adapter: llamacpp, url: 'http://${HOST:-localhost}:${PORT}', "
        "api_key: '${KEY:-}', model: 'a$${b}$c'}}\n"
        "models: {m: {backends: [b]}}"
    )
    config = read(text, {"PORT": "9000", "HOST": ""})
    backend = config.backends["b"]
    assert (config.listen.port, config.drain_timeout) == (9000, 2.5)
    assert isinstance(backend, HttpBackendSettings)
    assert (backend.url, backend.api_key) == ("http://localhost:9000", "")
    assert backend.model == "a${b}$c"
    assert msgspec.to_builtins(config)["backends"]["b"]["model"] == "a${b}$c"


def test_what_comes_from_the_environment_is_ordinary_text_wherever_it_stands() -> None:
    text = GOOD.replace("policy: round_robin", "policy: {name: '${POLICY}'}")
    policy = read(text, {"POLICY": "round_robin"}).models["gemma"].policy
    assert policy == {"name": "round_robin"}
    assert msgspec.json.encode(policy) == b'{"name":"round_robin"}'


def test_a_variable_that_is_set_to_nothing_is_nothing() -> None:
    assert read("tracing: {otlp_endpoint: '${N}'}", {"N": ""}).tracing.otlp_endpoint == ""


def test_mistakes_around_the_environment_name_key_and_variable() -> None:
    text = "listen: {host: '${HOST}', port: '${PORT}'}\ntracing: {service_name: '${my name}'}"
    assert problems(text, {"PORT": "many"}) == [
        "listen.host: the environment variable HOST is not set; set it, or write ${HOST:-default}",
        "tracing.service_name: `${` begins no reference; write ${NAME}, or $${ for the characters",
        "listen.port: expected a whole number from 0 to 65535, got 'many'",
    ]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.1.2.3", "gateway.example"])
def test_ports_for_everyone_need_keys_or_insecure(host: str) -> None:
    (line,) = problems(f"listen: {{host: '{host}'}}")
    assert line.startswith("listen.host: ")
    assert "forebay key new" in line
    (line,) = problems(f"admin: {{host: '{host}'}}\nkeys: {{k: {{hash: '{hash_of('k')}'}}}}")
    assert line.startswith("admin.host: ")
    assert read(f"listen: {{host: '{host}'}}", insecure=True).listen.host == host
    assert read(f"listen: {{host: '{host}'}}\nkeys: {{k: {{hash: '{hash_of('k')}'}}}}")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert read(f"listen: {{host: '{host}'}}\nadmin: {{host: '{host}'}}").listen.host == host


def test_policy_files_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "forebay.yaml"
    for file, name in ("mine.py", "Mine"), ("other.py", "Other"):
        (tmp_path / file).write_text(
            f"from forebay.api import Policy\n\n\nclass {name}(Policy):\n"
            "    def score(self, request, snapshot):\n        return []\n"
        )
    path.write_text(
        GOOD.replace("policy: round_robin", "policy: ./mine.py:Mine").replace(
            "backends:\n", "  b: {backends: [llama], policy: {name: other.py:Other}}\nbackends:\n"
        )
    )
    config = load(path, registry(), environ={})
    assert config.models["gemma"].policy == f"{tmp_path}/mine.py:Mine"
    assert config.models["b"].policy == {"name": f"{tmp_path}/other.py:Other"}


def test_overrides_win_and_are_checked_like_the_file(tmp_path: Path) -> None:
    path = tmp_path / "forebay.yaml"
    path.write_text("listen: {host: 127.0.0.1, port: 1}")
    config = load(path, registry(), environ={}, overrides={"listen.port": 2})
    assert (config.listen.host, config.listen.port) == ("127.0.0.1", 2)
    with pytest.raises(InvalidConfig, match=r"forebay\.yaml has 1 problem:\n  listen\.host: "):
        load(path, registry(), environ={}, overrides={"listen.host": "0.0.0.0"})
    with pytest.raises(InvalidConfig, match=r"admin: expected a mapping, got 3"):
        build(
            {"admin": 3},
            registry(),
            environ={},
            base=tmp_path,
            overrides={"admin.port": 5},
        )


def test_files_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_tree(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_tree(tmp_path)
    (tmp_path / "binary").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 3\)"):
        read_tree(tmp_path / "binary")


def test_warnings_name_what_is_probably_not_meant() -> None:
    config = read("backends: {b: {adapter: native, path: x}}")
    assert warnings(config) == [
        "backends.b: used by no model",
        "models: there is none, so every request will be answered with 404",
    ]
    assert warnings(read(GOOD)) == []


def _keys_of(*kinds: type[msgspec.Struct]) -> list[str]:
    return sorted({field.name for kind in kinds for field in msgspec.structs.fields(kind)})


SECTIONS: list[type[Section]] = [
    Model,
    Share,
    Listen,
    Admin,
    Health,
    Limits,
    Key,
    Tracing,
    Logging,
    Plugins,
]
KEYS = st.sampled_from(_keys_of(Config, LlamaSettings, NativeSettings, Timeouts, *SECTIONS))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 70_000),
    st.floats(),
    st.sampled_from(["", "llamacpp", "native", "b", "http://h:1", "${A}", "$${", "${", "x y"]),
    st.dates(),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(KEYS, st.just("b"), st.integers(0, 2)), inner, max_size=4),
    ),
    max_leaves=25,
)


# The fixture only empties a list, so it need not be renewed for each example.
_EXAMPLES = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_EXAMPLES
@given(st.dictionaries(st.sampled_from(_keys_of(Config)), TREES, max_size=6))
def test_no_data_does_worse_than_a_list_of_problems(tree: dict[str, Any]) -> None:
    found = _problems_of(tree)
    assert all(re.match(r"[a-z_0-9.\[\]\"' ]+: .", line) for line in found)
    assert not any("\n" in line for line in found)


def _problems_of(tree: dict[str, Any]) -> tuple[str, ...]:
    try:
        build(tree, registry(), environ={"A": "1"}, base=Path("/"), insecure=True)
    except InvalidConfig as error:
        return error.problems
    return ()


@_EXAMPLES
@given(st.sampled_from(SECTIONS), st.data())
def test_the_reader_accepts_what_msgspec_accepts(kind: type[Section], data: st.DataObject) -> None:
    values = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.floats(0, 1), st.just("info"))
    tree = data.draw(st.dictionaries(st.sampled_from(_keys_of(kind)), values, max_size=2))
    # That a number must be finite is our own rule.
    tree = {key: 1.5 if value in (math.inf, -math.inf) else value for key, value in tree.items()}
    problems: list[str] = []
    read = Reader(registry(), problems).read(tree, kind, "section")
    try:
        expected = msgspec.convert(tree, kind)
    except msgspec.ValidationError:
        assert problems
    else:
        assert (read, problems) == (expected, [])


def test_what_was_read_is_read_again_as_the_same() -> None:
    config = read(GOOD.replace("[native, llama]", "{llama: {weight: 2}, native: {}}"))
    tree = msgspec.to_builtins(config)
    assert build(tree, registry(), environ={}, base=Path("/elsewhere")) == config
