"""The command line.

options   what commands share: their options, and how a command is made of them
commands  prune, quantize, recover, evaluate, bench
answering generate
folders   export, export-adapter, verify, report
output    JSON, lines and tables on stdout
endings   errors and signals -> one line on stderr and an exit code
"""

from typing import Annotated

import typer

from mopcompress import __version__
from mopcompress.cli import folder_commands, generate_command
from mopcompress.cli.model_commands import app

__all__ = ["app", "folder_commands", "generate_command", "main"]


def _show_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"mopcompress {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Compress a causal language model, then win back what it lost with a Mixture of Prompts."""


def main() -> None:
    """Run the command that `sys.argv` names; ends the process with its exit code."""
    app(prog_name="mopcompress")
