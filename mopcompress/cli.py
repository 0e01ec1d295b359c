"""The command line: parse, check the whole recipe, call one stage, print what it gives. torch loads after the checks."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopcompress import __version__
from mopcompress.console import Console
from mopcompress.errors import MopError, OutputError, QualityGateError, RecipeError, StoppedError, UsageError

if TYPE_CHECKING:
    from mopcompress.recipe import Recipe

app = typer.Typer(
    name="mopcompress",
    help="Compress a causal language model, then win back what it lost with a Mixture of Prompts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # locals can hold tokens
    context_settings={"help_option_names": ["-h", "--help"]},
)
