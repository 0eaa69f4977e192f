"""The program behind ``forebay watermark detect``: looks for a mark in a text."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

import click

from forebay_engine.detection import Evidence, detect
from forebay_engine.errors import EngineError
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.watermark import KEY_VARIABLE, parse, read_key

#: Where `forebay model pull` puts models by default.
_MODELS = Path("~/.cache/forebay/models")


@click.command(name="forebay watermark detect")
@click.argument("text", type=click.File(encoding="utf-8"), default="-")
@click.option(
    "--watermark",
    default="kgw",
    show_default=True,
    help="The scheme, with its parameters where they are not the usual: 'kgw gamma=0.5'.",
)
@click.option("--model", help="Folder or name of the model whose tokenizer reads the text.")
@click.option("--tokens", is_flag=True, help="The text is token ids: a JSON list, or in rows.")
@click.option(
    "--key-file", default="", help=f"File with the key; {KEY_VARIABLE} holds it otherwise."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    text: TextIO, watermark: str, model: str | None, tokens: bool, key_file: str, as_json: bool
) -> None:
    """Say how likely it is that TEXT (a file; standard input without one) was marked with the key.

    The p-value is the probability that a text which knows nothing of the key looks as marked.
    """
    try:
        mark, key = parse(watermark), read_key(key_file)
        if not key:
            raise click.UsageError(f"there is no key: give --key-file, or set {KEY_VARIABLE}")
        ids = _token_ids(text.read(), model, tokens)
    except EngineError as error:
        raise click.ClickException(error.message) from error
    evidence = detect(ids, replace(mark, key=key))
    found = {name: value for name, value in asdict(evidence).items() if value is not None}
    click.echo(json.dumps(found) if as_json else _in_words(evidence))


def _token_ids(text: str, model: str | None, tokens: bool) -> list[int]:
    if tokens:
        words = re.split(r"[\s,\[\]]+", text.strip(" \t\r\n[]"))
        if not all(word.isdecimal() for word in words):
            raise click.UsageError("--tokens: these are not token ids")
        return [int(word) for word in words]
    if model is None:
        raise click.UsageError("a text needs --model, whose tokenizer reads it; or give --tokens")
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _MODELS.expanduser() / model
    return Tokenizer.from_folder(folder).encode(text, special=False)


def _in_words(found: Evidence) -> str:
    lines = [f"tokens    {found.tokens}, of which {found.scored} count"]
    if found.green is not None and found.gamma is not None:
        share = found.green / found.scored if found.scored else 0.0
        lines.append(f"green     {found.green}, {share:.1%}; by chance {found.gamma:.1%}")
    if found.score is not None:
        lines.append(f"score     {found.score:.1f}; by chance {found.scored}")
    lines.append(f"z-score   {found.z:.2f}")
    lines.append(f"p-value   {found.p_value:.3g} (10^{found.log10_p_value:.1f})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
