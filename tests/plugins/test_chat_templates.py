"""Chat prompts as text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from msgspec import Raw

from forebay.api import BackendRefused, ConfigError, ContentPart, Message
from forebay_plugins.chat_templates import chat_template

TALK = (
    Message(role="system", content="Be brief."),
    Message(role="user", content=(ContentPart("text", "Hi"), ContentPart("text", " there"))),
    Message(role="assistant", content="Yes?"),
    Message(role="user", content="Why?"),
)
PROMPTS = {
    "plain": "System: Be brief.\nUser: Hi there\nAssistant: Yes?\nUser: Why?\nAssistant:",
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gemma": (
        "<start_of_turn>user\nBe brief.\n\nHi there<end_of_turn>\n"
        "<start_of_turn>model\nYes?<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n"
        "<start_of_turn>model\n"
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_built_in(name: str) -> None:
    template = chat_template(name)
    assert template.render(TALK) == PROMPTS[name]
    (stop,) = template.stop
    assert stop.strip()
    assert stop in PROMPTS[name]


def test_gemma_with_nothing_but_a_system_message() -> None:
    prompt = chat_template("gemma").render(TALK[:1])
    assert prompt == "<start_of_turn>user\nBe brief.<end_of_turn>\n<start_of_turn>model\n"


def test_developer_is_system() -> None:
    message = Message(role="developer", content="Be brief.")
    assert chat_template("plain").render([message]).startswith("System: Be brief.\n")


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(
    "message",
    [
        Message(role="assistant", tool_calls=(Raw(b'{"id":"1"}'),)),
        Message(role="tool", content="4", tool_call_id="1"),
    ],
)
def test_built_in_forms_refuse_tools(name: str, message: Message) -> None:
    with pytest.raises(BackendRefused, match="tool calls") as raised:
        chat_template(name).render([message])
    assert raised.value.param == "messages"


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
        "[{{ m.role }}] {{ m.content }}{% if m.tool_calls %} {{ m.tool_calls[0].id }}{% endif %};\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = chat_template(str(file))
    call = Message(role="assistant", tool_calls=(Raw(b'{"id":"c1"}'),))
    prompt = template.render([*TALK[:2], call])
    lines = [line.strip() for line in prompt.splitlines()]
    assert lines == ["[system] Be brief.;", "[user] Hi there;", "[assistant]  c1;", "[assistant]"]
    assert template.stop == ()
    with pytest.raises(BackendRefused, match="no tools here"):
        template.render([Message(role="tool", content="4")])


def test_a_file_cannot_reach_out(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(BackendRefused, match="unsafe"):
        chat_template(str(file)).render(TALK)


def test_what_is_no_template(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plain, chatml, llama3, gemma"):
        chat_template(str(tmp_path / "nowhere"))
    file = tmp_path / "chat.jinja"
    file.write_text("{% if %}")
    with pytest.raises(ConfigError, match="no Jinja template"):
        chat_template(str(file))


def test_jinja_is_only_needed_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert chat_template("plain")
    with pytest.raises(ConfigError, match="jinja2 must be installed"):
        chat_template("chat.jinja")
