"""Chat templates: from messages to the text that the model was trained on.

A template comes with the model and is a program, so it runs in Jinja's immutable sandbox: it sees
the messages and nothing else of this process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from forebay_engine.errors import RequestRefused, StartRefused

#: What a template may raise when it meets messages that it was not written for.
_REJECTIONS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """Renders messages. The template writes ``<bos>`` itself, so its text is encoded without."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise StartRefused(f"the model's chat template can't be compiled: {error}") from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder: ``chat_template.jinja``, or in tokenizer_config.json.

        :raises StartRefused: a file is there but not readable as such.
        """
        config = _read_config(folder / "tokenizer_config.json")
        path = folder / "chat_template.jinja"
        source = path.read_text() if path.is_file() else _default(config.get("chat_template"))
        if source is None:
            return None
        tokens = {name: _token(value) for name, value in config.items() if name.endswith("_token")}
        return cls(source, {name: token for name, token in tokens.items() if token is not None})

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, open for the assistant's next message.

        :raises RequestRefused: the template does not take these messages.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except _REJECTIONS as error:
            raise RequestRefused(
                f"the model's chat template rejects these messages: {error}", "messages"
            ) from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise StartRefused(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise StartRefused(f"{path} holds no JSON object")
    return config


def _default(templates: object) -> str | None:
    """One template, or the one called ``default`` in a list of named ones."""
    if isinstance(templates, str):
        return templates
    if isinstance(templates, list):
        return next((t["template"] for t in templates if t.get("name") == "default"), None)
    return None


def _token(value: object) -> str | None:
    """A special token's text, which stands alone or in a dict beside its settings."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _to_json(value: object, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which is no part of what models were trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().astimezone().strftime(format)
