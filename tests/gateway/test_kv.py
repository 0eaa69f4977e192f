"""`forebay kv`: its sums against known examples, brute force and laws that they must obey."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from hypothesis import assume, given
from hypothesis import strategies as st

from forebay.capacity.cache import BITS, per_token, sequence_bytes, what_fits
from forebay.capacity.chart import ticks
from forebay.capacity.line import CapacityError, amount, bytes_of
from forebay.capacity.paging import expected, prefix_lines, read_lengths, utilisation
from forebay.capacity.shape import Latent, ModelShape, shape_of
from forebay.capacity.throughput import Roofline, fit, read_profile
from forebay.capacity.weights import FORMATS, Matrix, Weights
from forebay.cli import main

BIG = "--layers 80 --heads 64 --head-dim 128 --dtype fp16"
GEMMA = {
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
}

shapes = st.builds(
    ModelShape,
    layers=st.integers(1, 6),
    heads=st.just(8),
    kv_heads=st.integers(1, 8),
    head_dim=st.integers(1, 128),
)
lengths = st.integers(1, 300)
blocks = st.integers(1, 40)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    return tmp_path


def run(command: str) -> Result:
    return CliRunner().invoke(main, ["kv", *shlex.split(command)])


def found(command: str) -> dict[str, float]:
    done = run(f"{command} --json")
    assert done.exit_code == 0, done.output
    return {line["name"]: line["value"] for line in json.loads(done.output)["lines"]}


#: Columns are as wide as they need be; what they hold is what counts.
GOLDEN = """\
what  arithmetic  result

one token in one layer  2 (keys, values) × 8 KV heads × 128 dimensions × 2 B (fp16)  4.096 kB = 4 KiB
one token in all layers  80 layers × 4,096 B  327.7 kB = 320 KiB
one sequence of 4,096 tokens  80 layers × 4,096 tokens × 4,096 B  1.342 GB = 1.25 GiB
32 such sequences  32 × 1,342,177,280 B  42.95 GB = 40 GiB

cache in  B per token  GB in all

fp32  655,360  85.9
fp16  327,680  42.95
bf16  327,680  42.95
fp8  163,840  21.47
int8  163,840  21.47
int4  81,920  10.74
"""  # noqa: E501


def test_the_well_known_example() -> None:
    full = found(f"size {BIG} --context 4096 --batch 32")
    assert full["32 such sequences"] == 343_597_383_680
    shared = found(f"size {BIG} --kv-heads 8 --context 4096 --batch 32")
    assert shared["32 such sequences"] == 42_949_672_960
    # What is quoted for it is the sum for 4 of the layers, and that for the shape of an 8B model.
    assert full["32 such sequences"] / 20 == 2**34
    assert found(f"size {BIG} --layers 4 --batch 32")["32 such sequences"] == 2**34
    eight = "--layers 32 --heads 32 --kv-heads 8 --head-dim 128 --dtype fp16"
    assert found(f"size {eight} --batch 32")["32 such sequences"] == 2**34


def test_the_table_shows_the_arithmetic() -> None:
    done = run(f"size {BIG} --kv-heads 8 --batch 32")
    assert _squeezed(done.output) == _squeezed(GOLDEN)


def test_a_model_from_its_config(config: Path) -> None:
    lines = found(f"size {config} --context 4096 --batch 8 --block 32")
    # Three layers see everything; the others hold 512 tokens, which touch 17 blocks of 32.
    assert lines["one sequence of 4,096 tokens"] == (3 * 4096 + 15 * 17 * 32) * 1024
    assert lines["the sequences, if no layer had a window"] == 8 * 18 * 4096 * 1024
    assert lines["parameters"] == 268_098_176
    assert lines["weights in bf16"] == 2 * 268_098_176
    assert found(f"size {config} --no-windows")["one sequence of 4,096 tokens"] == 18 * 4096 * 1024
    fits = found(f"fit {config} --memory 2GB --reserve 0GB --context 4096")
    one = (3 * 4096 + 15 * 512) * 1024
    assert fits["sequences of 4,096 tokens at once"] == (2e9 - 2 * 268_098_176) // one
    assert "made for sequences of 32,768 tokens" in run(f"size {config} --context 40000").output


def test_a_pulled_model_is_known_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"text_config": GEMMA}))
    lines = found(f"size small --data-dir {tmp_path} --context 1")
    assert lines["one token in all layers"] == 18 * 1024


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"sliding_window": 512, "model_type": "mistral"}, 12),
        ({"sliding_window": 512, "model_type": "gemma2"}, 6),
        ({"sliding_window": 512, "sliding_window_pattern": 4}, 9),
        ({"sliding_window": 512, "model_type": "qwen2"}, 0),
        ({"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 10}, 2),
        ({"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"] * 6}, 6),
        ({"attention_chunk_size": 512, "layer_types": ["chunked_attention"] * 12}, 12),
        ({"sliding_window": None, "model_type": "mistral"}, 0),
    ],
)
def test_which_layers_have_a_window(config: dict[str, Any], windows: int) -> None:
    common = {"num_hidden_layers": 12, "num_attention_heads": 4, "hidden_size": 64}
    assert shape_of({**common, **config}).windows == (512,) * windows


def test_other_names_and_other_kinds_of_caches() -> None:
    gpt2 = shape_of({"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024})
    assert gpt2 == ModelShape(12, 12, 12, 64, context=1024)
    common = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512}
    assert shape_of({**common, "multi_query": True}).kv_heads == 1
    # DeepSeek-V2 (arXiv 2405.04434, table 1): 576 numbers a token and layer, whatever the heads.
    deepseek = shape_of({**common, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert deepseek.latent == Latent(512, 64)
    assert per_token(deepseek, 16) == 2 * 576 * 2


@given(shapes, lengths, st.integers(1, 5))
def test_the_cache_grows_in_proportion(shape: ModelShape, tokens: int, times: int) -> None:
    one = sequence_bytes(shape, 16, tokens)
    assert sequence_bytes(shape, 16, tokens * times) == times * one
    deeper = ModelShape(shape.layers * times, 8, shape.kv_heads, shape.head_dim)
    assert sequence_bytes(deeper, 16, tokens) == times * one
    assert one == tokens * per_token(shape, 16)
    assert sequence_bytes(shape, 4, tokens) * 4 == one


@given(shapes, lengths, st.integers(1, 300), blocks, st.data())
def test_a_window_holds_the_blocks_that_it_can_touch(
    shape: ModelShape, tokens: int, window: int, block: int, data: st.DataObject
) -> None:
    windowed = ModelShape(shape.layers, 8, shape.kv_heads, shape.head_dim, (window,) * shape.layers)
    most = max(end // block - max(0, end - window + 1) // block + 1 for end in range(tokens))
    bound = sequence_bytes(windowed, 8, tokens, block)
    held = most * block * shape.layers * shape.elements_per_layer
    assert held <= bound <= held + (0 if tokens >= window + block else bound)
    if tokens >= window + block:
        assert bound == held
    assert bound <= sequence_bytes(shape, 8, tokens, block)


@given(shapes, lengths, blocks, st.integers(1, 10**7), st.integers(0, 10**5))
def test_what_fits_fits_and_not_one_more(
    shape: ModelShape, tokens: int, block: int, memory: int, weights: int
) -> None:
    assume(memory > weights)
    _, all_tokens, sequences = what_fits(shape, "int8", memory, weights, tokens, block=block)
    one = sequence_bytes(shape, 8, tokens, block)
    assert weights + sequences.value * one <= memory < weights + (sequences.value + 1) * one
    assert all_tokens.value % block == 0
    assert weights + all_tokens.value * per_token(shape, 8) <= memory


@given(st.lists(lengths, min_size=1, max_size=20), blocks)
def test_utilisation_is_what_counting_slots_gives(sizes: list[int], block: int) -> None:
    item = utilisation(sizes, block)
    slots = sum(len(range(0, length, block)) * block for length in sizes)
    assert (item.tokens, item.slots) == (sum(sizes), slots)
    assert item.share <= 1


@given(st.integers(0, 50), blocks)
def test_the_formula_is_the_mean_over_all_ends_in_a_block(whole: int, block: int) -> None:
    sizes = [whole * block + rest for rest in range(1, block + 1)]
    mean = sum(sizes) / len(sizes)
    assert math.isclose(expected(mean, block).share, utilisation(sizes, block).share)


@given(st.integers(1, 200), st.integers(0, 50), st.integers(2, 9), st.integers(1, 16))
def test_a_prefix_saves_what_a_cache_of_blocks_would(
    shared: int, own: int, requests: int, block: int
) -> None:
    assume(min(shared, shared + own - 1) >= block)
    cached: set[tuple[int, ...]] = set()
    computed = 0
    for number in range(requests):
        prompt = [*range(shared), *(10_000 * (number + 1) + i for i in range(own))]
        hit = 0
        while hit + block < len(prompt) and tuple(prompt[: hit + block]) in cached:
            hit += block
        computed += len(prompt) - hit
        cached |= {tuple(prompt[:end]) for end in range(block, len(prompt) + 1, block)}
    lines = {line.name: line.value for line in prefix_lines(shared, own, requests, 1.0, block, 2)}
    total = lines["prompt tokens without a cache"]
    assert total - lines["prompt tokens spared"] == computed
    assert math.isclose(lines["share of prefill spared"], 1 - computed / total)


@given(st.floats(1e8, 1e11), st.floats(10, 1e4), st.floats(1e6, 1e10), st.floats(0, 1e8))
def test_points_on_the_roofs_give_the_roofs_back(
    bandwidth: float, compute: float, weights: float, cache: float
) -> None:
    truth = Roofline(weights, cache, bandwidth, compute)
    points = {n: truth.rate(n) for n in (1, 2, 4, 8, 16, 32)}
    roof = fit(points, weights, cache)
    for n, rate in points.items():
        assert math.isclose(roof.rate(n), rate, rel_tol=1e-9)
    if 1 < truth.knee < 32:
        assert math.isclose(roof.knee, truth.knee, rel_tol=1e-6)


def test_one_roof_is_enough_where_no_other_shows() -> None:
    roof = fit({1: 10.0, 4: 40.0}, 100.0, 0.0)
    assert (roof.bandwidth, roof.compute, roof.knee) == (pytest.approx(1000), math.inf, math.inf)


def test_throughput_from_a_profile(tmp_path: Path, config: Path) -> None:
    profile = tmp_path / "profile.json"
    rates = [{"1": {"rate": rate}, "8": {"rate": 60.0}} for rate in (10.0, 30.0, 20.0)]
    engines = [{"forebay": {"points": points}, "vllm": {"points": {}}} for points in rates]
    profile.write_text(json.dumps({"rounds": engines}))
    assert read_profile(profile, "forebay") == {1: 20.0, 8: 60.0}
    command = f"throughput {config} --context 192 --profile {profile}"
    assert "there are several engines" in run(command).output
    plot = tmp_path / "plot.svg"
    done = run(f"{command} --engine forebay --plot {plot}")
    assert re.search(r"^ +8 +\S+ +60 +60 +[+-]0.0%$", done.output, re.MULTILINE), done.output
    drawn = ElementTree.fromstring(plot.read_text())
    assert len(drawn.findall("{*}circle")) == 2
    # One roof is above the other one's points, or fit to them: both are drawn.
    assert len(drawn.findall("{*}polyline")) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,374,44\ny,0,0\nz,10,1\n"),
        ("b.csv", "num_prefill_tokens,num_total_tokens\n1,418\n1,11\n"),
        (
            "c.jsonl",
            '{"input_length": 400, "output_length": 18}\n\n'
            '{"input_length": 10, "output_length": 1}\n',
        ),
        (
            "d.jsonl",
            '{"input_toks": 400, "output_toks": 18}\n{"input_toks": 10, "output_toks": 1}\n',
        ),
    ],
)
def test_lengths_of_published_traces(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert read_lengths(path) == [418, 11]
    lines = found(f"pages {BIG} --trace {path} --block 32")
    assert lines["blocks of 32"] == 429 / (15 * 32)
    assert lines["no blocks: each reserves the longest"] == 429 / (2 * 418)


def test_weights_in_each_format() -> None:
    weights = Weights((Matrix("m", 10, 256, 3),), (Matrix("e", 7, 256),), 256, assumed=False)
    other = (7 + 1) * 256
    assert weights.bytes("fp32") == 4 * (7680 + other)
    assert weights.bytes("bf16") == 2 * (7680 + other)
    assert weights.bytes("int8") == 7680 + 30 * 4 + 2 * other
    assert weights.bytes("int4") == 7680 / 2 + 30 * 2 * 20 / 8 + 2 * other
    assert FORMATS.keys() == BITS.keys()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("size", r"give a MODEL, or its shape: --layers, --heads, --head-dim missing"),
        ("size nowhere", r"MODEL: nowhere can't be read .*by --layers"),
        (f"fit {BIG} --memory 80GB", r"give --params beside a shape"),
        (f"fit {BIG} --memory 80G --params 1e9", r"'--memory': '80G' is no amount .*80GB or"),
        (f"fit {BIG} --memory 80GB --params 70e9", r"--memory: .*leaves nothing .*--weights"),
        (f"pages {BIG}", r"give one of --mean, --length and --trace"),
        (f"pages {BIG} --trace nowhere.csv", r"--trace: nowhere\.csv can't be read"),
        (f"prefix {BIG} --shared 31", r"--shared: 31 tokens fill no block of 32"),
        (f"throughput {BIG} --params 1 --point 3", r"--point: write STREAMS=RATE, like"),
        (f"throughput {BIG} --params 1 --point 3=0", r"--point: give at least one.* positive"),
        (f"throughput {BIG} --params 1", r"give --point several times, or --profile"),
        (f"size {BIG} --plot cache.bmp", r"--plot: cache\.bmp can't be drawn.*\.svg"),
    ],
)
def test_mistakes_are_named_with_their_remedy(command: str, message: str) -> None:
    done = run(command)
    assert done.exit_code == 2
    assert re.search(message, " ".join(done.output.split())), done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, r"num_hidden_layers is missing"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0, not a positive"),
        ({"layer_types": ["linear_attention"]}, r"layer_types\[0\] is 'linear_attention'"),
        ({"quantization_config": {"quant_method": "odd"}}, r"'odd' are not known; give --weights"),
        ({"dtype": "float64"}, r"dtype 'float64' is not known; give --weights"),
    ],
)
def test_configs_that_cannot_be_reckoned_with(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**GEMMA, **change}))
    done = run(f"fit {path} --memory 8GB")
    assert done.exit_code == 2
    assert re.search(message, done.output), done.output


def test_a_family_that_is_not_known_is_said_to_be_counted_like_llama(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**GEMMA, "model_type": "new"}))
    assert "counted as of a model like Llama: 'new'" in run(f"size {path}").output


def test_amounts() -> None:
    assert [bytes_of(text) for text in ("80GB", "1.5 GiB", "512MiB", "7")] == [
        80 * 10**9,
        3 << 29,
        512 << 20,
        7,
    ]
    with pytest.raises(CapacityError, match="like 80GB"):
        bytes_of("many")
    assert amount(999, "bytes") == "999 B"
    assert amount(2**40, "bytes") == "1.1 TB = 1 TiB"


@given(st.floats(1e-3, 1e12))
def test_ticks_are_few_and_reach_far_enough(most: float) -> None:
    values = ticks(most)
    assert values[0] == 0
    assert values[-1] >= most * (1 - 1e-6)
    assert 3 <= len(values) <= 8


PAGE = (Path(__file__).parents[2] / "docs" / "kv.md").read_text()
COMMANDS = [
    line.removeprefix("$ forebay kv ")
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_run(command: str, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "gemma-3-270m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(GEMMA))
    plot = tmp_path / "plot.svg"
    done = run(f"{command} --data-dir {tmp_path} --plot {plot}")
    assert done.exit_code == 0, done.output
    assert ElementTree.fromstring(plot.read_text()).findall("{*}polyline")


def _squeezed(text: str) -> list[str]:
    return [re.sub(r"\s{2,}|─+", "  ", line).strip() for line in text.splitlines()]
