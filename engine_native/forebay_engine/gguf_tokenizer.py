"""The tokenizer of a Gemma GGUF file as tokenizer.json, and the chat template it comes without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

END_OF_TURN = "<end_of_turn>"

#: tokenizer.ggml.token_type: markers like <bos>, and whole strings (runs of newlines, HTML tags).
_CONTROL, _USER_DEFINED = 3, 4

#: Gemma's turns, as its documentation shows them (https://ai.google.dev/gemma/docs/core/
#: prompt-structure). There is no system role: such text opens the next turn.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set held = namespace(text='') -%}
{%- for message in messages -%}
    {%- set content = message['content'] or '' -%}
    {%- if content is not string -%}
        {%- if content | rejectattr('type', 'equalto', 'text') | list -%}
            {{- raise_exception('this model reads text only') -}}
        {%- endif -%}
        {%- set content = content | map(attribute='text') | join('\\n') -%}
    {%- endif -%}
    {%- set content = held.text ~ (content | trim) -%}
    {%- if message['role'] in ('system', 'developer') -%}
        {%- set held.text = content ~ '\\n\\n' -%}
    {%- else -%}
        {%- set held.text = '' -%}
        {%- set role = 'model' if message['role'] == 'assistant' else 'user' -%}
        {{- '<start_of_turn>' ~ role ~ '\\n' ~ content ~ '<end_of_turn>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if held.text -%}
    {{- '<start_of_turn>user\\n' ~ (held.text | trim) ~ '<end_of_turn>\\n' -}}
{%- endif -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


def write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    ids = {
        "bos_token": meta["tokenizer.ggml.bos_token_id"],
        "eos_token": meta["tokenizer.ggml.eos_token_id"],
        "unk_token": meta["tokenizer.ggml.unknown_token_id"],
        "pad_token": meta["tokenizer.ggml.padding_token_id"],
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["gemma3.context_length"],
        "clean_up_tokenization_spaces": False,
        **{name: tokens[token_id] for name, token_id in ids.items()},
    }
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def build_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Byte-pair encoding with byte fallback over text whose spaces are ``▁``, ``<bos>`` first."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    whole = {i for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)}
    model = models.BPE(
        vocab,
        merges(tokens, meta["tokenizer.ggml.scores"], whole),
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # Known to be whole already; named again so that no text is merged across them.
    tokenizer.add_tokens(
        [
            AddedToken(tokens[i], normalized=False, special=kinds[i] == _CONTROL)
            for i in sorted(whole)
        ]
    )
    bos_id: int = meta["tokenizer.ggml.bos_token_id"]
    bos = tokens[bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    return tokenizer


def merges(tokens: list[str], scores: list[float], whole: set[int]) -> list[tuple[str, str]]:
    """All ways to join two tokens into a third, the best-scored result first.

    GGUF keeps SentencePiece's scores and no merges. Of several ways to the same token the one with
    the longer left part goes first, as in the tokenizer.json that Google publishes.
    """
    known = {token for i, token in enumerate(tokens) if i not in whole}
    ranked = [
        (-scores[i], -cut, token)
        for i, token in enumerate(tokens)
        if i not in whole
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    ranked.sort()
    return [(token[:-cut], token[-cut:]) for _, cut, token in ranked]
