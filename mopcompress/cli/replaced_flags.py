"""Errors for flags that `--set` took the place of; each names the setting to use."""

import shlex
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand

from mopcompress.cli.progress_display import print_error
from mopcompress.errors import UsageError
from mopcompress.recipe import PromptRecoveryModifier, RunSpec, StructuredPruningModifier
from mopcompress.recipe.field_types import STORED_NAMES, Spec
from mopcompress.recipe.validation_errors import own_fields

_KEYS = {
    **{field: f"recovery.{field}" for field in own_fields(PromptRecoveryModifier) if field != "arm"},
    **{field: f"run.{field}" for field in own_fields(RunSpec) if field != "model"},
}
REPLACED_FLAGS: Mapping[str, str] = {  # flag -> key of `--set`
    **{f"--{field.replace('_', '-')}": key for field, key in _KEYS.items()},
    **{f"--{stored.replace('_', '-')}": _KEYS[field] for field, stored in STORED_NAMES.items()},
    "--rows-per-step": "recovery.train_batch_size",
    "--batch-size": "run.eval_batch_size",
    "--head-sparsity": "pruning.head_sparsity",
}


class RecipeCommand(TyperCommand):
    """A command that says what replaces a flag that it does not have."""

    parts: tuple[str, ...] = ()  # of a recipe, that its `--set` takes
    unused: frozenset[str] = frozenset()  # fields of `run:` that it does not take

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as typer does; an unknown flag that has a replacement ends the command with an error that names it."""
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            flag = getattr(error, "option_name", None)  # of a class that typer has under another name in each version
            message = flag and self._replacement(flag, words)
            if not message:
                raise
            print_error(message)
            raise typer.Exit(UsageError.exit_code) from None

    def _replacement(self, flag: str, words: list[str]) -> str | None:
        index = next((index for index, word in enumerate(words) if word.partition("=")[0] == flag), None)
        if index is None or self._has(flag):  # an option that lacks its value
            return None
        _, sign, text = words[index].partition("=")
        value = text if sign else next(iter(words[index + 1 :]), "VALUE")
        if flag == "--model":
            return f"--model: no such flag; give the model as an argument: {shlex.quote(value)}"
        key = REPLACED_FLAGS.get(flag.replace("--no-", "--"))
        part, _, field = (key or "").partition(".")
        if key is None or part not in self.parts or (part == "run" and field in self.unused):
            return None
        present = f"--{field.replace('_', '-')}"
        if self._has(present):
            return f"{flag}: no such flag; use {present} {shlex.quote(value)}"
        return f"{flag}: no such flag; use --set {shlex.quote(f'{key}={_in_yaml(key, flag, value)}')}"

    def _has(self, flag: str) -> bool:
        return any(flag in option.opts for option in self.params)


def _in_yaml(key: str, flag: str, value: str) -> str:
    part, _, name = key.partition(".")
    kinds: dict[str, type[Spec]] = {"run": RunSpec, "recovery": PromptRecoveryModifier}
    kind = kinds.get(part, StructuredPruningModifier)
    field = kind.model_fields[name]
    if field.annotation is bool:
        return "false" if flag.startswith("--no-") else "true"
    return f"[{value}]" if isinstance(field.default, tuple) else value
