"""`forebay serve`: the gateway itself."""

from __future__ import annotations

import json
from pathlib import Path

import click

from forebay.cli.configured import demo, from_file
from forebay.config import Config
from forebay.config_file import warnings

_EVERY_ADDRESS = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    envvar="FOREBAY_CONFIG",
    show_envvar=True,
    help="Configuration; without one the demo model is served.",
)
@click.option(
    "--model",
    metavar="FOLDER|NAME",
    help="Serve this model on the native engine: a folder with safetensors, or a name to pull.",
)
@click.option("--host", help="Address of the data port.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Data port.  [default: 8000]")
@click.option("--admin-port", type=int, help="Admin port.  [default: 8001]")
@click.option("--insecure", is_flag=True, help="Let other machines in without API keys.")
def serve(
    path: Path | None,
    model: str | None,
    host: str | None,
    port: int | None,
    admin_port: int | None,
    insecure: bool,
) -> None:
    """Start the gateway: an OpenAI-compatible endpoint, and an admin port beside it."""
    if path is not None and model is not None:
        raise click.UsageError("give either --config or --model")
    given = {"listen.host": host, "listen.port": port, "admin.port": admin_port}
    overrides = {key: value for key, value in given.items() if value is not None}
    if path is not None:
        config, registry = from_file(path, overrides=overrides, insecure=insecure)
    else:
        config, registry = demo(model, overrides=overrides, insecure=insecure)

    def announce(data_port: int, admin_port: int) -> None:
        click.echo(banner(config, data_port, admin_port), err=True)

    # Imported last: it takes most of a second, and a wrong configuration is told without it.
    from forebay.server import serve as run

    run(config, registry, path.parent if path is not None else Path(), announce)


def banner(config: Config, data_port: int, admin_port: int) -> str:
    """What somebody who has just started it wants to know."""
    endpoint = f"{_url(config.listen.host, data_port)}/v1"
    lines = [
        "",
        f"  {click.style('Forebay', bold=True)}",
        f"  endpoint  {click.style(endpoint, fg='green')}",
        f"  models    {', '.join(config.models) or '(none)'}",
        f"  admin     {_url(config.admin.host, admin_port)}",
        *(click.style(f"  warning   {line}", fg="yellow") for line in warnings(config)),
        "",
    ]
    if config.models:
        lines += ["  Try it, once it is ready:", "", *_try_it(endpoint, config), ""]
    return "\n".join(lines)


def _url(host: str, port: int) -> str:
    """As a client on this machine would write it."""
    name = "127.0.0.1" if host in _EVERY_ADDRESS else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def _try_it(endpoint: str, config: Config) -> list[str]:
    body = {
        "model": next(iter(config.models)),
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": 64,
    }
    key = ["      -H 'authorization: Bearer YOUR_KEY' \\"] if config.keys else []
    text = json.dumps(body).replace("'", "'\\''")
    return [
        f"    curl {endpoint}/chat/completions -H 'content-type: application/json' \\",
        *key,
        f"      -d '{text}'",
    ]
