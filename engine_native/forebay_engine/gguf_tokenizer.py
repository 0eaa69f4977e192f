"""The tokenizer of a GGUF file as tokenizer.json, and the chat template that Gemma's lack."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from forebay_engine.hf_config import ModelError

END_OF_TURN = "<end_of_turn>"

#: tokenizer.ggml.token_type: markers like <bos>, and whole strings (runs of newlines, HTML tags).
_CONTROL, _USER_DEFINED = 3, 4

_AROUND = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_BEYOND = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: By tokenizer.ggml.pre: what a word is; None: GPT-2's, which the library has. Llama 3's and
#: Qwen 2's are those of their published tokenizer.json, and differ in how they cut numbers.
_WORDS = {
    "default": None,
    "gpt-2": None,
    "llama-bpe": _AROUND + r"\p{N}{1,3}" + _BEYOND,
    "qwen2": _AROUND + r"\p{N}" + _BEYOND,
}
_BEGIN_WITH_BOS = ("llama-bpe",)

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


def write_tokenizer(meta: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja.

    :raises ModelError: the tokenizer is of a kind that is not supported.
    """
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    ids = {
        f"{name}_token": meta.get(f"tokenizer.ggml.{full}_token_id")
        for name, full in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta[f"{meta['general.architecture']}.context_length"],
        "clean_up_tokenization_spaces": False,
        **{name: tokens[token_id] for name, token_id in ids.items() if token_id is not None},
    }
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    gemma = str(meta["general.architecture"]).startswith("gemma")
    template = meta.get("tokenizer.chat_template") or (CHAT_TEMPLATE if gemma else None)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def build_tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    """Of SentencePiece's scored pieces (``llama``), or of byte-level merges (``gpt2``)."""
    kind = meta["tokenizer.ggml.model"]
    if kind not in _KINDS:
        raise ModelError(
            f"the GGUF's tokenizer {kind!r} is not supported (these are: {', '.join(_KINDS)}); put "
            "the model's tokenizer.json beside the file"
        )
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    # Known to be whole already; named again so that no text is merged across them.
    whole = [i for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer: Tokenizer = _KINDS[kind](meta, tokens, set(whole))
    tokenizer.add_tokens(
        [AddedToken(tokens[i], normalized=False, special=kinds[i] == _CONTROL) for i in whole]
    )
    begins = kind == "llama" or str(meta.get("tokenizer.ggml.pre")) in _BEGIN_WITH_BOS
    if meta.get("tokenizer.ggml.add_bos_token", begins):
        _begin_with(tokenizer, tokens, meta["tokenizer.ggml.bos_token_id"])
    return tokenizer


def _begin_with(tokenizer: Tokenizer, tokens: list[str], bos_id: int) -> None:
    bos = tokens[bos_id]
    first = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    bytes_before = tokenizer.post_processor
    both = [first] if bytes_before is None else [bytes_before, first]
    tokenizer.post_processor = processors.Sequence(both) if len(both) > 1 else first


def _pieces(meta: Mapping[str, Any], tokens: list[str], whole: set[int]) -> Tokenizer:
    """Byte-pair encoding with byte fallback over text whose spaces are ``▁``."""
    unknown: int = meta.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        merges(tokens, meta["tokenizer.ggml.scores"], whole),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = spaces
    if meta.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        after.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(after)
    return tokenizer


def _byte_level(meta: Mapping[str, Any], tokens: list[str], whole: set[int]) -> Tokenizer:
    """Merges as listed, over text that is cut into words first."""
    cut = str(meta.get("tokenizer.ggml.pre", "default"))
    if cut not in _WORDS:
        raise ModelError(
            f"the GGUF's words {cut!r} (tokenizer.ggml.pre) are not supported (these are: "
            f"{', '.join(_WORDS)}); put the model's tokenizer.json beside the file"
        )
    pairs = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3's words that are tokens by themselves are not merged.
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=cut == "llama-bpe"))
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if (pattern := _WORDS[cut]) is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_KINDS: dict[str, Callable[[Mapping[str, Any], list[str], set[int]], Tokenizer]] = {
    "llama": _pieces,
    "gpt2": _byte_level,
}


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
