"""What quantisation costs: the perplexity of a real text, and its drift from float32's.

python benchmarks/perplexity.py [--model FOLDER] [--tokens N] [--only NAME ...]

The text is the Queries of Newton's Opticks (1730), read in windows of 512 tokens, each from its
own <bos>, and every token but the first of a window is scored. Formats other than int8 and int4 are
written by ``checkpoints.py``: the same weights, rounded to the nearest, without calibration.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import encodings, rewrite

from forebay_engine.batch import build_batch
from forebay_engine.config import EngineConfig
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan
from forebay_engine.tokenizer import Tokenizer

TEXT = Path(__file__).parent / "data" / "opticks.txt"
WINDOW = 512
#: Scored at once: the logits of a vocabulary of 262144 are 256 MiB then.
ROWS = 256
FORMATS = (
    "gptq 4 bits",
    "gptq 4 bits, act-order",
    "gptq 8 bits",
    "awq",
    "bitsandbytes nf4, double",
    "bitsandbytes fp4",
    "bitsandbytes int8",
    "fp8 per tensor",
    "fp8 per channel",
    "fp8 blocks",
)


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    dtype: str = "float32"
    quantization: str = "none"


PLAIN = (
    Variant("float32"),
    Variant("bfloat16", dtype="bfloat16"),
    Variant("int8 on load", quantization="int8"),
    Variant("int4 on load", quantization="int4"),
    Variant("fp8 on load", dtype="bfloat16", quantization="fp8"),
)


def windows(model: Path, count: int) -> list[list[int]]:
    """Token ids of the text's windows; the first of each is <bos>."""
    tokenizer = Tokenizer.from_folder(model)
    bos, *ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), special=True)
    size = WINDOW - 1
    return [[bos, *ids[at : at + size]] for at in range(0, min(len(ids), count), size)]


def perplexity(model: Path, variant: Variant, texts: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of a token."""
    config = EngineConfig(
        model=str(model),
        dtype=variant.dtype,
        quantization=variant.quantization,
        block_size=WINDOW,
        num_blocks=2,
        threads=torch.get_num_threads(),
    )
    runner = Runner(config)
    total = count = 0.0
    for ids in texts:
        for lost in losses(runner, ids):
            total, count = total + lost, count + 1
    return math.exp(total / count)


def losses(runner: Runner, ids: list[int]) -> list[float]:
    """Of every token after the first, given those before it, in nats."""
    tables = ((0,),) * len(runner.cache_groups)
    row = Row(0, tuple(ids), 0, len(ids), tables, True, SamplingParams(), len(ids))
    found: list[float] = []
    with torch.inference_mode():
        batch = build_batch(StepPlan((row,)), WINDOW, torch.device("cpu"), runner._windows)
        hidden = runner._model.forward(
            batch.token_ids, batch.positions, runner._caches, batch.paged
        )[:-1]
        for at in range(0, len(hidden), ROWS):
            scores = runner._model.logits(hidden[at : at + ROWS]).float().log_softmax(-1)
            wanted = torch.tensor(ids[1:][at : at + ROWS])[:, None]
            found += (-scores.gather(1, wanted)).flatten().tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a real text by quantisation.")
    parser.add_argument("--model", default="~/.cache/forebay/models/gemma-3-270m")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the text; its end is less")
    parser.add_argument("--only", nargs="*", help="names of the table's rows")
    args = parser.parse_args()
    model = Path(args.model).expanduser()
    texts = windows(model, args.tokens)
    print(f"{sum(map(len, texts)) - len(texts)} tokens in {len(texts)} windows, {model.name}\n")
    print("| weights | perplexity | drift |\n|---|---|---|")
    base: float | None = None
    wanted = {*(args.only or FORMATS), *(args.only or (v.name for v in PLAIN)), "float32"}
    for variant in (*PLAIN, *(Variant(name) for name in FORMATS)):
        if variant.name not in wanted:
            continue
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            folder = model
            if variant not in PLAIN:
                folder = rewrite(model, Path(scratch) / "model", *encodings(128)[variant.name])
            found = perplexity(folder, variant, texts)
        base = found if base is None else base
        drift = 100 * (found / base - 1)
        print(f"| {variant.name} | {found:.3f} | {drift:+.2f} % |", flush=True)
        print(f"{variant.name}: {time.monotonic() - begin:.0f} s", flush=True, file=sys.stderr)


if __name__ == "__main__":
    main()
