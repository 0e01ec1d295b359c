"""The typer app that commands register with."""

import typer

app = typer.Typer(
    name="mopcompress",
    help="Compress a causal language model, then win back what it lost with a Mixture of Prompts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # it would show the values of variables, and those can hold tokens
    context_settings={"help_option_names": ["-h", "--help"]},
)
