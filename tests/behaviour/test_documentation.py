"""Commands, Python blocks and examples of the README and the documentation run as they are printed."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import invoke, write_data

import mopcompress

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = ROOT / "docs" / "examples"
FENCES = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
TINY_RUN = {  # of a model with 260 thousand weights, whose tokens are short
    "train_rows": 24,
    "validation_rows": 8,
    "test_rows": 12,
    "max_length": 256,
    "num_calibration_samples": 4,
    "max_seq_length": 64,
    "device": "cpu",
}


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in FENCES.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page: Path) -> list[str]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("mopcompress ")]


SHELL = [pytest.param(command, id=f"{page.stem}: {command[12:60]}") for page in PAGES for command in commands(page)]
PYTHON = [
    pytest.param(page, number, id=f"{page.stem}-{number}")
    for page in PAGES
    for number in range(len(blocks(page, "python")))
]


def tiny_flags(model: Path, *, calibrates: bool = True) -> list[str]:
    small = {name: value for name, value in TINY_RUN.items() if name != "device"}
    if not calibrates:
        small = {
            name: value for name, value in small.items() if name not in ("num_calibration_samples", "max_seq_length")
        }
    pairs = [f"--set=run.{name}={value}" for name, value in small.items()]
    return [str(model), "--device", "cpu", *pairs]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def chat_model(stories, tmp_path_factory) -> Path:
    """The tiny model with a chat template, as the default model has."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(stories, folder)
    config = folder / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    return folder


@pytest.fixture(scope="session")
def made(chat_model, tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind that a command reads: pruned and quantized models, an adapter, a finished bench."""
    folder = tmp_path_factory.mktemp("made")
    flags = tiny_flags(chat_model)
    steps = ["--steps", "2"]
    runs = {
        "model": ["prune", "--method", "wanda", "--sparsity", "0.5", *flags],
        "quantized": ["quantize", "--bits", "4", "--group-size", "4", *flags],
        "bench": ["bench", "--ratios", "0.5", "--methods", "wanda", "--arms", "none,mop", *steps, *flags],
    }
    for kind, words in runs.items():
        outcome = invoke(*words, "--output-dir", folder / kind)
        assert outcome.code == 0, outcome.err
    pruned = tiny_flags(folder / "model", calibrates=False)
    for kind, arm in (("adapter", "mop"), ("lora", "lora")):
        outcome = invoke("recover", "--arm", arm, *steps, *pruned, "--output-dir", folder / kind)
        assert outcome.code == 0, outcome.err
    return {kind: folder / kind for kind in (*runs, "adapter", "lora")}


def kind_of(words: list[str], index: int) -> str:
    """Return the kind of folder that a command reads at this place."""
    command, before = words[0], words[index - 1]
    if before == "--adapter":
        return "adapter"
    if command == "export-adapter":
        return "lora"
    if command == "report":
        return "bench"
    gptq = any(word in {"gptq", "compressed-tensors"} for word in words)
    return "quantized" if command == "export" and gptq else "model"


def prepare(words: list[str], made: dict[str, Path], folder: Path) -> None:
    """Put everything that a command names and reads where it names it."""
    for index, word in enumerate(words[1:], start=1):
        target = folder / word
        if words[index - 1] == "--output-dir" or target.exists():
            continue
        if word.startswith("runs/"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(made[kind_of(words, index)])
        elif word.startswith("recipes/"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(ROOT / word)
        elif target.suffix in {".jsonl", ".txt"}:
            target.parent.mkdir(parents=True, exist_ok=True)
            source = write_data(folder / "data") / "train.jsonl"
            target.write_text(source.read_text() if target.suffix == ".jsonl" else "once upon a time " * 2000)


@pytest.mark.parametrize("command", SHELL)
def test_printed_commands_are_accepted(command, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)[1:]
    prepare(words, made, tmp_path)
    extra = ["--dry-run"] if "--dry-run" in invoke(words[0], "--help").out and "--dry-run" not in words else []
    outcome = invoke(*words, *extra)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(("page", "number"), PYTHON)
def test_printed_python_runs(page, number, made, stories, tmp_path, monkeypatch):
    """A bench of a page runs with its own arms and ratios, on a tiny model and few rows."""
    bench = mopcompress.bench

    def tiny_bench(recipe, folder, **settings):
        run = recipe.run.model_copy(update=TINY_RUN | {"model": str(stories)})
        return bench(dataclasses.replace(recipe, run=run), folder, **settings)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mopcompress, "bench", tiny_bench, raising=False)
    for name, kind in (("pruned", "model"), ("mop", "adapter")):
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / name).symlink_to(made[kind])
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    exec(compile(blocks(page, "python")[number], str(page), "exec"), {"__name__": "example"})


def run_example(*words: object, **environment: str) -> str:
    ended = subprocess.run(
        [sys.executable, *map(str, words)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_example_prunes_and_recovers(stories, tmp_path):
    out = run_example(EXAMPLES / "prune_and_recover.py", stories, tmp_path / "run")
    assert "mop" in out
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_example_answers_in_a_pipeline(made, tmp_path):
    out = run_example(EXAMPLES / "transformers_pipeline.py", made["model"], made["adapter"], tmp_path / "whole")
    assert "MopForCausalLM loaded from" in out


@pytest.mark.slow
def test_example_adds_a_method(stories, tmp_path):
    out = run_example(EXAMPLES / "add_a_method.py", stories, tmp_path / "run")
    assert "biases" in out


@pytest.mark.parametrize("run", ["committed", "made"])
def test_notebook_draws_the_curve(run, made, tmp_path):
    cells = json.loads((EXAMPLES / "compare.ipynb").read_text())["cells"]
    script = tmp_path / "compare.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    committed = ROOT / "benchmarks" / "results" / "2026-11-28-main-job-autoclip"
    folder = committed if run == "committed" else made["bench"]
    out = run_example(script, MPLBACKEND="agg", MOPCOMPRESS_RUN=str(folder))
    assert "rows; arms: [" in out
