"""Other libraries as backends: the job of the child process, its answer, and the checks of that answer.

The libraries themselves are not needed: a small script acts as the python of their environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runner import CALIBRATED, Outcome, invoke, left_behind, set_fields
from safetensors.torch import load_file
from tiny_models import random_tokens, saved, tiny_model

from mopcompress.backends import subprocess_backend
from mopcompress.backends.subprocess_backend import BACKENDS, Backend, Request, find_python, run_backend
from mopcompress.errors import InputNotFoundError, NumericalError, OutOfMemoryError, UnavailableError
from mopcompress.models.model_loading import load_model
from mopcompress.models.quantization_grid import extract_codes, read_grid
from mopcompress.recipe import run_spec

WORKERS = Path(subprocess_backend.__file__).parent
SCRIPT = """#!{python}
# acts as `python -I -c PROBE` and `python -I WORKER FOLDER` of an environment that has the library
import sys
if sys.argv[2] == "-c":
    sys.exit({absent})
import json, os, pathlib
import numpy as np
from safetensors.numpy import load_file, save_file
folder = pathlib.Path(sys.argv[3])
job = json.loads((folder / "job.json").read_text())
linears = [name for step in job["steps"] for name in step["linears"]]
options = job["steps"][0]["options"]
dense = load_file(job["model"] + "/model.safetensors")
weights = {{name: dense[name + ".weight"].astype(np.float32) for name in linears}}
fallbacks = []
seconds = 1.5
def halve():
    for weight in weights.values():
        weight.reshape(-1)[np.abs(weight).reshape(-1).argsort()[: weight.size // 2]] = 0
def round_off(limit):
    for name in linears:
        scales = np.abs(weights[name]).reshape(len(weights[name]), -1, 16).max(2) / limit
        spread = scales.repeat(16, 1)
        weights[name] = (weights[name] / spread).round() * spread
        weights[name + ".scales"] = scales
{action}
save_file(weights, folder / "weights.safetensors")
facts = dict(seconds=seconds, peak_bytes=123, threads=1, versions=dict(llmcompressor="0.14"), fallbacks=fallbacks)
(folder / "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tiny_model("llama"), tmp_path / "base", torch.float16)


def fake_python(folder: Path, action: str, *, absent: bool = False) -> Path:
    """Write a python whose library does `action` to `weights`."""
    path = folder / "python"
    path.write_text(SCRIPT.format(python=sys.executable, action=action, absent=int(absent)))
    path.chmod(0o755)
    return path


def prune(base: Path, python: Path, *words: object) -> Outcome:
    text = base.parent / "text.txt"
    text.write_text(" ".join(f"w{int(word)}" for word in random_tokens(400)))
    backend = ("--backend", "llmcompressor", "--backend-python", python)
    target = base.parent / "pruned"
    return invoke("prune", base, "--calibration", text, *CALIBRATED, *backend, "--output-dir", target, "--json", *words)


def test_recipes_accept_the_backends_that_exist() -> None:
    assert {"mopcompress", *BACKENDS} == set(run_spec.BACKENDS)


def test_workers_exist_and_import_nothing_of_ours() -> None:
    for backend in BACKENDS.values():
        script = WORKERS / backend.worker
        assert "import mopcompress" not in script.read_text()
        assert "from mopcompress" not in script.read_text()


# --- a whole run


def test_a_pruned_folder_is_like_one_of_ours(base: Path, tmp_path: Path) -> None:
    outcome = prune(base, fake_python(tmp_path, "halve()"))
    assert outcome.code == 0, outcome.err
    facts = outcome.json
    assert facts["sparsity"] == 0.5
    assert facts["compress_seconds"] == 1.5
    assert facts["backend"]["name"] == "llmcompressor"
    assert facts["backend"]["versions"] == {"llmcompressor": "0.14"}
    assert facts["recipe"]["run"]["backend"] == "llmcompressor"
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "pruned" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == torch.float16
        if name.startswith("model.layers") and "proj" in name:
            assert int((weight == 0).sum()) == weight.numel() // 2
            survives = weight != 0
            assert torch.equal(weight[survives], before[name][survives])
        else:
            assert torch.equal(weight, before[name])
    load_model(tmp_path / "pruned", device=torch.device("cpu"))
    rows = [json.loads(line) for line in (tmp_path / "pruned" / "layers.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 7
    assert {row["block"] for row in rows} == {0, 1, 2, 3}
    assert all(row["methods"] == ["sparsegpt"] and row["escalations"] == 0 for row in rows)
    again = prune(base, tmp_path / "python", "--resume", "required")
    assert again.code == 0, again.err


def quantize(base: Path, python: Path) -> Outcome:
    text = base.parent / "text.txt"
    text.write_text(" ".join(f"w{int(word)}" for word in random_tokens(400)))
    backend = ("--backend", "llmcompressor", "--backend-python", python)
    words = ("--bits", 3, "--group-size", 16, "--output-dir", base.parent / "rounded", "--json")
    return invoke("quantize", base, "--calibration", text, *CALIBRATED, *backend, *words)


def test_a_backend_has_a_default_method_of_its_own(base: Path, tmp_path: Path) -> None:
    note = f"(pathlib.Path({str(tmp_path)!r}) / 'seen.json').write_text(json.dumps(job)); sys.exit(1)"
    quantize(base, fake_python(tmp_path, note))
    assert json.loads((tmp_path / "seen.json").read_text())["steps"][0]["method"] == "gptq"
    ours = invoke("prune", base, "--output-dir", tmp_path / "out", "--dry-run", "--json")
    assert "ALPSModifier" in str(ours.json["recipe"])


def test_a_rounded_folder_has_its_grid(base: Path, tmp_path: Path) -> None:
    outcome = quantize(base, fake_python(tmp_path, "round_off(3)"))
    assert outcome.code == 0, outcome.err
    grid = read_grid(tmp_path / "rounded")
    assert (grid.bits, grid.group_size, len(grid.scales)) == (3, 16, 28)
    weights = load_file(tmp_path / "rounded" / "model.safetensors")
    for name, scales in grid.scales.items():
        assert extract_codes(weights[f"{name}.weight"], scales, bits=3).abs().max() == 3


def test_weights_off_the_requested_grid_are_an_error(base: Path, tmp_path: Path) -> None:
    outcome = quantize(base, fake_python(tmp_path, "round_off(4)"))
    assert outcome.code == 10
    assert "off the grid of 3 bits" in outcome.errors[0]


def test_another_backend_counts_as_other_settings(base: Path, tmp_path: Path) -> None:
    assert prune(base, fake_python(tmp_path, "halve()")).code == 0
    ours = invoke(
        "prune", base, "--calibration", tmp_path / "text.txt", *CALIBRATED, "--output-dir", tmp_path / "pruned"
    )
    assert ours.code == 73
    assert "backend" in ours.errors[0]


def test_the_job_names_exactly_the_linears_of_the_blocks(base: Path, tmp_path: Path) -> None:
    note = f"(pathlib.Path({str(tmp_path)!r}) / 'seen.json').write_text(json.dumps(job)); halve()"
    assert prune(base, fake_python(tmp_path, note)).code == 0
    job = json.loads((tmp_path / "seen.json").read_text())
    assert job["model"] == str(base)
    (step,) = job["steps"]
    assert step["method"] == "sparsegpt"
    assert step["options"]["sparsity"] == 0.5
    assert len(step["linears"]) == 28
    assert not [name for name in step["linears"] if not name.startswith("model.layers.")]


def test_a_sparsity_per_linear_is_passed_on_and_checked(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    fields = '{sparsity: [0.5, 0.75], targets: ["re:.*q_proj", "re:.*up_proj"], ignore: ["re:.*layers.[123]"]}'
    recipe.write_text(f"a_stage: {{a_modifiers: {{SparseGPTModifier: {fields}}}}}")
    action = f"(pathlib.Path({str(tmp_path)!r}) / 'seen.json').write_text(json.dumps(job)); halve()"
    outcome = prune(base, fake_python(tmp_path, action), "--recipe", recipe)
    (step,) = json.loads((tmp_path / "seen.json").read_text())["steps"]
    assert step["linears"] == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    assert step["options"]["sparsity"] == [0.5, 0.75]
    assert outcome.code == 10
    assert "model.layers.0.mlp.up_proj has 50.00% zeros instead of 75.00%" in outcome.errors[0]


@pytest.mark.parametrize(
    ("action", "words", "code", "messages"),
    [
        ("pass", (), 10, ("has 0.00% zeros instead of 50.00%", "llmcompressor 0.14")),
        ("halve()", ("--sparsity", 0.7), 10, ("has 50.00% zeros instead of 70.00%",)),
        ("halve()", ("--pattern", "2:4"), 10, ("fewer than 2 zeros",)),
        ("halve(); del weights[linears[3]]", (), 70, ("returned no weight for model.layers.0.self_attn.o_proj",)),
        ("halve(); weights[linears[0]][0, 0] = float('nan')", (), 70, ("NaN", "model.layers.0.self_attn.q_proj")),
        ("halve(); weights[linears[0]] = np.zeros((2, 2), np.float32)", (), 70, ("[2, 2]",)),
        ("halve(); fallbacks = linears[:9]", (), 10, ("gave up its method for 9 of 28", "run.max_fallback_fraction")),
        ("sys.exit('no such recipe')", (), 69, ("failed in", "no such recipe")),
        ("sys.exit(0)", (), 70, ("without a complete answer",)),
        ("os.kill(os.getpid(), 9)", (), 71, ("memory",)),
    ],
)
def test_an_error_of_a_library_leaves_nothing_behind(
    base: Path, tmp_path: Path, action: str, words: tuple[object, ...], code: int, messages: tuple[str, ...]
) -> None:
    outcome = prune(base, fake_python(tmp_path, action), *words)
    assert outcome.code == code, outcome.err
    assert len(outcome.errors) == 1
    assert [message for message in messages if message not in outcome.errors[0]] == []
    assert not (tmp_path / "pruned").exists()
    assert [path for path in left_behind(tmp_path) if "base" not in path] == []


def test_allowed_fallbacks_are_counted(base: Path, tmp_path: Path) -> None:
    allowed = set_fields("run", max_fallback_fraction=1)
    outcome = prune(base, fake_python(tmp_path, "halve(); fallbacks = linears[:9]"), *allowed)
    assert outcome.code == 0, outcome.err
    assert outcome.json["fallbacks"] == 9


# --- requests that are rejected


def test_a_missing_library_is_unavailable(base: Path, tmp_path: Path) -> None:
    outcome = prune(base, fake_python(tmp_path, "halve()", absent=True))
    assert outcome.code == 69
    assert "-m venv ENV" in outcome.errors[0]


def test_a_missing_python_is_not_found(base: Path, tmp_path: Path) -> None:
    assert prune(base, tmp_path / "nowhere").code == 66


def test_a_python_that_does_not_run_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("no program")
    with pytest.raises(UnavailableError, match="does not run"):
        find_python(BACKENDS["llmcompressor"], str(tmp_path / "python"))


def test_without_a_path_this_python_needs_the_library() -> None:
    assert find_python(Backend("torch", "", (), "torch"), None) == Path(sys.executable)
    with pytest.raises(UnavailableError, match="--backend-python ENV/bin/python"):
        find_python(Backend("no_such_library", "", (), "it"), None)
    with pytest.raises(InputNotFoundError):
        find_python(BACKENDS["gptqmodel"], "/no/such/python")


def test_a_link_to_a_python_is_not_resolved(tmp_path: Path) -> None:
    """A virtual environment is found by its link."""
    (tmp_path / "python").symlink_to(sys.executable)
    assert find_python(Backend("json", "", (), ""), str(tmp_path / "python")) == tmp_path / "python"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("prune", "--backend", "gptqmodel"), 2, "gptqmodel has no sparsegpt (gptq)"),
        (("prune", "--backend", "llmcompresor"), 2, "did you mean 'llmcompressor'?"),
        (("prune", "--method", "alps", "--backend", "llmcompressor"), 2, "llmcompressor has no alps"),
        (("prune", "--recipe", "dense.yaml", "--backend", "llmcompressor"), 2, "llmcompressor has no match_dense"),
        (("quantize", "--recipe", "joint.yaml", "--backend", "llmcompressor"), 2, "a stage for each"),
    ],
)
def test_a_method_that_a_backend_lacks_is_a_usage_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dense.yaml").write_text("a_stage: {a_modifiers: {SparseGPTModifier: {sparsity: 0.5, match_dense: 1.0}}}")
    Path("joint.yaml").write_text(
        "a_stage: {a_modifiers: {GPTQModifier: {sparsity: 0.5, actorder: null, config_groups: "
        "{a: {targets: [Linear], weights: {num_bits: 4, strategy: group, group_size: 16}}}}}}"
    )
    outcome = invoke(words[0], base, *words[1:], "--output-dir", tmp_path / "out")
    assert outcome.code == code, outcome.err
    assert message in outcome.errors[0]


def test_a_bench_rejects_backends(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {backend: llmcompressor}")
    outcome = invoke("bench", "--recipe", recipe, "--output-dir", tmp_path / "out", "--dry-run")
    assert outcome.code == 78
    assert "bench" in outcome.errors[0]


# --- the child process


def test_a_child_dies_with_its_parent(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = f"pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid()))"
    survived = f"pathlib.Path({str(tmp_path)!r}, 'survived').touch()"
    python = fake_python(tmp_path, f"import time; {note}; time.sleep(30); {survived}")

    def interrupted(child: object) -> int:
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            os.sched_yield()
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.Popen.wait", _first(interrupted))
    (tmp_path / "job").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run_backend(
            BACKENDS["llmcompressor"], python, tmp_path / "job", model=base, requests=[_request()], tokens=_tokens()
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not (tmp_path / "survived").exists()


def _first(action):
    """Replace the first call of `wait` with `action`."""
    real, calls = subprocess.Popen.wait, []

    def wait(child, *more, **options):
        calls.append(child)
        return action(child) if len(calls) == 1 else real(child, *more, **options)

    return wait


def _request() -> Request:
    return Request("sparsegpt", {"sparsity": 0.5}, ["model.layers.0.self_attn.q_proj"])


def _tokens() -> torch.Tensor:
    return random_tokens(2, 8)


def test_the_child_runs_in_the_job_folder_with_the_tokens(base: Path, tmp_path: Path) -> None:
    action = "open('litter', 'w').close(); seconds = float(load_file(folder / 'tokens.safetensors')['tokens'].sum())"
    folder = tmp_path / "job"
    folder.mkdir()
    python = fake_python(tmp_path, action)
    answer = run_backend(BACKENDS["llmcompressor"], python, folder, model=base, requests=[_request()], tokens=_tokens())
    assert answer.seconds == _tokens().sum()
    assert (folder / "litter").exists()
    assert answer.process_seconds > 0


@pytest.mark.parametrize(("action", "error"), [("sys.exit(3)", UnavailableError), ("sys.exit(0)", NumericalError)])
def test_an_early_end_is_an_error(base: Path, tmp_path: Path, action: str, error: type[Exception]) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    with pytest.raises(error):
        run_backend(
            BACKENDS["llmcompressor"],
            fake_python(tmp_path, action),
            folder,
            model=base,
            requests=[_request()],
            tokens=_tokens(),
        )


def test_a_killed_child_is_out_of_memory(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    python = fake_python(tmp_path, "os.kill(os.getpid(), 9)")
    with pytest.raises(OutOfMemoryError):
        run_backend(BACKENDS["llmcompressor"], python, folder, model=base, requests=[_request()], tokens=_tokens())
