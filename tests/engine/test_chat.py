"""Chat templates: where they come from, what they may do, and what they reject."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forebay_engine.chat import ChatTemplate
from forebay_engine.errors import RequestRefused, StartRefused

HELLO = [{"role": "user", "content": "Hello"}]


def test_the_file_beside_the_model_comes_first(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file:{{ messages[0].content }}")
    config = {"chat_template": "config", "bos_token": {"content": "<s>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "<s>file:Hello"


@pytest.mark.parametrize(
    "templates",
    ["plain", [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "plain"}]],
)
def test_else_the_tokenizer_config_has_it(tmp_path: Path, templates: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "plain"


def test_a_model_may_have_none(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert ChatTemplate.from_folder(tmp_path) is None


def test_templates_run_as_they_do_at_training() -> None:
    source = (
        "{% for m in messages %}\n"
        "    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}|{{ strftime_now('%Y') | length }}|{{ add_generation_prompt }}\n"
        "{% endfor %}"
    )
    rendered = ChatTemplate(source, {}).render([{"role": "user", "content": "<é>"}, *HELLO])
    assert rendered == '{"role": "user", "content": "<é>"}|4|True\n'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content.strip() }}",
        "{{ messages[0].missing.missing }}",
    ],
)
def test_a_rejection_is_the_requests_fault(source: str) -> None:
    with pytest.raises(RequestRefused, match="chat template rejects") as refusal:
        ChatTemplate(source, {}).render(HELLO)
    assert refusal.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_is_in_a_sandbox(source: str) -> None:
    with pytest.raises(RequestRefused):
        ChatTemplate(source, {}).render(HELLO)


def test_broken_files_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match="can't be compiled"):
        ChatTemplate("{% for %}", {})
    config = tmp_path / "tokenizer_config.json"
    for text, sentence in (("{", "is not JSON"), ("[]", "no JSON object")):
        config.write_text(text)
        with pytest.raises(StartRefused, match=sentence):
            ChatTemplate.from_folder(tmp_path)
