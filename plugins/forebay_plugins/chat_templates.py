"""Chat prompts for backends that take plain text: four well-known forms, or a Jinja file.

None writes a beginning-of-text token: the backend's own tokenizer does. Of a Jinja template
`bos_token` and `eos_token` are therefore empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from msgspec import Struct

from forebay.api import BackendRefused, ConfigError, Message

__all__ = ["BUILT_IN", "ChatTemplate", "chat_template"]


class ChatTemplate(Struct, frozen=True):
    #: The prompt, up to where the answer begins. Raises BackendRefused.
    render: Callable[[Sequence[Message]], str]
    #: Texts at which an answer is over.
    stop: tuple[str, ...] = ()


def chat_template(name: str) -> ChatTemplate:
    """The built-in form of that name, else the Jinja file at that path.

    :raises ConfigError: there is neither, or the file is no template, or jinja2 is missing.
    """
    return BUILT_IN[name] if name in BUILT_IN else ChatTemplate(_jinja(Path(name)))


def _turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Role and text of each message; ``developer`` is a newer name of ``system``."""
    turns: list[tuple[str, str]] = []
    for message in messages:
        if message.tool_calls or message.role in ("tool", "function"):
            raise BackendRefused(
                "the backend's chat template has no form for tool calls and their results",
                param="messages",
            )
        role = "system" if message.role == "developer" else message.role
        turns.append((role, message.text()))
    return turns


def _plain(messages: Sequence[Message]) -> str:
    return "".join(f"{role.title()}: {text}\n" for role, text in _turns(messages)) + "Assistant:"


def _chatml(messages: Sequence[Message]) -> str:
    turns = _turns(messages)
    said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    return said + "<|im_start|>assistant\n"


def _llama3(messages: Sequence[Message]) -> str:
    def turn(role: str, text: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"

    said = "".join(turn(role, text.strip()) + "<|eot_id|>" for role, text in _turns(messages))
    return said + turn("assistant", "")


def _gemma(messages: Sequence[Message]) -> str:
    """Gemma knows no system role: its text stands before that of the next user."""
    said, system = [], ""
    for role, text in _turns(messages):
        if role == "system":
            system += text + "\n\n"
            continue
        name = "model" if role == "assistant" else role
        said.append(f"<start_of_turn>{name}\n{system}{text.strip()}<end_of_turn>\n")
        system = ""
    if system:
        said.append(f"<start_of_turn>user\n{system.strip()}<end_of_turn>\n")
    return "".join(said) + "<start_of_turn>model\n"


BUILT_IN = {
    "plain": ChatTemplate(_plain, ("\nUser:",)),
    "chatml": ChatTemplate(_chatml, ("<|im_end|>",)),
    "llama3": ChatTemplate(_llama3, ("<|eot_id|>",)),
    "gemma": ChatTemplate(_gemma, ("<end_of_turn>",)),
}


def _jinja(path: Path) -> Callable[[Sequence[Message]], str]:
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ConfigError(
            f"chat_template {str(path)!r} is a file, for which jinja2 must be installed; "
            f"built in are {', '.join(BUILT_IN)}"
        ) from None

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template {str(path)!r} cannot be read ({error}); "
            f"built in are {', '.join(BUILT_IN)}"
        ) from None
    except TemplateError as error:
        raise ConfigError(f"chat_template {str(path)!r} is no Jinja template: {error}") from None

    def render(messages: Sequence[Message]) -> str:
        said = [_plainly(message) for message in messages]
        try:
            return template.render(
                messages=said, add_generation_prompt=True, bos_token="", eos_token=""
            )
        except (TemplateError, TypeError) as error:
            raise BackendRefused(
                f"the backend's chat template does not take these messages: {error}",
                param="messages",
            ) from None

    return render


def _plainly(message: Message) -> dict[str, Any]:
    """As templates expect it: the content a text, nothing that is null."""
    said: dict[str, Any] = {"role": message.role, "content": message.text()}
    if message.name is not None:
        said["name"] = message.name
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        said["tool_calls"] = [msgspec.json.decode(call) for call in message.tool_calls]
    return said
