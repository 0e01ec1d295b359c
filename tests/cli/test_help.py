"""Help of the commands: what it costs, how long it is, and that it never loads torch."""

import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import invoke

from mopcompress import __version__

COMMANDS = ("prune", "quantize", "recover", "evaluate", "bench", "report", "generate", "export-adapter")


def test_help_and_plans_never_load_torch(stories: Path, data: Path, tmp_path: Path) -> None:
    calls = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    model = [str(stories), "--dry-run"]
    calls += [[name, *model] for name in ("prune", "quantize", "recover", "evaluate", "bench")]
    calls += [["generate", *model, "--prompt", "once"], ["prune", "--sparsity", "50"], ["recover", "no/such/model"]]
    script = f"""
import sys
from mopcompress.cli import app
for words in {calls!r}:
    try:
        app(words)
    except SystemExit as ended:
        print(ended.code, end=" ", file=sys.stderr)
print(sorted({{"torch", "transformers", "datasets", "matplotlib"}} & sys.modules.keys()), file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert ran.stderr.splitlines()[-1].endswith("[]")
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_printed() -> None:
    assert invoke("--version").out == f"mopcompress {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    outcome = invoke(name, "-h")
    assert outcome.code == 0
    assert "--json" in outcome.out


@pytest.mark.parametrize(("name", "lines"), [("bench", 60), ("recover", 50), ("prune", 50)])
def test_help_fits_a_screen(name: str, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    outcome = invoke(name, "--help")
    assert len(outcome.out.splitlines()) <= lines
    assert max(map(len, outcome.out.splitlines())) <= 100


FLAGS = {  # of README and the quickstart, besides those that all of these commands have
    "bench": "--ratios --methods --bits --arms --seeds --steps --sweep --max-new-tokens --test-rows --batch-size "
    "--calibration --num-calibration-samples --max-seq-length --data --columns --train-rows --max-length",
    "recover": "--arm --steps --sweep --learning-rate --rank --experts --distill --teacher --data --columns "
    "--train-rows --max-length --batch-size",
    "prune": "--method --sparsity --pattern --repair-rank --calibration --num-calibration-samples --max-seq-length "
    "--data --columns --train-rows --backend --backend-python",
}


@pytest.mark.parametrize(("name", "flags"), FLAGS.items())
def test_help_has_the_flags_that_a_user_needs(name: str, flags: str) -> None:
    common = "--recipe --set --seed --device --output-dir --resume --dry-run --json --verbose --quiet -v -q -h"
    shown = invoke(name, "--help").out.split()
    assert [flag for flag in f"{flags} {common}".split() if flag not in shown] == []


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("bench", "run.FIELD, recovery.FIELD, pruning.FIELD, quantization.FIELD, repair.FIELD"),
        ("recover", "run.FIELD, recovery.FIELD"),
        ("generate", "run.FIELD"),
    ],
)
def test_help_of_set_names_its_keys(name: str, keys: str) -> None:
    shown = " ".join(invoke(name, "--help").out.replace("│", " ").split())
    assert f"VALUE is YAML, KEY is {keys} --" in shown


@pytest.mark.parametrize("name", ["export", "verify", "report"])
def test_a_command_without_a_recipe_has_no_settings(name: str) -> None:
    assert "--set" not in invoke(name, "--help").out
