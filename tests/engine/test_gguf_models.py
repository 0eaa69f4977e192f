"""GGUF files of every architecture, written here from tiny checkpoints, and served as they are.

Names come from the gguf package's own table, and what llama.cpp's converter does to the weights is
done here in plain numpy. The engine gives the same tokens for the file and for the checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tokenizers import Tokenizer

from forebay_engine.chat import ChatTemplate
from forebay_engine.config import EngineConfig
from forebay_engine.gguf import model_folder
from forebay_engine.gguf_file import GgufFile
from forebay_engine.gguf_tokenizer import build_tokenizer
from forebay_engine.hf_config import ModelError, read_config
from forebay_engine.memory import weight_bytes
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan
from forebay_engine.weights import Weights
from forebay_kernels.matrix import Dense, GroupedInt8, Int4

Array = np.ndarray[Any, np.dtype[Any]]
Edit = Callable[[gguf.GGUFWriter], object]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by XDG_CACHE_HOME, which moves the compiled kernels as well.
    monkeypatch.setattr("forebay_engine.gguf._cache", lambda: tmp_path / "cache")


def paired(weight: Array, heads: int) -> Array:
    """Each head's two halves interleaved, as llama.cpp rotates them."""
    dim = len(weight) // heads
    rows = [h * dim + half * dim // 2 + i for h in range(heads)
            for i in range(dim // 2) for half in (0, 1)]  # fmt: skip
    return weight[rows]


def written(folder: Path, path: Path, family: str, kind: Kind = Kind.F32) -> Path:
    """The checkpoint as a GGUF file with tokenizer.json beside it; matrices as ``kind``."""
    data = json.loads((folder / "config.json").read_text())
    config = read_config(folder)
    writer = gguf.GGUFWriter(path, family)
    write_metadata(writer, family, data)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, factors in rope_factors(data).items():
        writer.add_tensor(f"{name}.weight", np.array(factors, np.float32))
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if family == "gpt2" and any(part in name for part in ("c_attn.w", "c_proj.w", "c_fc.w")):
            values = values.T
        if family == "llama" and "q_proj" in name:
            values = paired(values, config.num_heads)
        if family == "llama" and "k_proj" in name:
            values = paired(values, config.num_kv_heads)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1.0
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        as_kind = kind if values.ndim == 2 and values.shape[1] % 32 == 0 else Kind.F32
        raw = gguf.quants.quantize(np.ascontiguousarray(values), as_kind)
        writer.add_tensor(known, raw, raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, path.parent / name)
    return path


def rope_factors(data: dict[str, Any]) -> dict[str, list[float]]:
    """What llama.cpp's converter writes for the types that stretch each wave by its own factor."""
    rope = data.get("rope_parameters", {})
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{name}": rope[f"{name}_factor"] for name in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    dim = data["hidden_size"] // data["num_attention_heads"]
    original, found = rope["original_max_position_embeddings"], []
    for i in range(0, dim, 2):
        turns = original * rope["rope_theta"] ** (-i / dim) / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1.0 / ((1.0 - kept) / rope["factor"] + kept))
    return {"rope_freqs": found}


def write_metadata(writer: gguf.GGUFWriter, family: str, data: dict[str, Any]) -> None:
    if family == "gpt2":
        writer.add_context_length(data["n_positions"])
        writer.add_embedding_length(data["n_embd"])
        writer.add_block_count(data["n_layer"])
        writer.add_feed_forward_length(data["n_inner"] or 4 * data["n_embd"])
        writer.add_head_count(data["n_head"])
        writer.add_layer_norm_eps(data["layer_norm_epsilon"])
    else:
        heads = data["num_attention_heads"]
        rope = data["rope_parameters"]
        head_dim = data.get("head_dim") or data["hidden_size"] // heads
        writer.add_context_length(data["max_position_embeddings"])
        writer.add_embedding_length(data["hidden_size"])
        writer.add_block_count(data["num_hidden_layers"])
        writer.add_feed_forward_length(data["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(data["num_key_value_heads"])
        writer.add_key_length(head_dim)
        writer.add_layer_norm_rms_eps(data["rms_norm_eps"])
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        if rope.get("rope_type") == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
        if rope.get("rope_type") in ("yarn", "longrope"):
            original = data.get("original_max_position_embeddings")
            original = original or rope["original_max_position_embeddings"]
            writer.add_rope_scaling_orig_ctx_len(original)
    if data.get("sliding_window"):
        writer.add_sliding_window(data["sliding_window"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(data["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(data["final_logit_softcapping"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"token {i}" for i in range(data["vocab_size"])])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)


def plain(folder: Path, to: Path, changes: dict[str, Any]) -> Path:
    """The checkpoint with what GGUF has no word for as its architecture's real models have it."""
    shutil.copytree(folder, to)
    data = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(data | changes))
    return to


THETA = {"rope_type": "default", "rope_theta": 10_000.0}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 32, "rope_parameters": THETA},
    "gemma3": {
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention"] * 3,
        "rope_parameters": {"full_attention": THETA, "sliding_attention": THETA},
    },
    "gpt2": {"scale_attn_by_inverse_layer_idx": False},
}


def tokens(model: Path) -> list[int]:
    """Sixteen greedy tokens in float32, over a window's edge."""
    runner = Runner(
        EngineConfig(model=str(model), dtype="float32", num_blocks=8, block_size=8, threads=1)
    )
    tables = (tuple(range(8)),) * len(runner.cache_groups)
    greedy = SamplingParams(temperature=0.0)
    found: list[int] = []
    prompt = [2, *range(30, 52)]
    for _ in range(16):
        ids, start = [*prompt, *found], len(prompt) + len(found) - 1 if found else 0
        row = Row(0, tuple(ids), start, len(ids) - start, tables, True, greedy, len(prompt))
        found.append(runner.execute(StepPlan((row,))).sampled[0].token_id)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_tokens_of_its_checkpoint(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = plain(tiny_checkpoint(family), tmp_path / "plain", CHANGES.get(family, {}))
    path = written(folder, tmp_path / "model.gguf", family)
    assert tokens(path) == tokens(folder)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_0, Kind.F16, Kind.BF16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantised_layers_are_kept_or_dequantised(
    family: str, kind: Kind, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    path = written(source, tmp_path / "model.gguf", family, kind)
    inner = "model.layers.1.self_attn.o_proj" if family == "llama" else "transformer.h.1.mlp.c_fc"
    shape = (64, 64) if family == "llama" else (256, 64)
    with Weights(model_folder(path), torch.float32, torch.device("cpu")) as weights:
        matrix = weights.matrix(inner, *shape, transposed=family == "gpt2")
        with pytest.raises(ModelError, match="is taken twice"):
            weights.matrix(inner, *shape)
    assert type(matrix) is {Kind.Q8_0: GroupedInt8, Kind.Q4_0: Int4}.get(kind, Dense)
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    values = tensors[f"{inner}.weight"].numpy()
    values = np.ascontiguousarray(values.T if family == "gpt2" else values)
    want = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    np.testing.assert_array_equal(matrix.dequantize().numpy(), want.astype(np.float32))


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_llamas_kept_queries_are_put_in_order(
    quantization: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    path = written(source, tmp_path / "model.gguf", "llama", Kind.Q8_0)
    folder = model_folder(path)
    with Weights(folder, torch.float32, torch.device("cpu"), quantization) as weights:
        matrix = weights.matrix("model.layers.0.self_attn.q_proj", 64, 64)
    assert isinstance(matrix, GroupedInt8)
    (file,) = source.glob("*.safetensors")
    want = load_file(file)["model.layers.0.self_attn.q_proj.weight"]
    assert (matrix.dequantize() - want).abs().max() < 0.01


def test_memory_is_counted_as_it_is_held(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = written(tiny_checkpoint("gpt2"), tmp_path / "model.gguf", "gpt2", Kind.Q8_0)
    folder = model_folder(path)
    file = GgufFile(path)
    layers = sum(np.prod(t.shape) for t in file.tensors.values() if t.kind == Kind.Q8_0)
    embedding = np.prod(file.tensors["token_embd.weight"].shape)
    positions = file.tensors["position_embd.weight"]
    assert positions.kind == Kind.Q8_0
    rest = sum(np.prod(t.shape) for t in file.tensors.values() if t.kind != Kind.Q8_0)
    want = (layers - embedding) * (1 + 4 / 32) + rest * 2 + embedding * 2 * 2
    assert weight_bytes(folder, "auto") == pytest.approx(want)


def test_a_folder_is_made_once_and_again_when_the_file_changes(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_gguf, path)
    first = model_folder(path)
    assert model_folder(tmp_path) == first  # the folder that holds it alone
    (first / "config.json").touch()
    assert {file.name for file in first.iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.gguf",
    }  # fmt: skip
    assert model_folder(first) == first
    with path.open("ab") as file:
        file.write(bytes(32))
    assert model_folder(path) != first
    assert ChatTemplate.from_folder(first) is not None


def test_other_folders_are_left_alone(tmp_path: Path, tiny_gguf: Path) -> None:
    assert model_folder(tmp_path) == tmp_path
    for name in ("a", "b"):
        shutil.copy(tiny_gguf, tmp_path / f"{name}.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files \(a.gguf, b.gguf\)"):
        model_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("at", [10, 4000, -10])
def test_a_file_that_ends_early_is_named(at: int, tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:at])
    with pytest.raises(ModelError, match=r"cut\.gguf ends within"):
        model_folder(path)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(ModelError, match="is no GGUF file"):
        model_folder(path)


def minimal(path: Path, architecture: str, edit: Edit) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.add_token_list(["a"])
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


REFUSED: dict[str, tuple[str, Edit, str]] = {
    "architecture": ("mamba", lambda w: None, "a GGUF of 'mamba' is not supported"),
    "experts": ("llama", lambda w: w.add_expert_count(8), "with experts is not supported"),
    "metadata": ("llama", lambda w: None, "the GGUF's metadata lack llama.attention.head_count"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(case: str, tmp_path: Path) -> None:
    architecture, edit, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        model_folder(minimal(tmp_path / "m.gguf", architecture, edit))


def byte_level(folder: Path, **settings: Any) -> dict[str, Any]:
    """The metadata that say what this tokenizer.json says."""
    data = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(data["vocab"], key=data["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<") and len(token) > 3 else 1
                                      for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in data["merges"]],
        "tokenizer.ggml.bos_token_id": 2,
        **settings,
    }  # fmt: skip


TEXT = "the water turns 12345 wheels,\n\n  and I'LL see\tÆther… <start_of_turn>user"


def test_byte_level_tokenizers_are_those_of_tokenizer_json(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    folder = tiny_checkpoint("llama")
    want = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = build_tokenizer(byte_level(folder, **{"tokenizer.ggml.add_bos_token": True}))
    assert found.encode(TEXT).ids == want.encode(TEXT).ids
    assert found.decode(found.encode(TEXT).ids) == want.decode(want.encode(TEXT).ids)
    without = build_tokenizer(byte_level(folder))
    assert without.encode(TEXT).ids == want.encode(TEXT).ids[1:]


@pytest.mark.parametrize(("pre", "digits"), [("llama-bpe", ["123", "45"]), ("qwen2", [*"12345"])])
def test_words_are_cut_as_the_families_do(
    pre: str, digits: list[str], tiny_checkpoint: Callable[[str], Path]
) -> None:
    meta = byte_level(tiny_checkpoint("llama"), **{"tokenizer.ggml.pre": pre})
    tokenizer = build_tokenizer(meta)
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("I'LL turn 12345,\n\n x")]
    assert words == ["I", "'LL", "Ġturn", "Ġ", *digits, ",ĊĊ", "Ġx"]
    assert (tokenizer.encode("a").ids[0] == 2) == (pre == "llama-bpe")


def test_pieces_may_begin_with_a_space() -> None:
    tokens = ["<unk>", "<s>", "▁", "a", "b", "▁a", "▁b", *(f"<0x{i:02X}>" for i in range(256))]
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0, *[0.0] * 256],
        "tokenizer.ggml.token_type": [2, 3, 1, 1, 1, 1, 1, *[6] * 256],
        "tokenizer.ggml.bos_token_id": 1,
    }
    tokenizer = build_tokenizer(meta)
    encoding = tokenizer.encode("a bé")
    assert encoding.tokens == ["<s>", "▁a", "▁b", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoding.ids) == "a bé"


@pytest.mark.parametrize(
    "change", [{"tokenizer.ggml.model": "bert"}, {"tokenizer.ggml.pre": "deepseek-llm"}]
)
def test_unknown_tokenizers_are_refused(
    change: dict[str, str], tiny_checkpoint: Callable[[str], Path]
) -> None:
    meta = byte_level(tiny_checkpoint("llama"), **change)
    with pytest.raises(ModelError, match=r"put the model's tokenizer\.json beside the file"):
        build_tokenizer(meta)
