"""The command line: a typer app, whose commands load torch only after all of a recipe is checked."""

from typing import Annotated

import typer

from mopcompress import __version__

from mopcompress.cli import compression_commands, model_commands  # isort: skip  (the order of the help)
from mopcompress.cli import folder_commands, generate_command  # isort: skip
from mopcompress.cli.app import app

__all__ = ["app", "compression_commands", "folder_commands", "generate_command", "main", "model_commands"]


def _show_version(requested: bool) -> bool:
    if requested:
        typer.echo(f"mopcompress {__version__}")
        raise typer.Exit
    return requested


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Compress a causal language model, then win back what it lost with a Mixture of Prompts."""


def main() -> None:
    """Run the command that `sys.argv` names, and end the process with its exit code."""
    app(prog_name="mopcompress")
