"""Registration of commands: the options that they share, and what one call of a command gives."""

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from mopcompress.cli.exit_codes import exit_cleanly
from mopcompress.cli.options import GRID_FIELDS, RECIPE, RECOVERY, Options, Resume, setting_option
from mopcompress.cli.progress_display import progress_on
from mopcompress.cli.replaced_flags import RecipeCommand
from mopcompress.errors import UsageError
from mopcompress.progress import Progress
from mopcompress.recipe import Recipe, RunSpec, load_recipe
from mopcompress.recipe.settings import Settings, parse_settings
from mopcompress.recipe.validation_errors import field_name

Body = Callable[..., None]

SETTINGS = "settings"
DEFAULTS = {"resume": Resume.auto, **dict.fromkeys(("json", "verbose", "quiet", "dry_run"), False)}


@dataclass(frozen=True)
class Common:
    """Values of the shared options of one call. `run` and `recovery` are not checked yet; None was not given."""

    run: Mapping[str, object]
    recovery: Mapping[str, object]
    settings: Settings
    recipe: Path | None
    resume: str
    json: bool
    dry_run: bool
    verbose: bool
    quiet: bool

    def load(self) -> Recipe:
        """Read the recipe, with the flags and settings in its `run:`."""
        return load_recipe(self.recipe, self.run, self.settings.get("run", {}))

    @contextmanager
    def working(self) -> Iterator[Progress]:
        """Yield a progress display on stderr; libraries are silent unless `--verbose`. torch loads here."""
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        with progress_on(sys.stderr, quiet=self.quiet) as progress, warnings.catch_warnings():
            if not self.verbose:
                warnings.filterwarnings("ignore", module=r"(torch|transformers|datasets|huggingface_hub)\b")
                _silence_transformers()
            yield progress


def command(
    app: typer.Typer, *groups: Options, parts: tuple[str, ...] = (), unused: frozenset[str] = frozenset()
) -> Callable[[Body], Body]:
    """Register `body(common, **its own options)` as a command that has the options of `groups` too.

    A command that uses `parts` of a recipe has `--recipe` and `--set`. Of `run:` it does not use the `unused` fields: a
    recipe may have them, for other commands, but `--set` may not.
    """
    of_recipe = {**RECIPE, SETTINGS: setting_option(parts)} if parts else {}
    shared = {name: option for group in (*groups[:1], of_recipe, *groups[1:]) for name, option in group.items()}

    def register(body: Body) -> Body:
        def call(**given: Any) -> None:
            with exit_cleanly():
                common = _common({name: given.pop(name) for name in shared}, parts, unused)
                body(common, **given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [option.replace(kind=keyword) for option in list(inspect.signature(body).parameters.values())[1:]]
        added = [
            inspect.Parameter(name, keyword, default=DEFAULTS.get(name), annotation=option)
            for name, option in shared.items()
        ]
        call.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        call.__annotations__ = {option.name: option.annotation for option in (*own, *added)}
        call.__name__, call.__doc__ = body.__name__, body.__doc__
        return app.command(
            cls=type("RecipeCommand", (RecipeCommand,), {"parts": parts, "unused": unused}) if parts else None
        )(call)

    return register


def _common(given: dict[str, Any], parts: tuple[str, ...], unused: frozenset[str]) -> Common:
    settings = parse_settings(given.get(SETTINGS) or (), parts)
    _refuse_unused(settings, unused)
    return Common(
        run={name: value for name, value in given.items() if field_name(RunSpec, name) in RunSpec.model_fields},
        recovery={name: value for name, value in given.items() if name in RECOVERY},
        settings=settings,
        recipe=given.get("recipe"),
        resume=given.get("resume", Resume.auto).value,
        **{name: given.get(name, False) for name in ("json", "dry_run", "verbose", "quiet")},
    )


def _refuse_unused(settings: Settings, unused: frozenset[str]) -> None:
    """Raise `UsageError` for a setting that the command would ignore."""
    for name in settings.get("run", {}):
        field = field_name(RunSpec, name)
        if field in unused:
            where = ", only in a bench" if field in GRID_FIELDS else ""
            flag = ", or give --group-size to quantize" if field == "group_size" else ""
            raise UsageError(f"--set run.{name}: has no effect here{where}; leave it out{flag}")


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
