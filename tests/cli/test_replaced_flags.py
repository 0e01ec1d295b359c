"""Flags that `--set` replaces: each is an error that says what to write, and that is accepted."""

import re
import shlex
from typing import Any

import pytest
import typer
from cli_runner import invoke

from mopcompress.cli import app
from mopcompress.cli.replaced_flags import REPLACED_FLAGS
from mopcompress.recipe import load_recipe
from mopcompress.recipe.overrides import bench_recipe, pruning_recipe
from mopcompress.recipe.settings import PARTS, parse_settings

COMMANDS = {
    name: command for name, command in typer.main.get_command(app).commands.items() if hasattr(command, "parts")
}
VALUES = {  # of fields that take no whole number, or not every one
    **dict.fromkeys(
        ("data", "teacher", "calibration", "eval_text", "train_text", "output_dir", "backend_python"), "a/b"
    ),
    **dict.fromkeys(("ratios", "distill", "head_sparsity", "warmup_fraction", "max_fallback_fraction"), "0.25"),
    "bits": "3",
    "arms": "none,mop",
    "dense_arms": "none,mop",
    "methods": "wanda,alps",
    "device": "cpu",
    "backend": "llmcompressor",
    "gate_labels": "clusters",
    "gate_clipping": "together",
    "gate_mode": "values",
    "columns": "{question: instruction}",
    "learning_rates": "{mop: 0.25}",
    "adapter_targets": "q_proj",
}


def options(command: str) -> set[str]:
    return {word for option in COMMANDS[command].params for word in option.opts}


def commands_without(flag: str, part: str) -> list[str]:
    """The commands that use the part of a recipe, without this flag, those without a flag of the field's name first."""
    field = REPLACED_FLAGS[flag].partition(".")[2]
    names = [name for name in COMMANDS if uses(name, part, field) and flag not in options(name)]
    return sorted(names, key=lambda name: f"--{field.replace('_', '-')}" in options(name))


def uses(name: str, part: str, field: str) -> bool:
    command = COMMANDS[name]
    return part in command.parts and not (part == "run" and field in command.unused)


def changed_field(key: str, word: str) -> tuple[Any, Any]:
    """The value that `--set word` gives the field, and the default value."""
    part, _, field = key.partition(".")
    settings = parse_settings([word], [part])
    recipe = load_recipe(None, {}, settings.get("run", {}))
    if part == "run":
        return getattr(recipe.run, field), getattr(load_recipe(None).run, field)
    if part == "recovery":
        return getattr(bench_recipe(recipe, {}, settings).recovery, field), getattr(recipe.recovery, field)
    [modifier] = pruning_recipe(recipe, method="structured", settings=settings).modifiers(*PARTS["pruning"])
    return getattr(modifier, field), getattr(recipe.modifier_for("structured"), field)


REPLACED = [flag for flag, key in REPLACED_FLAGS.items() if commands_without(flag, key.partition(".")[0])]


@pytest.mark.parametrize("flag", REPLACED)
def test_a_replaced_flag_names_the_setting_that_works(flag: str) -> None:
    key = REPLACED_FLAGS[flag]
    part, _, field = key.partition(".")
    command = commands_without(flag, part)[0]
    outcome = invoke(command, flag, VALUES.get(field, "9"), "--dry-run")
    assert outcome.code == 2
    [error] = outcome.errors
    option, word = shlex.split(re.fullmatch(rf"error: {flag}: no such flag; use (.*)", error)[1])
    present = f"--{field.replace('_', '-')}"
    if present in options(command):  # every command that uses the field has a flag of its name
        assert (option, word) == (present, VALUES.get(field, "9"))
        return
    assert option == "--set"
    assert word.startswith(f"{key}=")
    changed, default = changed_field(key, word)
    assert changed != default


def test_a_flag_without_a_replacement_is_everywhere() -> None:
    others = [flag for flag in REPLACED_FLAGS if flag not in REPLACED]
    assert others
    for flag in others:
        part, _, field = REPLACED_FLAGS[flag].partition(".")
        assert all(flag in options(name) for name in COMMANDS if uses(name, part, field))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bench", "--rows-per-step=8"), "--rows-per-step: no such flag; use --set recovery.train_batch_size=8"),
        (("bench", "--rows-per-step"), "--rows-per-step: no such flag; use --set recovery.train_batch_size=VALUE"),
        (("bench", "--joint"), "--joint: no such flag; use --set run.prune_then_quantize=true"),
        (("bench", "--no-joint"), "--no-joint: no such flag; use --set run.prune_then_quantize=false"),
        (("bench", "--dense-arms", "none,mop"), "--dense-arms: no such flag; use --set 'run.dense_arms=[none,mop]'"),
        (("bench", "--map", "q=input"), "--map: no such flag; use --columns q=input"),
        (("evaluate", "--write-tokens", 4), "--write-tokens: no such flag; use --max-new-tokens 4"),
        (("bench", "--train-text", "my text"), "--train-text: no such flag; use --set 'run.train_text=my text'"),
        (("generate", "--model", "my model"), "--model: no such flag; give the model as an argument: 'my model'"),
    ],
)
def test_the_error_of_a_flag_has_its_value(words: tuple[object, ...], message: str) -> None:
    outcome = invoke(*words)
    assert (outcome.code, outcome.errors) == (2, [f"error: {message}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bench", "--ratio", "0.5"), "Possible options: --"),
        (("bench", "--ratios"), "requires an argument"),
        (("prune", "--rows-per-step", 8), "No such option: --rows-per-step"),
        (("verify", "--rows-per-step", 8), "No such option: --rows-per-step"),
    ],
)
def test_an_unknown_flag_keeps_its_usual_error(words: tuple[object, ...], message: str) -> None:
    outcome = invoke(*words)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.replace("│", " ").split())


@pytest.mark.parametrize("word", ["run.arms=[mop]", "run.joint=true", "run.group_size=32"])
def test_only_a_bench_has_settings_of_the_grid(word: str) -> None:
    outcome = invoke("quantize", "--set", word, "--dry-run")
    assert outcome.code == 2
    assert f"--set {word.partition('=')[0]}: has no effect here, only in a bench" in outcome.err


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("generate", "run.max_new_tokens=5"),
        ("generate", "run.text=my.txt"),
        ("recover", "run.calibration=data"),
        ("evaluate", "run.max_seq_length=64"),
        ("prune", "run.write_tokens=5"),
    ],
)
def test_a_setting_that_a_command_would_ignore_is_an_error(command: str, word: str) -> None:
    outcome = invoke(command, "--set", word, "--dry-run")
    assert outcome.code == 2
    assert f"--set {word.partition('=')[0]}: has no effect here; leave it out" in outcome.err


def test_a_flag_of_the_grid_is_unknown_outside_of_a_bench() -> None:
    assert "No such option" in invoke("recover", "--ratios", "0.5").err
