"""Reading the configuration file: YAML in, one valid :class:`~forebay.config.Config` out.

All problems of a file are found in one go and shown together, a line each, so that nobody has to
mend a file error by error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from forebay.api import ConfigError, Policy
from forebay.config import Config
from forebay.config_file.checks import anchored, listener_problems, reference_problems, warnings
from forebay.config_file.document import expand, read_document
from forebay.config_file.reader import INVALID, AdapterSource, Reader
from forebay.config_file.secrets import masked

__all__ = [
    "InvalidConfig",
    "Registry",
    "build",
    "load",
    "masked",
    "parse",
    "read_settings",
    "read_tree",
    "wanted_plugins",
    "warnings",
]

Tree = dict[str, Any]


class Registry(AdapterSource, Protocol):
    """What the configuration asks of the loaded plugins."""

    def policy(self, spec: str | dict[str, Any], base_dir: Path) -> Policy:
        """Build the policy a model asks for.

        :raises ForebayError: there is none of this name, or its options are wrong.
        """


class InvalidConfig(ConfigError):
    """Everything that is wrong with a configuration, one line each."""

    def __init__(self, source: str, problems: list[str]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source} has {count}:", *(f"  {line}" for line in problems)]))
        self.source = source
        self.problems = tuple(problems)


def load(
    path: Path,
    registry: Registry,
    *,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, object] = {},
    insecure: bool = False,
) -> Config:
    """Read a file. See :func:`build` for the arguments.

    :raises ConfigError: the file cannot be read, or something in it is wrong.
    """
    tree = read_tree(path)
    return build(
        tree,
        registry,
        environ=environ,
        base=path.resolve().parent,
        source=str(path),
        overrides=overrides,
        insecure=insecure,
    )


def read_tree(path: Path) -> Tree:
    """The file as plain, unchecked data.

    :raises ConfigError: it cannot be read or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give the path of a configuration") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return _document(text, str(path))


def read_settings(text: str) -> Tree:
    """YAML text with a mapping as plain, unchecked data.

    :raises ConfigError: it is not YAML.
    """
    return _document(text, "the setting")


def wanted_plugins(tree: Tree) -> list[str] | None:
    """`plugins.only`, needed before the rest can be read; if it is wrong, :func:`build` says so."""
    section = tree.get("plugins")
    only = section.get("only") if isinstance(section, dict) else None
    return [str(name) for name in only] if isinstance(only, list) else None


def parse(
    text: str, registry: Registry, environ: Mapping[str, str], base: Path, *, insecure: bool = False
) -> Config:
    """Read a configuration from YAML text; relative policy files are looked for in ``base``.

    :raises ConfigError: something in it is wrong.
    """
    tree = _document(text, "the configuration")
    return build(tree, registry, environ=environ, base=base, insecure=insecure)


def build(
    tree: Tree,
    registry: Registry,
    *,
    environ: Mapping[str, str],
    base: Path,
    source: str = "the configuration",
    overrides: Mapping[str, object] = {},
    insecure: bool = False,
) -> Config:
    """Turn plain data into a valid configuration.

    ``overrides`` maps dotted paths to values that win over the tree's (``{"listen.port": 80}``);
    ``insecure`` permits ports that anyone can reach and nobody guards. Policy files are made
    absolute against ``base``.

    :raises InvalidConfig: with all problems.
    """
    problems: list[str] = []
    reader = Reader(registry, problems)
    config = reader.read(expand(_overridden(tree, overrides), environ, problems), Config, "")
    if config is not INVALID:
        config = anchored(config, base)
        declared = tree.get("backends")
        names = list(declared) if isinstance(declared, dict) else []
        problems += reference_problems(config, names, registry.policy, base)
        problems += listener_problems(config, insecure=insecure)
    if problems:
        raise InvalidConfig(source, problems)
    valid: Config = config
    return valid


def _document(text: str, source: str) -> Tree:
    problems: list[str] = []
    tree = read_document(text, problems)
    if problems:
        raise InvalidConfig(source, problems)
    return tree


def _overridden(tree: Tree, overrides: Mapping[str, object]) -> Tree:
    """A copy with the overrides set; what is no mapping on their way is left for the reader."""
    result = dict(tree)
    for path, value in overrides.items():
        section, _, key = path.partition(".")
        inner = result.get(section, {})
        if isinstance(inner, dict):
            result[section] = {**inner, key: value}
    return result
