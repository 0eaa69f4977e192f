"""Conversion of a small Gemma 3 GGUF, written here, into a folder that the engine serves."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors import safe_open
from tokenizers import Tokenizer

from forebay_engine.config import EngineConfig
from forebay_engine.gguf import convert, to_bfloat16
from forebay_engine.gguf_tokenizer import CHAT_TEMPLATE
from forebay_engine.hf_config import ModelError, read_config
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan

Tensors = dict[str, np.ndarray[Any, np.dtype[Any]]]


def ignore(stage: str, done: int, total: int) -> None:
    """A progress report that nobody reads."""


def test_config_says_what_the_file_says(tiny_gguf: Path, tmp_path: Path) -> None:
    convert(tiny_gguf, tmp_path / "out", ignore)
    config = read_config(tmp_path / "out")
    assert config.architecture == "Gemma3ForCausalLM"
    assert (config.num_layers, config.hidden_size, config.head_dim) == (7, 64, 32)
    assert (config.num_heads, config.num_kv_heads, config.intermediate_size) == (4, 2, 96)
    assert config.sliding == (True, True, True, True, True, False, True)
    assert (config.rope.theta, config.rope_local.theta) == (1_000_000.0, 10_000.0)
    assert config.norm_eps == 1e-6
    assert config.tie_word_embeddings
    # The end of a turn is an end too, though the file names the end of the text alone.
    assert config.eos_token_ids == {1, 5}


def test_weights_are_widened_and_norms_are_less_one(
    tiny_gguf: Path, tiny_gguf_tensors: Tensors, tmp_path: Path
) -> None:
    found = convert(tiny_gguf, tmp_path, ignore)
    path = tmp_path / "model.safetensors"
    assert found == sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as file:
        assert len(file.keys()) == len(tiny_gguf_tensors)
        embedding = file.get_tensor("model.embed_tokens.weight")
        norm = file.get_tensor("model.layers.6.pre_feedforward_layernorm.weight")
        down = file.get_tensor("model.layers.0.mlp.down_proj.weight")
    want = torch.from_numpy(tiny_gguf_tensors["blk.6.ffn_norm.weight"]) - 1.0
    assert torch.equal(norm, want.bfloat16())
    assert torch.equal(
        embedding, torch.from_numpy(tiny_gguf_tensors["token_embd.weight"]).bfloat16()
    )
    # Stored in 8 bits a value: near, and not equal.
    quantised = torch.from_numpy(tiny_gguf_tensors["blk.0.ffn_down.weight"])
    assert 0 < float((down.float() - quantised).abs().max()) < 0.02


def test_the_folder_is_served(tiny_gguf: Path, tmp_path: Path) -> None:
    convert(tiny_gguf, tmp_path, ignore)
    runner = Runner(EngineConfig(model=str(tmp_path), num_blocks=4, block_size=8, threads=1))
    prompt = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a b").ids
    tables = ((0,),) * len(runner.cache_groups)
    row = Row(0, prompt, 0, len(prompt), tables, True, SamplingParams(temperature=0), len(prompt))
    assert 0 <= runner.execute(StepPlan((row,))).sampled[0].token_id < runner.vocab_size


def test_progress_runs_to_its_end(tiny_gguf: Path, tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    convert(tiny_gguf, tmp_path, lambda s, d, t: told.setdefault(s, []).append((d, t)))
    assert list(told) == ["tokenizer", "weights"]
    for reports in told.values():
        assert reports == sorted(reports)
        assert reports[-1][0] == reports[-1][1]
    assert told["weights"][-1][0] == (tmp_path / "model.safetensors").stat().st_size


def test_tokenizer_merges_by_score_and_falls_back_to_bytes(tiny_gguf: Path, tmp_path: Path) -> None:
    convert(tiny_gguf, tmp_path, ignore)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    def pieces(text: str) -> list[str | None]:
        return [tokenizer.id_to_token(i) for i in tokenizer.encode(text).ids]

    assert pieces("ab") == ["<bos>", "ab"]
    # "bc" scores higher than "ab", so it is joined first although "ab" comes first.
    assert pieces("abc") == ["<bos>", "a", "bc"]
    assert pieces("a b") == ["<bos>", "a", "▁b"]
    assert pieces("é") == ["<bos>", "<0xC3>", "<0xA9>"]
    assert pieces("a<end_of_turn>\n\nb") == ["<bos>", "a", "<end_of_turn>", "\n\n", "b"]
    text = "abc é a b"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'llama'; only gemma3"):
        convert(tmp_path / "llama.gguf", tmp_path / "out", ignore)


def test_a_tensor_without_a_place_is_refused(
    write_gguf: Callable[[Path, Tensors], Path], tiny_gguf_tensors: Tensors, tmp_path: Path
) -> None:
    more = {**tiny_gguf_tensors, "blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    with pytest.raises(ModelError, match=r"blk.0.attn_sinks.weight has no place"):
        convert(write_gguf(tmp_path / "more.gguf", more), tmp_path / "out", ignore)


def test_bfloat16_rounds_as_torch_does() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal(4096).astype(np.float32) * 10.0 ** random.integers(
        -30, 30, 4096
    )
    values = np.concatenate([values, [0.0, -0.0, 1.00390625, 1.01171875]]).astype(np.float32)
    want = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(values), want)


@pytest.mark.parametrize(
    ("messages", "want"),
    [
        ([{"role": "user", "content": " hi \n"}], "[user\nhi]\n"),
        (
            [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
            "[user\nbe kind\n\nhi]\n",
        ),
        (
            [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
            "[user\na]\n[model\nb]\n[user\nc]\n",
        ),
        ([{"role": "system", "content": "alone"}], "[user\nalone]\n"),
        ([{"role": "assistant", "content": None}], "[model\n]\n"),
    ],
)
def test_chat_template_writes_gemmas_turns(messages: list[dict[str, Any]], want: str) -> None:
    template = jinja2.Environment(autoescape=False).from_string(CHAT_TEMPLATE)
    text = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=True)
    shown = text.replace("<start_of_turn>", "[").replace("<end_of_turn>", "]")
    assert shown == f"<bos>{want}[model\n"


def test_chat_template_refuses_images() -> None:
    def refuse(message: str) -> str:
        raise ValueError(message)

    template = jinja2.Environment(autoescape=False).from_string(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    with pytest.raises(ValueError, match="text only"):
        template.render(messages=messages, bos_token="<bos>", raise_exception=refuse)


def test_tokenizer_config_names_the_special_tokens(tiny_gguf: Path, tmp_path: Path) -> None:
    convert(tiny_gguf, tmp_path, ignore)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert [settings[name] for name in names] == ["<bos>", "<eos>", "<unk>", "<pad>"]
    assert settings["model_max_length"] == 256
