"""`forebay kv`: what a KV cache takes, what fits, what paging and sharing save, what it gives.

Every figure stands beside the arithmetic that leads to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import click

from forebay.capacity.cache import BITS, per_token, sequence_bytes, size_lines, what_fits
from forebay.capacity.chart import Chart, Series
from forebay.capacity.line import CapacityError, Line, bytes_of, number
from forebay.capacity.paging import (
    Utilisation,
    expected,
    prefix_lines,
    read_lengths,
    utilisation,
)
from forebay.capacity.throughput import Roofline, fit, read_profile
from forebay.capacity.weights import stored_format, weight_lines
from forebay.cli.kv_model import Answer, Subject, answered, model_options, weights_options

__all__ = ["kv"]

#: Of pages, where none are asked for; as engines offer them.
_BLOCKS = (1, 8, 16, 32, 64, 128, 256)

_context = click.option(
    "--context", type=click.IntRange(1), default=4096, show_default=True, help="Tokens a sequence."
)
_block = click.option(
    "--block", type=click.IntRange(1), default=1, show_default=True, help="Tokens in a block."
)


def _memory(ctx: click.Context, param: click.Parameter, value: str) -> int:
    try:
        return bytes_of(value)
    except CapacityError as error:
        raise click.BadParameter(error.message, ctx, param) from error


@click.group()
def kv() -> None:
    """Reckon with KV caches: their size, what fits, what paging and prefixes save, throughput.

    MODEL is a config.json, a folder with one, or a pulled model; without one, give the shape:
    --layers, --heads, --kv-heads, --head-dim.
    """


@kv.command()
@model_options
@_context
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences.")
@_block
@answered
def size(subject: Subject, context: int, batch: int, block: int) -> Answer:
    """Show how large the cache of BATCH sequences of CONTEXT tokens is, and the weights.

    A 70B model of 80 layers with 64 heads of 128 dimensions needs 343.6 GB for 32 sequences of
    4,096 tokens in fp16. It is sometimes given as 17.2 GB, which is a twentieth of it. With 8 KV
    heads, as such models have today, it is 42.9 GB.
    """
    shape, weights = subject.shape, subject.weights()
    lines = list(size_lines(shape, subject.dtype, context, batch, block))
    notes = []
    if weights is not None:
        lines += weight_lines(weights, stored_format(subject.config))
        if weights.assumed:
            notes.append(_assumed(subject))
    if shape.context is not None and context > shape.context:
        notes.append(f"The model was made for sequences of {shape.context:,} tokens at most.")
    if shape.windows:
        bits = BITS[subject.dtype]
        full = batch * sequence_bytes(shape.without_windows(), bits, context, block)
        lines.append(Line("the sequences, if no layer had a window", "--no-windows", full, "bytes"))
    rows: list[list[str | float]] = [
        [dtype, per_token(shape, bits), batch * sequence_bytes(shape, bits, context, block) / 1e9]
        for dtype, bits in BITS.items()
    ]
    return Answer(
        lines,
        ("cache in", "B per token", "GB in all"),
        rows,
        notes,
        _size_chart(subject, context, batch, block),
    )


@kv.command("fit")
@model_options
@click.option("--memory", callback=_memory, required=True, help="Like 80GB or 24GiB.")
@click.option(
    "--reserve", callback=_memory, default="1GiB", show_default=True, help="For everything else."
)
@_context
@_block
@weights_options
@answered
def fit_(
    subject: Subject,
    memory: int,
    reserve: int,
    context: int,
    block: int,
    form: str,
    weight_bytes: float,
) -> Answer:
    """Show how many tokens and sequences fit into a MEMORY beside the weights."""
    shape, bits = subject.shape, BITS[subject.dtype]
    lines = [Line("weights", f"in {form}", weight_bytes, "bytes")]
    lines += what_fits(
        shape, subject.dtype, memory, weight_bytes, context, block=block, reserve=reserve
    )
    left = memory - weight_bytes - reserve

    def sequences(tokens: int) -> int:
        return int(left // sequence_bytes(shape, bits, tokens, block))

    contexts = sorted({context, *(2**n for n in range(9, 18))})
    rows: list[list[str | float]] = [[tokens, sequences(tokens)] for tokens in contexts]
    line = [(float(tokens), float(sequences(tokens))) for tokens in _steps(context)]
    chart = Chart(
        f"What fits: {subject.name}, {subject.dtype}",
        "tokens a sequence",
        "sequences at once",
        [Series("sequences", line)],
    )
    return Answer(lines, ("tokens a sequence", "sequences at once"), rows, (), chart)


@kv.command()
@model_options
@click.option("--mean", type=click.FloatRange(1), help="Mean length of a sequence, in tokens.")
@click.option("--length", "lengths", type=click.IntRange(1), multiple=True, help="A length; again.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Lengths of a trace: Azure's or Vidur's CSV, Mooncake's JSON lines.",
)
@click.option("--block", "blocks", type=click.IntRange(1), multiple=True, help="A size; again.")
@answered
def pages(
    subject: Subject,
    mean: float | None,
    lengths: tuple[int, ...],
    trace: Path | None,
    blocks: tuple[int, ...],
) -> Answer:
    """Show how full blocks of each size are: by formula for a MEAN length, exactly for LENGTHS.

    Beside it, what is lost when each sequence reserves as many tokens as the longest one has.
    """
    if (mean is not None) + bool(lengths) + (trace is not None) != 1:
        raise click.UsageError("give one of --mean, --length and --trace")
    found: Sequence[int] = read_lengths(trace) if trace is not None else lengths
    sizes = sorted(set(blocks)) or _BLOCKS
    reckoned = [expected(mean, b) if mean is not None else utilisation(found, b) for b in sizes]
    token = per_token(subject.shape.without_windows(), BITS[subject.dtype])
    lines = [
        Line(f"blocks of {item.block}", item.arithmetic, item.share, "share") for item in reckoned
    ]
    if found:
        lines.append(_reserved(found))
    rows: list[list[str | float]] = [
        [item.block, f"{item.share:.2%}", item.slots - item.tokens, _lost(item, token)]
        for item in reckoned
    ]
    chart = Chart(
        "Utilisation of paged blocks",
        "tokens in a block",
        "slots in use, %",
        [Series("in use", [(float(item.block), 100 * item.share) for item in reckoned])],
    )
    whose = "a sequence" if mean is not None else f"{len(found):,} sequences"
    columns = ("block", "in use", f"slots lost, {whose}", "MB lost")
    return Answer(lines, columns, rows, (), chart)


@kv.command()
@model_options
@click.option("--shared", type=click.IntRange(1), required=True, help="Tokens all begin with.")
@click.option("--own", type=click.IntRange(1), default=100, show_default=True, help="And then.")
@click.option("--requests", type=click.IntRange(2), default=100, show_default=True)
@click.option(
    "--hit-rate",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Of all but the first: those that find the prefix cached.",
)
@click.option("--block", type=click.IntRange(1), default=32, show_default=True)
@answered
def prefix(
    subject: Subject, shared: int, own: int, requests: int, hit_rate: float, block: int
) -> Answer:
    """Show what a prefix that REQUESTS share saves: tokens of prefill, and bytes of cache."""
    token = per_token(subject.shape.without_windows(), BITS[subject.dtype])
    lines = prefix_lines(shared, own, requests, hit_rate, block, token)

    def share(rate: float) -> float:
        of_prefill = prefix_lines(shared, own, requests, rate, block, token)[3]
        return 100 * of_prefill.value

    rates = [i / 10 for i in range(11)]
    chart = Chart(
        f"Prefill spared by a prefix of {shared:,} tokens",
        "hit rate, %",
        "prompt tokens spared, %",
        [Series("spared", [(100 * rate, share(rate)) for rate in rates])],
    )
    rows: list[list[str | float]] = [[f"{rate:.0%}", f"{share(rate):.1f}%"] for rate in rates[::2]]
    return Answer(lines, ("hit rate", "prefill spared"), rows, (), chart)


@kv.command()
@model_options
@_context
@click.option("--point", "points", multiple=True, metavar="STREAMS=RATE", help="Tokens/s; again.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="What `benchmarks/engine_cpu.py --json FILE` wrote.",
)
@click.option("--engine", help="Whose figures of the profile.")
@weights_options
@answered
def throughput(
    subject: Subject,
    context: int,
    points: tuple[str, ...],
    profile: Path | None,
    engine: str | None,
    form: str,
    weight_bytes: float,
) -> Answer:
    """Show tokens/s against concurrency: the roofs of bandwidth and computing, fitted to points.

    A step reads the weights once and every sequence's cache, and gives each of n streams a token:
    rate(n) = min(n·B ÷ (W + n·K), C), with W and K from the model, B and C from the measurements.
    """
    if bool(points) == (profile is not None):
        raise click.UsageError("give --point several times, or --profile")
    measured = read_profile(profile, engine) if profile is not None else _points(points)
    cache = sequence_bytes(subject.shape, BITS[subject.dtype], context)
    roof = fit(measured, weight_bytes, cache)
    lines = [
        Line("W, weights read in a step", f"in {form}", weight_bytes, "bytes"),
        Line("K, cache read for a sequence", f"{context:,} tokens", cache, "bytes"),
        Line("B, bytes a second", "fitted", roof.bandwidth, "bytes"),
    ]
    notes = ["No measurement shows the roof of computing; more streams might."]
    if math.isfinite(roof.compute):
        lines.append(Line("C, tokens a second", "fitted", roof.compute, "tokens/s"))
        notes = []
    if math.isfinite(roof.knee):
        sums = f"{roof.compute:,.4g} × W ÷ (B − {roof.compute:,.4g} × K)"
        lines.append(Line("streams where the roofs meet", sums, roof.knee, "sequences"))
    streams = sorted({*measured, *(2**n for n in range(8) if 2**n <= 4 * max(measured))})
    rows: list[list[str | float]] = [
        [n, roof.bandwidth_bound(n), roof.rate(n), measured.get(n, "–"), _error(roof, measured, n)]
        for n in streams
    ]
    columns = ("streams", "bandwidth allows", "model, tokens/s", "measured", "error")
    return Answer(lines, columns, rows, notes, _throughput_chart(subject, roof, measured))


def _size_chart(subject: Subject, context: int, batch: int, block: int) -> Chart:
    bits = BITS[subject.dtype]
    shapes = {subject.dtype: subject.shape}
    if subject.shape.windows:
        shapes["without windows"] = subject.shape.without_windows()
    series = [
        Series(
            name,
            [
                (float(n), batch * sequence_bytes(shape, bits, n, block) / 1e9)
                for n in _steps(context)
            ],
        )
        for name, shape in shapes.items()
    ]
    title = f"KV cache of {subject.name}, {number(batch)} sequence{'s' if batch > 1 else ''}"
    return Chart(title, "tokens a sequence", "GB", series)


def _throughput_chart(subject: Subject, roof: Roofline, measured: dict[int, float]) -> Chart:
    most = 2 * max(measured)
    across = [most * i / 100 for i in range(1, 101)]
    # The roof of bandwidth is drawn no higher than is of use.
    highest = 1.3 * max(*measured.values(), roof.rate(most))
    series = [
        Series("model", [(n, roof.rate(n)) for n in across]),
        Series("measured", [(float(n), rate) for n, rate in sorted(measured.items())], dots=True),
    ]
    if math.isfinite(roof.compute):
        bound = [(n, v) for n in across if (v := roof.bandwidth_bound(n)) <= highest]
        series.append(Series("bandwidth alone", bound))
    title = f"Throughput of {subject.name} against concurrency"
    return Chart(title, "streams", "output tokens/s", series)


def _steps(most: int) -> list[int]:
    """Sixty lengths up to ``most``, evenly."""
    return sorted({max(1, most * i // 60) for i in range(1, 61)})


def _reserved(lengths: Sequence[int]) -> Line:
    longest, tokens = max(lengths), sum(lengths)
    arithmetic = f"{number(tokens)} tokens ÷ ({len(lengths):,} sequences × {longest:,})"
    share = tokens / (len(lengths) * longest)
    return Line("no blocks: each reserves the longest", arithmetic, share, "share")


def _lost(item: Utilisation, token_bytes: float) -> float:
    return (item.slots - item.tokens) * token_bytes / 1e6


def _points(given: Sequence[str]) -> dict[int, float]:
    points = {}
    for text in given:
        streams, _, rate = text.partition("=")
        try:
            points[int(streams)] = float(rate)
        except ValueError as error:
            raise click.BadParameter(
                f"write STREAMS=RATE, like 8=310.5, not {text!r}", param_hint="--point"
            ) from error
    return points


def _error(roof: Roofline, measured: dict[int, float], streams: int) -> str:
    rate = measured.get(streams)
    return "–" if rate is None else f"{roof.rate(streams) / rate - 1:+.1%}"


def _assumed(subject: Subject) -> str:
    family = subject.config.get("model_type", "no model_type")
    return f"Weights are counted as of a model like Llama: {family!r} is not known."
