"""`generate`: answers to instructions of `--prompt`, of a terminal, or of a pipe."""

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from mopcompress.cli.app import app
from mopcompress.cli.command import Common, command
from mopcompress.cli.model_commands import Adapter
from mopcompress.cli.options import BATCH, DRY_RUN, MACHINE, MODEL, NOT_FOR_GENERATION, VERBOSITY
from mopcompress.cli.output import print_json, print_plan
from mopcompress.entrypoints import preflight
from mopcompress.errors import UsageError

if TYPE_CHECKING:
    from mopcompress.entrypoints.generate import AnswerGenerator


@command(app, MODEL, MACHINE, BATCH, DRY_RUN, VERBOSITY, parts=("run",), unused=NOT_FOR_GENERATION)
def generate(
    common: Common,
    adapter: Adapter = None,
    prompt: Annotated[list[str] | None, typer.Option(help="An instruction; may be given several times.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
) -> None:
    """Answer instructions: those of --prompt, or the lines of stdin. On a terminal an empty line or Ctrl-D ends."""
    recipe = common.load()
    preflight.check_inputs(recipe.run, data=False, calibration=False)
    chats = not prompt and sys.stdin.isatty()
    prompts = prompt or ([] if chats else _piped())
    for instruction in prompts:
        try:
            instruction.encode()
        except UnicodeEncodeError as error:  # bytes that are not UTF-8 come as lone surrogates
            raise UsageError(
                f"instruction {instruction!r}: not text at character {error.start}; give it as UTF-8"
            ) from error
    if common.dry_run:
        print_plan(
            common, recipe, None, False, {"model": preflight.model_facts(recipe.run.model), "prompts": len(prompts)}
        )
        return
    with common.working() as progress:
        from mopcompress.entrypoints.generate import AnswerGenerator

        answering = AnswerGenerator(recipe.run, adapter, max_new_tokens=max_new_tokens, progress=progress)
        answers = answering.answers(prompts)
    if chats:
        _chat(answering)
    elif common.json:
        print_json(
            {"answers": [{"prompt": prompt, "answer": text} for prompt, text in zip(prompts, answers, strict=True)]}
        )
    else:
        typer.echo("\n\n".join(answers))


def _piped() -> list[str]:
    """Return the lines of stdin that hold something."""
    try:
        lines = [line.strip() for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin: not text at byte {error.start}; pipe instructions as UTF-8, one per line") from error
    if not lines:
        raise UsageError("--prompt: missing, and nothing comes through stdin; give --prompt 'an instruction'")
    return lines


def _chat(answering: "AnswerGenerator") -> None:
    """Answer every line by itself: prompts are trained on single instructions, so earlier ones are not remembered."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (makes `input` a line editor with a history)

    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if not line.strip():
            return
        answering.stream(line, lambda text: typer.echo(text, nl=False))
        typer.echo()
