"""Commands that make and measure models, run on a small one."""

import json
from pathlib import Path

import pytest
from cli_runner import CALIBRATED, QUICK_RECOVERY, invoke, left_behind, set_fields, write_data
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mopcompress.entrypoints.lr_sweep import write_sweep
from mopcompress.results import Sweep, Trial, read_rows

RECIPES = Path(__file__).parents[2] / "recipes"


def test_a_pruned_folder_is_a_stock_model_with_half_its_weights(stories: Path, pruned: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(pruned)
    weights = [weight for name, weight in network.named_parameters() if "_proj" in name]
    assert weights
    assert all(int((weight == 0).sum()) == weight.numel() // 2 for weight in weights)
    assert sorted(path.name for path in pruned.iterdir()) == sorted(
        [*(path.name for path in stories.iterdir()), "layers.jsonl", "manifest.json"]
    )


def test_the_same_command_again_does_nothing(stories: Path, pruned: Path) -> None:
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
def test_a_result_is_never_overwritten_by_another_command(
    stories: Path, pruned: Path, flags: list[object], code: int, words: str | None
) -> None:
    before = sorted(pruned.parent.rglob("*"))
    outcome = invoke("prune", stories, *CALIBRATED, "--output-dir", pruned, *flags)
    assert outcome.code == code
    assert (len(outcome.errors), words is None or words in outcome.err) == (int(code > 0), True)
    assert sorted(pruned.parent.rglob("*")) == before


def test_resume_required_needs_a_result(stories: Path, tmp_path: Path) -> None:
    for name in ("prune", "bench"):
        outcome = invoke(name, stories, "--output-dir", tmp_path / "new", "--resume", "required")
        assert outcome.code == 66
    assert left_behind(tmp_path) == []


def test_a_result_of_another_model_is_an_error(stories: Path, tmp_path: Path) -> None:
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


def test_a_damaged_result_is_an_error(stories: Path, tmp_path: Path) -> None:
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
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    weights = [weight for name, weight in tensors.items() if "_proj" in name]
    assert len(weights) == 35
    for weight in weights:
        zeros = (weight.view(len(weight), -1, 4) == 0).sum(-1)
        assert int(zeros.min()) >= 2
    assert outcome.json["method"] == "sparsegpt+gptq"


def test_a_whole_row_can_share_one_scale(stories: Path, tmp_path: Path) -> None:
    target = tmp_path / "rounded"
    outcome = invoke("quantize", stories, "--bits", 2, "--group-size", -1, *CALIBRATED, "--output-dir", target)
    assert outcome.code == 0, outcome.err
    weight = load_file(target / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert max(len(row.unique()) for row in weight) <= 4


def test_an_adapter_is_scored_and_generates_with_its_model(pruned: Path, adapter: Path, data: Path) -> None:
    words = ("evaluate", pruned, "--data", data, "--device", "cpu")
    alone, with_it = invoke(*words, "--json").json, invoke(*words, "--adapter", adapter, "--json").json
    assert (alone["arm"], with_it["arm"]) == ("none", "mop")
    assert alone["scored_tokens"] == with_it["scored_tokens"] > 0
    assert alone["perplexity"] != with_it["perplexity"]
    assert set(with_it["gate"]["tasks"]) == {"ask", "say"}
    words = ("generate", pruned, "--max-new-tokens", 4, "--prompt", "say cat 7", "--prompt", "ask cat 8")
    answers = invoke(*words, "--adapter", adapter, "--json").json["answers"]
    assert [answer["prompt"] for answer in answers] == ["say cat 7", "ask cat 8"]
    assert invoke(*words, "--adapter", adapter).out == "\n\n".join(answer["answer"] for answer in answers) + "\n"


def test_a_result_of_a_changed_text_is_an_error(stories: Path, pruned: Path, data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog. " * 200)
    named = ("--calibration", text, "--num-calibration-samples", 2, "--max-seq-length", 32)
    trained = (*QUICK_RECOVERY, *set_fields("run", train_text=text, train_text_samples=2), "--device", "cpu")
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


def test_options_of_lm_eval_go_with_it_alone(stories: Path) -> None:
    outcome = invoke("evaluate", stories, "--lm-eval-path", stories)
    assert (outcome.code, "--lm-eval-path: has no effect without --lm-eval" in outcome.err) == (2, True)
    for flag, value in (("--max-new-tokens", 4), ("--test-rows", 4), ("--data", "skills"), ("--set", "run.text=a.txt")):
        outcome = invoke("evaluate", stories, "--lm-eval", "arc_easy", flag, value)
        name = "--set run.text" if flag == "--set" else flag
        assert (outcome.code, f"{name}: has no effect with --lm-eval" in outcome.err) == (2, True)


def test_an_adapter_is_trained_once(pruned: Path, adapter: Path, data: Path) -> None:
    words = ("recover", pruned, "--data", data, *QUICK_RECOVERY, "--device", "cpu", "--output-dir", adapter)
    again = invoke(*words)
    assert again.code == 0
    assert "done already" in again.err
    write_data(data.parent / "other")
    copied = data.parent / "other" / "train.jsonl"
    copied.write_text(copied.read_text().replace("the cat", "a cat"))
    other = invoke(*(data.parent / "other" if word == data else word for word in words))
    assert other.code == 73


def test_a_bench_runs_new_cells_and_none_twice(
    stories: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bench"
    monkeypatch.setattr("sys.argv", ["/somewhere/mopcompress", "bench", "my model"])
    common = ("bench", stories, "--data", data, *CALIBRATED, *QUICK_RECOVERY, "--output-dir", folder)
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
    facts = invoke(*common, "--ratios", 0.5, "--arms", "none,mop,single", "--dry-run", "--json").json
    assert (facts["cells"], facts["cells_done"], facts["steps"]) == (4, 3, 2)
    swept = ("--ratios", 0.5, "--arms", "single,mop", "--seeds", "0,1", "--sweep", "--dry-run", "--json")
    other = ("bench", stories, "--data", data, *CALIBRATED, *QUICK_RECOVERY, "--output-dir", tmp_path / "swept", *swept)
    assert invoke(*other).json["steps"] == 2 * (3 * 2 + 2)  # the best of an arm's trials is its first training
    assert invoke(*other, *set_fields("recovery", sweep_steps=1)).json["steps"] == 2 * (3 * 1 + 2 * 2)
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
