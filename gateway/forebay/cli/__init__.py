"""The command line: one command a module, imported only when it is used."""

from __future__ import annotations

import click

from forebay.cli.group import Command, LazyGroup

__all__ = ["main"]

_COMMANDS = {
    "serve": Command("forebay.cli.serve:serve", "Start the gateway."),
    "chat": Command("forebay.cli.chat:chat", "Talk to a model in the terminal."),
    "check": Command("forebay.cli.check:check", "Show what a configuration means, or its errors."),
    "backends": Command("forebay.cli.backends:backends", "Show the backends of a running gateway."),
    "explain": Command("forebay.cli.explain:explain", "Show why a request went where it went."),
    "plugins": Command("forebay.cli.plugins:plugins", "Show what is installed, and what failed."),
    "conformance": Command(
        "forebay.cli.conformance:conformance", "Check what a backend keeps of the promises."
    ),
    "model": Command("forebay.cli.model:model", "Fetch models for the native engine."),
    "kv": Command("forebay.cli.kv:kv", "Reckon what a model's KV cache takes and gives."),
    "watermark": Command("forebay.cli.watermark:watermark", "Look for marks in answers."),
    "key": Command("forebay.cli.key:key", "Make API keys."),
    "version": Command("forebay.cli.version:version", "Show the version."),
}


@click.group(
    cls=LazyGroup,
    commands_by_name=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
def main() -> None:
    """One OpenAI-compatible endpoint in front of mixed LLM serving backends.

    `forebay serve` starts it with a demo model, `forebay serve --config forebay.yaml` with yours.
    """
