"""Which model `forebay kv` reckons with, and how it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click
import msgspec
from msgspec import Struct

from forebay.capacity.cache import BITS
from forebay.capacity.chart import Chart
from forebay.capacity.line import CapacityError, Line, amount
from forebay.capacity.shape import ModelShape, read_config, shape_of
from forebay.capacity.weights import FORMATS, Weights, count, stored_format
from forebay.cli.admin import json_option
from forebay.cli.model import data_dir_option, models_folder
from forebay.cli.output import console, print_json, table

__all__ = ["Answer", "Subject", "answered", "model_options", "weights_options"]

Function = Callable[..., Any]


class Subject(Struct, frozen=True):
    """The model that a command is about."""

    name: str
    shape: ModelShape
    #: Of numbers in the cache.
    dtype: str
    #: Nothing but the shape is known where it is empty.
    config: Mapping[str, Any]

    def weights(self) -> Weights | None:
        return count(self.config) if self.config else None


class Answer(Struct, frozen=True):
    """Arithmetic, then a table; a chart for those who ask for one."""

    lines: Sequence[Line]
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str | float]] = ()
    notes: Sequence[str] = ()
    chart: Chart | None = None


def model_options(function: Function) -> Function:
    """MODEL or its shape, and the type of the cache; the command gets a :class:`Subject`."""

    @click.argument("model", required=False, metavar="[MODEL]")
    @click.option("--layers", type=click.IntRange(1), help="Layers with attention.")
    @click.option("--heads", type=click.IntRange(1), help="Attention heads.")
    @click.option(
        "--kv-heads", type=click.IntRange(1), help="Heads of keys and values.  [default: --heads]"
    )
    @click.option("--head-dim", type=click.IntRange(1), help="Dimensions of a head.")
    @click.option("--dtype", type=click.Choice([*BITS]), help="Of the cache.  [default: bf16]")
    @click.option(
        "--no-windows", is_flag=True, help="Sliding layers keep everything, as some engines do."
    )
    @data_dir_option
    @wraps(function)
    def command(
        model: str | None,
        layers: int | None,
        heads: int | None,
        kv_heads: int | None,
        head_dim: int | None,
        dtype: str | None,
        no_windows: bool,
        data_dir: str,
        **options: Any,
    ) -> Any:
        given = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        config = _config(model, data_dir) if model is not None else {}
        shape = _shape(config, {name: v for name, v in given.items() if v is not None})
        subject = Subject(
            name=model or "the model",
            shape=shape.without_windows() if no_windows else shape,
            dtype=dtype or "bf16",
            config=config,
        )
        return function(subject, **options)

    return command


def weights_options(function: Function) -> Function:
    """How large the weights are; the command gets ``weights_of``."""

    @click.option(
        "--weights", "form", type=click.Choice([*FORMATS]), help="[default: as config.json says]"
    )
    @click.option("--params", type=float, help="Parameters, where there is no MODEL: 70e9.")
    @wraps(function)
    def command(subject: Subject, form: str | None, params: float | None, **options: Any) -> Any:
        weights = subject.weights()
        if weights is None and params is None:
            raise click.UsageError("give --params beside a shape: weights take memory too")
        form = form or (stored_format(subject.config) if subject.config else "bf16")
        if params is not None:
            # Scales and what stays wide are left out: of a bare number they are not known.
            size = params * FORMATS[form].bits / 8
        elif weights is not None:
            size = weights.bytes(form)
        return function(subject, form=form, weight_bytes=size, **options)

    return command


def answered(function: Function) -> Function:
    """Print the :class:`Answer` that a command returns: as a table, JSON, or a chart."""

    @click.option(
        "--plot",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE.svg",
        help="Draw it there as well.",
    )
    @json_option
    @wraps(function)
    def command(*arguments: Any, plot: Path | None, as_json: bool, **options: Any) -> None:
        if plot is not None and plot.suffix != ".svg":
            raise click.BadParameter(
                f"{plot} can't be drawn: name a file that ends in .svg", param_hint="--plot"
            )
        answer: Answer = function(*arguments, **options)
        if plot is not None:
            if answer.chart is None:
                raise click.BadParameter("there is nothing to draw here", param_hint="--plot")
            plot.write_text(answer.chart.svg(), encoding="utf-8")
        if as_json:
            print_json(_plain(answer))
        else:
            _show(answer)

    return command


def _config(model: str, data_dir: str) -> dict[str, Any]:
    """Of a path, or of a pulled model of that name."""
    place = Path(model).expanduser()
    pulled = models_folder(data_dir) / model
    return read_config(pulled if not place.exists() and pulled.is_dir() else place)


def _shape(config: Mapping[str, Any], given: Mapping[str, int]) -> ModelShape:
    """What the flags say goes before what the file says."""
    if config:
        return msgspec.structs.replace(shape_of(config), **_without_lost_windows(config, given))
    missing = [
        f"--{n.replace('_', '-')}" for n in ("layers", "heads", "head_dim") if n not in given
    ]
    if missing:
        raise click.UsageError(f"give a MODEL, or its shape: {', '.join(missing)} missing")
    return ModelShape(
        given["layers"],
        given["heads"],
        kv_heads=given.get("kv_heads", given["heads"]),
        head_dim=given["head_dim"],
    )


def _without_lost_windows(config: Mapping[str, Any], given: Mapping[str, int]) -> dict[str, Any]:
    if "layers" in given and shape_of(config).windows:
        raise CapacityError(
            "--layers: this model's layers are of two kinds, so another number of them says "
            "nothing; leave out --layers or MODEL"
        )
    return dict(given)


def _plain(answer: Answer) -> dict[str, Any]:
    return {
        "lines": answer.lines,
        "table": [dict(zip(answer.columns, row, strict=True)) for row in answer.rows],
        "notes": answer.notes,
    }


def _show(answer: Answer) -> None:
    out = console()
    lines = table("what", "arithmetic", "result", numbers=("result",))
    for line in answer.lines:
        lines.add_row(line.name, line.arithmetic, amount(line.value, line.unit))
    out.print(lines)
    if answer.rows:
        rows = table(*answer.columns, numbers=tuple(answer.columns))
        for row in answer.rows:
            rows.add_row(*(_cell(value) for value in row))
        out.print("", rows, sep="\n")
    for note in answer.notes:
        out.print("", note, sep="\n", soft_wrap=True)


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
