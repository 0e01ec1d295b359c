"""One call of a command: the options that it shares with others, given to it and read."""

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
from mopcompress.cli.options import RECOVERY, Options, Resume
from mopcompress.cli.progress_display import progress_on
from mopcompress.errors import UsageError
from mopcompress.progress import Progress
from mopcompress.recipe import Recipe, RunSpec, load_recipe

Body = Callable[..., None]

DEFAULTS = {"resume": Resume.auto, **dict.fromkeys(("json", "verbose", "quiet", "dry_run"), False)}


@dataclass(frozen=True)
class Common:
    """What the shared options of one call say. `run` and `recovery` are not checked yet; None was not given."""

    run: Mapping[str, object]
    recovery: Mapping[str, object]
    recipe: Path | None
    resume: str
    json: bool
    dry_run: bool
    verbose: bool
    quiet: bool

    def load(self) -> Recipe:
        """The checked recipe with the flags in its `run:`."""
        return load_recipe(self.recipe, self.run)

    @contextmanager
    def working(self) -> Iterator[Progress]:
        """Progress on stderr, and libraries that keep quiet unless `--verbose`. torch loads here."""
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        with progress_on(sys.stderr, quiet=self.quiet) as progress, warnings.catch_warnings():
            if not self.verbose:
                warnings.filterwarnings("ignore", module=r"(torch|transformers|datasets|huggingface_hub)\b")
                _hush()
            yield progress


def command(app: typer.Typer, *groups: Options) -> Callable[[Body], Body]:
    """Register `body(common, **its own options)` as a command that has the options of `groups` too."""
    shared = {name: option for group in groups for name, option in group.items()}

    def register(body: Body) -> Body:
        def call(**given: Any) -> None:
            with exit_cleanly():
                common = _common({name: given.pop(name) for name in shared})
                body(common, **given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [one.replace(kind=keyword) for one in list(inspect.signature(body).parameters.values())[1:]]
        added = [
            inspect.Parameter(name, keyword, default=DEFAULTS.get(name), annotation=option)
            for name, option in shared.items()
        ]
        call.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in (*own, *added)}
        call.__name__, call.__doc__ = body.__name__, body.__doc__
        return app.command()(call)

    return register


def _common(given: dict[str, Any]) -> Common:
    folder = given.get("model_folder")
    if folder is not None:
        if given["model"] is not None:
            raise UsageError(f"--model: given twice, as {folder!r} and as {given['model']!r}; give it once")
        given["model"] = folder
    return Common(
        run={name: value for name, value in given.items() if name in RunSpec.model_fields},
        recovery={
            "train_batch_size" if name == "rows_per_step" else name: value
            for name, value in given.items()
            if name in RECOVERY
        },
        recipe=given.get("recipe"),
        resume=given.get("resume", Resume.auto).value,
        **{name: given.get(name, False) for name in ("json", "dry_run", "verbose", "quiet")},
    )


def _hush() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
