"""Writes docs/configuration.md from the configuration's types and the docstrings of their fields.

Run as `make docs`. Adapters and policies are those of this repository only.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Struct
from msgspec.structs import FieldInfo

from forebay.api import BackendSettings, HttpBackendSettings, PolicySettings, Timeouts
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
    SamplingDefaults,
    Share,
    Tracing,
)
from forebay.config_file.reader import expectation
from forebay.loader import Loaded, Registry, load_plugins

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "configuration.md"

SECTIONS: list[tuple[str, type[Struct]]] = [
    ("models.NAME", Model),
    ("models.NAME.backends.NAME", Share),
    ("models.NAME.timeouts", Timeouts),
    ("models.NAME.sampling", SamplingDefaults),
    ("listen", Listen),
    ("admin", Admin),
    ("keys.NAME", Key),
    ("limits", Limits),
    ("health", Health),
    ("tracing", Tracing),
    ("logging", Logging),
    ("plugins", Plugins),
]

HEAD = """\
# Configuration

<!-- Written by scripts/generate_config_docs.py (`make docs`); edit the docstrings it reads. -->

`forebay serve --config forebay.yaml` reads one YAML file. `forebay check forebay.yaml` says what it
means, or everything that is wrong with it; an unknown key is an error. The smallest useful one:

```yaml
models:
  gemma-3-270m: {backends: [llama]}
backends:
  llama: {adapter: llamacpp, url: "http://127.0.0.1:8081"}
```

- `${NAME}` in a text is the environment variable NAME, which must be set; `${NAME:-text}` has a
  default for one that is unset or empty; `$${` stands for the characters `${`. Keep secrets there.
- A policy's file (`./my_policy.py:MyPolicy`) is looked for beside the configuration file.
- Durations are in seconds. `--host`, `--port` and `--admin-port` of `forebay serve` win over the
  file.
- An address that other machines can reach is refused for `listen` if there are no `keys`, and for
  `admin` always, unless `--insecure` is given.
"""


def main() -> None:
    TARGET.write_text(generate(), encoding="utf-8")
    print(f"{TARGET} written")


def generate() -> str:
    """The whole page.

    :raises SystemExit: a field has no docstring, or a plugin of ours did not load.
    """
    registry = load_plugins(own_plugins())
    for entry in registry.report:
        if not isinstance(entry, Loaded):
            sys.exit(f"the plugin {entry.name} did not load: {entry.reason}")
    parts = [HEAD, "## Keys of the file\n", table(Config)]
    for path, section in SECTIONS:
        parts += [f"## `{path}`\n", f"{markdown(inspect.getdoc(section))}\n", table(section)]
    parts += [*backend_parts(registry), *policy_parts(registry)]
    example = (ROOT / "examples" / "full.yaml").read_text(encoding="utf-8")
    parts += ["## Everything in one file\n", f"```yaml\n{example}```\n"]
    return "\n".join(parts)


def own_plugins() -> list[str]:
    """Names of the entry points that this repository's own pyproject declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return sorted(project["entry-points"]["forebay.v1"])


def backend_parts(registry: Registry) -> Iterator[str]:
    yield "## `backends.NAME`\n"
    yield "What every backend takes:\n"
    yield table(BackendSettings)
    yield "Backends that are reached by HTTP also take:\n"
    yield table(HttpBackendSettings, beyond=BackendSettings)
    for name, kind in sorted(registry.adapters.items()):
        http = issubclass(kind.settings, HttpBackendSettings)
        base = HttpBackendSettings if http else BackendSettings
        reached = ", reached by HTTP" if http else ""
        yield f"### `adapter: {name}`{reached}\n"
        yield f"{sentence(kind.summary)}\n"
        yield table(kind.settings, beyond=base)
        for field in msgspec.structs.fields(kind.settings):
            if isinstance(field.type, type) and issubclass(field.type, Struct):
                yield f"Keys of its `{field.encode_name}`:\n"
                yield table(field.type)


def policy_parts(registry: Registry) -> Iterator[str]:
    yield "## Policies\n"
    for name, kind in sorted(registry.policies.items()):
        yield f"### `policy: {name}`\n"
        yield f"{sentence(kind.summary)}\n"
        yield table(kind.settings, beyond=PolicySettings)


def table(cls: type[Struct], beyond: type[Struct] | None = None) -> str:
    """The fields of a section, without those of ``beyond``."""
    inherited = {field.name for field in msgspec.structs.fields(beyond)} if beyond else set()
    fields = [field for field in msgspec.structs.fields(cls) if field.name not in inherited]
    if not fields:
        return "No keys of its own.\n"
    docs = field_docs(cls)
    rows = ["| key | value | default | unit | meaning |", "|---|---|---|---|---|"]
    rows += [row(cls, field, docs.get(field.name, "")) for field in fields]
    return "\n".join(rows) + "\n"


def row(cls: type[Struct], field: FieldInfo, doc: str) -> str:
    if not doc:
        sys.exit(f"{cls.__module__}.{cls.__name__}.{field.name} has no docstring")
    value = re.sub(r"\ban? ", "", expectation(field.type))
    cells = (f"`{field.encode_name}`", value, default(field), unit(field, doc), doc)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def field_docs(cls: type[Struct]) -> dict[str, str]:
    """The string below each field, of the class and of those it derives from."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, Struct) or base is Struct:
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                docs[field.target.id] = markdown(text_of(below))
    return docs


def markdown(doc: str | None) -> str:
    return " ".join((doc or "").replace("``", "`").split())


def text_of(node: ast.stmt) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


def default(field: FieldInfo) -> str:
    if field.required:
        return "**required**"
    if field.default is NODEFAULT:  # made anew each time: an empty list or mapping
        return "empty"
    value = field.default
    if isinstance(value, Struct):
        return "see below"
    if value is None or value == "":
        return "unset" if value is None else "empty"
    if isinstance(value, frozenset | tuple):
        return f"`[{', '.join(sorted(map(str, value)))}]`" if value else "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def unit(field: FieldInfo, doc: str) -> str:
    """The unit that the docstring of a number names first."""
    kind: Any = field.type
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if kind not in (int, float):
        return ""
    found = re.search(r"\b(seconds|bytes|tokens)\b", doc, re.IGNORECASE)
    name = found[1].lower() if found else ""
    return f"{name}/s" if name and " a second" in doc else name


def sentence(text: str) -> str:
    return f"{text.rstrip('.')}."


if __name__ == "__main__":
    main()
