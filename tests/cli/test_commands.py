"""The command line: what is parsed, what is planned, what is resumed, and one run of everything."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import ARM_DEFAULTS, CALIBRATED, Outcome, invoke, left_behind, write_data
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mopcompress import __version__
from mopcompress.entrypoints.lr_sweep import write_sweep
from mopcompress.recipe import PromptRecoveryModifier, load_recipe
from mopcompress.results import Sweep, Trial, read_rows

COMMANDS = ("prune", "quantize", "recover", "evaluate", "bench", "report", "generate", "export-adapter")
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pruned(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("runs") / "pruned"
    outcome = invoke("prune", stories, *CALIBRATED, "--output-dir", target)
    assert outcome.code == 0, outcome.err
    return target


def modifiers(outcome: Outcome) -> list[tuple[str, dict[str, Any]]]:
    """What a plan is going to run, in order."""
    assert outcome.code == 0, outcome.err
    stages = [stage for name, stage in outcome.json["recipe"].items() if name != "run"]
    groups = [group for stage in stages for name, group in stage.items() if name != "run_type"]
    return [pair for group in groups for pair in group.items()]


def plan(*words: object) -> list[tuple[str, dict[str, Any]]]:
    return modifiers(invoke(*words, "--dry-run", "--json"))


# --- before torch loads


def test_help_and_plans_never_load_torch(stories: Path, data: Path, tmp_path: Path) -> None:
    calls = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    model = ["--model", str(stories), "--dry-run"]
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


def test_the_version_is_told() -> None:
    assert invoke("--version").out == f"mopcompress {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    outcome = invoke(name, "-h")
    assert outcome.code == 0
    assert "--json" in outcome.out


# --- flags


@pytest.mark.parametrize(
    ("flags", "kind", "fields"),
    [
        ([], "ALPSModifier", {"sparsity": 0.5, "mask_structure": "0:0"}),
        (["--sparsity", 0.85], "ALPSModifier", {"sparsity": 0.85}),
        (["--pattern", "2:4"], "ALPSModifier", {"sparsity": 0.5, "mask_structure": "2:4"}),
        (["--pattern", "1:4"], "ALPSModifier", {"sparsity": 0.25, "mask_structure": "1:4"}),
        (["--method", "sparsegpt", "--sparsity", 0.6], "SparseGPTModifier", {"sparsity": 0.6}),
        (["--method", "wanda", "--sparsity", 0.6], "WandaPruningModifier", {"sparsity": 0.6}),
        (["--method", "magnitude", "--sparsity", 0.6], "MagnitudePruningModifier", {"final_sparsity": 0.6}),
    ],
)
def test_flags_of_prune_reach_the_modifier(flags: list[object], kind: str, fields: dict[str, object]) -> None:
    [(name, found)] = plan("prune", *flags)
    assert name == kind
    assert {field: found[field] for field in fields} == fields


def test_flags_of_quantize_reach_the_modifier() -> None:
    def weights(*flags: object) -> dict[str, Any]:
        [(name, found)] = plan("quantize", *flags)
        assert name == "GPTQModifier"
        return {field: found["config_groups"]["group_0"]["weights"][field] for field in ("num_bits", "group_size")}

    assert weights() == {"num_bits": 4, "group_size": 64}
    assert weights("--bits", 3) == {"num_bits": 3, "group_size": 64}
    assert weights("--group-size", 32) == {"num_bits": 4, "group_size": 32}
    assert weights("--bits", 8, "--group-size", -1) == {"num_bits": 8, "group_size": None}


def test_flags_of_recovery_reach_the_modifier() -> None:
    flags = ("--steps", 7, "--rows-per-step", 3, "--layer", 2, "--gate-learning-rate", 0.5, "--log-opening", -1)
    for words in [("recover", "--arm", "shuffled"), ("bench",)]:
        found = dict(plan(*words, *flags))["PromptRecoveryModifier"]
        fields = ("steps", "batch_size", "layer", "gate_learning_rate", "prompt_log_weight", "arm")
        arm = "shuffled" if words[0] == "recover" else "mop"
        assert [found[field] for field in fields] == [7, 3, 2, 0.5, -1, arm]


def test_flags_of_the_run_win_over_the_recipe(stories: Path) -> None:
    outcome = invoke("bench", stories, "--recipe", RECIPES / "tiny.yaml", "--ratios", "0.5,0.6", "--dry-run", "--json")
    run = outcome.json["recipe"]["run"]
    assert run["ratios"] == [0.5, 0.6]
    assert run["train_rows"] == load_recipe(RECIPES / "tiny.yaml").run.train_rows


def test_a_recipe_says_what_each_command_runs() -> None:
    both = ("--recipe", RECIPES / "two_four_then_w4a16.yaml")
    assert [name for name, _ in plan("prune", *both)] == ["SparseGPTModifier"]
    assert [name for name, _ in plan("quantize", *both)] == ["SparseGPTModifier", "GPTQModifier"]
    assert [name for name, _ in plan("prune", *both, "--method", "wanda")] == ["WandaPruningModifier"]
    assert [name for name, _ in plan("prune", "--recipe", RECIPES / "default.yaml")] == ["SparseGPTModifier"]
    assert [name for name, _ in plan("recover", "--recipe", RECIPES / "default.yaml")] == ["PromptRecoveryModifier"]


def test_a_model_is_named_once(stories: Path) -> None:
    by_flag, by_place = (
        invoke("prune", *words, "--dry-run", "--json").json["model"] for words in (["--model", stories], [stories])
    )
    assert by_flag == by_place == {**by_flag, "folder": str(stories)}
    assert invoke("prune", stories, "--model", stories).code == 2


# --- plans


def test_the_plan_of_a_bench_counts_its_cells(stories: Path, tmp_path: Path) -> None:
    flags = {"ratios": (0.5, 0.9), "methods": ("wanda", "magnitude"), "bits": (3,), "group_size": (4,), "seeds": (0, 1)}
    words = [
        word for name, values in flags.items() for word in (f"--{name.replace('_', '-')}", ",".join(map(str, values)))
    ]
    told = invoke("bench", stories, *words, "--dry-run", "--json").json
    pruned = [f"{method} {share}%" for method in ("wanda", "magnitude") for share in (50, 90)]
    assert told["settings"] == ["dense", *pruned, "gptq 3-bit"]
    assert told["cells"] == 1 + 5 * (1 + 2 * 2)  # dense; five settings without prompts and in two arms for each seed
    assert told["steps"] == 5 * 2 * 2 * PromptRecoveryModifier().steps
    assert told["disk_bytes"] == 5 * (stories / "model.safetensors").stat().st_size
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_prunes_and_rounds_is_measured_whole(stories: Path) -> None:
    def settings(*more: object) -> list[str]:
        words = ("bench", stories, "--recipe", RECIPES / "two_four_then_w4a16.yaml", *more, "--dry-run", "--json")
        words += ("--group-size", 4)
        return invoke(*words).json["settings"]

    assert settings() == ["dense", "sparsegpt 50% + gptq 4-bit"]
    assert settings("--bits", "3,4")[1:] == ["sparsegpt 50% + gptq 3-bit", "sparsegpt 50% + gptq 4-bit"]
    assert settings("--no-joint")[1:] == ["sparsegpt 50%", "gptq 4-bit"]
    assert settings("--ratios", "")[1:] == ["gptq 4-bit"]
    words = (
        "bench",
        stories,
        "--methods",
        "wanda",
        "--ratios",
        "0.5,0.6",
        "--bits",
        4,
        "--joint",
        "--group-size",
        4,
        "--dry-run",
        "--json",
    )
    assert invoke(*words).json["settings"][1:] == ["wanda 50% + gptq 4-bit", "wanda 60% + gptq 4-bit"]


def test_a_bench_of_nothing_is_refused(stories: Path) -> None:
    outcome = invoke("bench", stories, "--ratios", "", "--dry-run")
    assert (outcome.code, outcome.errors) == (
        2,
        ["error: the grid is empty: nothing would be compressed; give --ratios or --bits"],
    )


def test_a_plan_is_also_told_in_words(stories: Path) -> None:
    outcome = invoke("bench", stories, "--dry-run")
    assert "settings: dense, sparsegpt 50%, sparsegpt 85%, sparsegpt 95%" in outcome.out
    assert "output: runs/bench" in outcome.out


# --- prune, quantize


def test_a_pruned_model_is_a_stock_folder_with_half_its_weights(stories: Path, pruned: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(pruned)
    weights = [weight for name, weight in network.named_parameters() if "_proj" in name]
    assert weights
    assert all(int((weight == 0).sum()) == weight.numel() // 2 for weight in weights)
    assert sorted(path.name for path in pruned.iterdir()) == sorted(
        [*(path.name for path in stories.iterdir()), "layers.jsonl", "manifest.json"]
    )


def test_the_same_command_says_that_it_is_done(stories: Path, pruned: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pruned.iterdir()}
    again = invoke("prune", stories, *CALIBRATED, "--output-dir", pruned, "--json")
    assert again.code == 0
    assert f"done already: {pruned}" in again.err
    manifest = json.loads((pruned / "manifest.json").read_text())
    assert again.json == {"output": str(pruned), **manifest}
    assert {path: path.stat().st_mtime_ns for path in pruned.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--sparsity", 0.6], 73, "ALPSModifier.sparsity was 0.5, is 0.6"),
        (["--seed", 1], 73, "run.seed was 0, is 1"),
        (["--resume", "never"], 73, "exists already and --resume is never"),
        (["--resume", "required"], 0, None),
    ],
)
def test_another_command_does_not_take_the_place_of_a_result(
    stories: Path, pruned: Path, flags: list[object], code: int, words: str | None
) -> None:
    before = sorted(pruned.parent.rglob("*"))
    outcome = invoke("prune", stories, *CALIBRATED, "--output-dir", pruned, *flags)
    assert outcome.code == code
    assert (len(outcome.errors), words is None or words in outcome.err) == (int(code > 0), True)
    assert sorted(pruned.parent.rglob("*")) == before


def test_what_is_required_must_be_there(stories: Path, tmp_path: Path) -> None:
    for name in ("prune", "bench"):
        outcome = invoke(name, stories, "--output-dir", tmp_path / "new", "--resume", "required")
        assert outcome.code == 66
    assert left_behind(tmp_path) == []


def test_a_result_of_another_model_is_not_taken_for_this_one(stories: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in stories.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    words = ("prune", model, "--method", "magnitude", *CALIBRATED, "--output-dir", tmp_path / "pruned")
    assert invoke(*words).code == 0
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    outcome = invoke(*words)
    assert outcome.code == 73
    assert "was made from another model" in outcome.err


def test_a_damaged_result_is_not_taken_for_done(stories: Path, tmp_path: Path) -> None:
    words = ("prune", stories, "--method", "magnitude", *CALIBRATED, "--output-dir", tmp_path / "pruned")
    assert invoke(*words).code == 0
    weights = tmp_path / "pruned" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert invoke(*words).code == 65


def test_zeros_of_two_in_four_survive_rounding(stories: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (RECIPES / "two_four_then_w4a16.yaml").read_text()
    recipe.write_text(text.replace("group_size: 64", "group_size: 4"))
    outcome = invoke("quantize", stories, "--recipe", recipe, *CALIBRATED, "--output-dir", tmp_path / "small", "--json")
    assert outcome.code == 0, outcome.err
    weights = {
        name: one for name, one in load_file(tmp_path / "small" / "model.safetensors").items() if "_proj" in name
    }
    assert len(weights) == 35
    for weight in weights.values():
        zeros = (weight.view(len(weight), -1, 4) == 0).sum(-1)
        assert int(zeros.min()) >= 2
    assert outcome.json["method"] == "sparsegpt+gptq"


def test_a_whole_row_can_share_one_scale(stories: Path, tmp_path: Path) -> None:
    target = tmp_path / "rounded"
    outcome = invoke("quantize", stories, "--bits", 2, "--group-size", -1, *CALIBRATED, "--output-dir", target)
    assert outcome.code == 0, outcome.err
    weight = load_file(target / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert max(len(row.unique()) for row in weight) <= 4


# --- recover, evaluate, generate


@pytest.fixture(scope="module")
def adapter(pruned: Path, data: Path) -> Path:
    target = pruned.parent / "adapter"
    outcome = invoke(
        "recover", pruned, "--data", data, *ARM_DEFAULTS, "--device", "cpu", "--output-dir", target, "--json"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json["train_steps"] == 2
    return target


def test_an_adapter_is_scored_and_used_with_its_model(pruned: Path, adapter: Path, data: Path) -> None:
    words = ("evaluate", pruned, "--data", data, "--device", "cpu")
    alone, with_it = invoke(*words, "--json").json, invoke(*words, "--adapter", adapter, "--json").json
    assert (alone["arm"], with_it["arm"]) == ("none", "mop")
    assert alone["scored_tokens"] == with_it["scored_tokens"] > 0
    assert alone["perplexity"] != with_it["perplexity"]
    assert set(with_it["gate"]["tasks"]) == {"ask", "say"}
    words = ("generate", pruned, "--max-new-tokens", 4, "--prompt", "say cat 7", "--prompt", "ask cat 8")
    answers = invoke(*words, "--adapter", adapter, "--json").json["answers"]
    assert [one["prompt"] for one in answers] == ["say cat 7", "ask cat 8"]
    assert invoke(*words, "--adapter", adapter).out == "\n\n".join(one["answer"] for one in answers) + "\n"


def test_what_was_made_from_a_text_that_changed_is_not_taken_for_done(
    stories: Path, pruned: Path, data: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog. " * 200)
    named = ("--calibration", text, "--num-calibration-samples", 2, "--max-seq-length", 32)
    trained = (*ARM_DEFAULTS, "--train-text", text, "--train-text-samples", 2, "--device", "cpu")
    commands = [
        ("prune", stories, "--method", "magnitude", *named, "--output-dir", tmp_path / "pruned"),
        ("recover", pruned, "--data", data, *trained, "--output-dir", tmp_path / "adapter"),
    ]
    for words in commands:
        assert invoke(*words).code == 0
        assert "done already" in invoke(*words).err
    text.write_text("There was a little dog once upon a time. " * 200)
    for words, what in zip(commands, ("calibration", "training text"), strict=True):
        outcome = invoke(*words)
        assert (outcome.code, f"was made from another {what}" in outcome.err) == (73, True)


def test_tasks_of_ones_own_are_nothing_without_tasks_to_run(stories: Path) -> None:
    outcome = invoke("evaluate", stories, "--lm-eval-path", stories)
    assert (outcome.code, "--lm-eval-path: says nothing without --lm-eval" in outcome.err) == (2, True)
    for words in (("--write-tokens", 4), ("--test-rows", 4), ("--data", "skills")):
        outcome = invoke("evaluate", stories, "--lm-eval", "arc_easy", *words)
        assert (outcome.code, f"{words[0]}: says nothing with --lm-eval" in outcome.err) == (2, True)


def test_an_adapter_is_trained_once(pruned: Path, adapter: Path, data: Path) -> None:
    words = ("recover", pruned, "--data", data, *ARM_DEFAULTS, "--device", "cpu", "--output-dir", adapter)
    again = invoke(*words)
    assert again.code == 0
    assert "done already" in again.err
    write_data(data.parent / "other")
    copied = data.parent / "other" / "train.jsonl"
    copied.write_text(copied.read_text().replace("the cat", "a cat"))
    other = invoke(*(data.parent / "other" if word == data else word for word in words))
    assert other.code == 73


# --- bench


def test_a_bench_runs_what_is_new_and_nothing_twice(
    stories: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bench"
    monkeypatch.setattr("sys.argv", ["/somewhere/mopcompress", "bench", "my model"])
    common = ("bench", stories, "--data", data, *CALIBRATED, *ARM_DEFAULTS, "--output-dir", folder)
    small = invoke(*common, "--ratios", 0.5, "--arms", "none,mop", "--json")
    assert small.code == 0, small.err
    assert [(row["method"], row["arm"]) for row in small.json["rows"]] == [
        ("dense", "none"),
        ("sparsegpt", "none"),
        ("sparsegpt", "mop"),
    ]
    assert small.json["report"] == str(folder / "report.html")
    assert json.loads((folder / "run.json").read_text())["command"] == "mopcompress bench 'my model'"
    lines = (folder / "rows.jsonl").read_text()
    told = invoke(*common, "--ratios", 0.5, "--arms", "none,mop,single", "--dry-run", "--json").json
    assert (told["cells"], told["cells_done"], told["steps"]) == (4, 3, 2)
    swept = ("--ratios", 0.5, "--arms", "single,mop", "--seeds", "0,1", "--sweep", "--dry-run", "--json")
    other = ("bench", stories, "--data", data, *CALIBRATED, *ARM_DEFAULTS, "--output-dir", tmp_path / "swept", *swept)
    assert invoke(*other).json["steps"] == 2 * (3 * 2 + 2)  # the best of an arm's trials is its first training
    assert invoke(*other, "--sweep-steps", 1).json["steps"] == 2 * (3 * 1 + 2 * 2)
    (tmp_path / "swept" / "sweeps").mkdir(parents=True)
    found = Sweep(
        arm="mop",
        steps=2,
        batch_size=8,
        validation_rows=4,
        trials=[Trial(learning_rate=0.5, validation_nats=2.0, seconds=1.0)],
        learning_rate=0.5,
        at_edge=True,
        seconds=1.0,
    )
    write_sweep(found, tmp_path / "swept" / "sweeps" / "sparsegpt-50-mop.json")
    assert invoke(*other).json["steps"] == 3 * 2 + 2 + 2 * 2  # where one was found, its arm is only trained
    larger = invoke(*common, "--ratios", 0.5, "--arms", "none,mop,single")
    assert larger.code == 0, larger.err
    assert (folder / "rows.jsonl").read_text().startswith(lines)
    assert len(read_rows(folder / "rows.jsonl")) == 4
    assert "sparsegpt 50%" in larger.out
    assert larger.out.splitlines()[-1] == str(folder / "report.html")
    assert invoke(*common, "--ratios", 0.5, "--resume", "never").code == 73
    report = invoke("report", folder, "--json").json["reports"][str(folder)]
    assert [Path(path).name for path in report] == ["report.json", "report.md", "report.html"]


# --- endings


def stage_that(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    monkeypatch.setattr("mopcompress.entrypoints.compress.compress", lambda *_args, **_more: action())


def raising(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_stops_with_one_line(
    stories: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def kill_self() -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    stage_that(monkeypatch, kill_self)
    outcome = invoke("prune", stories, "--quiet")
    assert (outcome.code, outcome.err) == (75, "stopped; run the same command again to go on\n")
    assert signal.getsignal(number) is before


def test_a_second_signal_leaves_at_once() -> None:
    script = """
import os, signal
from mopcompress.cli.exit_codes import exit_cleanly
with exit_cleanly():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("still here")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (75, "", "")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 71, "out of memory (MemoryError); lower"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 71, "out of memory (CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 71, "out of memory"),
        (OSError(28, "No space left on device"), 74, "free some space"),
        (RuntimeError("Error while serializing: I/O error: No space left on device"), 74, "free some space"),
    ],
)
def test_a_machine_that_is_too_small_is_told(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    stage_that(monkeypatch, raising(error))
    outcome = invoke("prune", stories)
    assert outcome.code == code
    assert len(outcome.errors) == 1
    assert words in outcome.errors[0]
    assert list(tmp_path.glob("mopcompress-crash-*")) == []


def test_a_bug_leaves_its_traceback_in_a_file(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_that(monkeypatch, raising(ZeroDivisionError("division\nby zero")))
    outcome = invoke("prune", stories)
    [crash] = tmp_path.glob("mopcompress-crash-*.txt")
    assert outcome.code == 1
    assert outcome.errors == [f"error: ZeroDivisionError: division; this is a bug, its traceback is in {crash}"]
    assert "Traceback" not in outcome.err
    assert "Traceback" in crash.read_text()


def test_a_reader_that_has_gone_is_no_error(stories: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mopcompress", "prune", str(stories), "--dry-run", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# --- export-adapter


def test_an_adapter_at_the_input_is_exported_for_peft(pruned: Path, stories: Path, data: Path, tmp_path: Path) -> None:
    adapter, target = tmp_path / "adapter", tmp_path / "peft"
    words = ("--data", data, "--steps", 2, "--device", "cpu", "--output-dir", adapter)
    assert invoke("recover", pruned, "--arm", "input", *words).code == 0
    outcome = invoke("export-adapter", adapter, "--output-dir", target, "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.json["arm"], outcome.json["base"]) == ("input", str(pruned))
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pruned)
    (stored,) = load_file(target / "adapter_model.safetensors").values()
    assert torch.equal(stored, load_file(adapter / "adapter.safetensors")["prompts"])
    again = invoke("export-adapter", adapter, "--output-dir", target)
    assert (again.code, "done already" in again.err) == (0, True)
    assert invoke("export-adapter", adapter, "--output-dir", target, "--resume", "never").code == 73
    assert invoke("export-adapter", adapter, "--output-dir", adapter).code == 73
    assert invoke("export-adapter", adapter, "--output-dir", target, "--model", pruned).code == 0
    wrong = invoke("export-adapter", adapter, "--output-dir", target, "--model", stories)
    assert (wrong.code, "was trained on a model with weights" in wrong.err) == (65, True)
    other = ("--model", "no/such/model", "--output-dir", tmp_path / "other")
    assert invoke("export-adapter", adapter, *other).code == 66


def test_an_adapter_without_hashes_is_not_exported(adapter: Path, tmp_path: Path) -> None:
    manifest = json.loads((adapter / "manifest.json").read_text())
    damaged = shutil.copytree(adapter, tmp_path / "damaged")
    (damaged / "manifest.json").write_text(json.dumps({"kind": manifest["kind"], "arm": "input"}))
    outcome = invoke("export-adapter", damaged, "--output-dir", tmp_path / "peft")
    assert outcome.code == 65
    assert "with hashes" in outcome.err


def test_an_adapter_that_peft_does_not_have_is_refused(adapter: Path, tmp_path: Path) -> None:
    outcome = invoke("export-adapter", adapter, "--output-dir", tmp_path / "peft")
    assert outcome.code == 65
    (line,) = outcome.errors
    assert "arm mop: PEFT has no such adapter, only input, prefix" in line
    assert left_behind(tmp_path) == []
    assert invoke("export-adapter", tmp_path, "--output-dir", tmp_path / "peft").code == 66
