"""Other libraries as backends: what goes to the child process, what comes back, and what is not taken on trust.

The libraries themselves are not here: a small script plays the python of their environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runner import CALIBRATED, Outcome, invoke, left_behind
from safetensors.torch import load_file
from tiny_models import random_tokens, saved, tiny_model

from mopcompress.backends import subprocess_backend
from mopcompress.backends.gptqmodel_worker import fallbacks, left_out, unpacked
from mopcompress.backends.llmcompressor_worker import Listener, gptq_fields
from mopcompress.backends.subprocess_backend import BACKENDS, Backend, Request, python_for, run
from mopcompress.backends.validation import fault_of, with_fp16_scales
from mopcompress.environment import peak_bytes
from mopcompress.errors import InputNotFoundError, NumericalError, OutOfMemoryError, UnavailableError
from mopcompress.models.model_loading import load_model
from mopcompress.models.quantization_grid import codes_of, read_grid
from mopcompress.recipe import run_spec

WORKERS = Path(subprocess_backend.__file__).parent
PLAYED = """#!{python}
# plays `python -I -c PROBE` and `python -I WORKER FOLDER` of an environment that has the library
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
{deed}
save_file(weights, folder / "weights.safetensors")
facts = dict(seconds=seconds, peak_bytes=123, threads=1, versions=dict(llmcompressor="0.14"), fallbacks=fallbacks)
(folder / "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tiny_model("llama"), tmp_path / "base", torch.float16)


def played(folder: Path, deed: str, *, absent: bool = False) -> Path:
    """A python whose library does `deed` to `weights`."""
    path = folder / "python"
    path.write_text(PLAYED.format(python=sys.executable, deed=deed, absent=int(absent)))
    path.chmod(0o755)
    return path


def prune(base: Path, python: Path, *words: object) -> Outcome:
    text = base.parent / "text.txt"
    text.write_text(" ".join(f"w{int(word)}" for word in random_tokens(400)))
    backend = ("--backend", "llmcompressor", "--backend-python", python)
    target = base.parent / "pruned"
    return invoke("prune", base, "--calibration", text, *CALIBRATED, *backend, "--output-dir", target, "--json", *words)


def test_recipes_know_the_backends_that_there_are() -> None:
    assert {"mopcompress", *BACKENDS} == set(run_spec.BACKENDS)


def test_workers_are_there_and_import_nothing_of_ours() -> None:
    for backend in BACKENDS.values():
        script = WORKERS / backend.worker
        assert "import mopcompress" not in script.read_text()
        assert "from mopcompress" not in script.read_text()


# --- a whole run


def test_a_pruned_folder_is_like_ours(base: Path, tmp_path: Path) -> None:
    outcome = prune(base, played(tmp_path, "halve()"))
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
            kept = weight != 0
            assert torch.equal(weight[kept], before[name][kept])
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


def test_the_default_of_a_backend_is_what_it_has(base: Path, tmp_path: Path) -> None:
    note = f"(pathlib.Path({str(tmp_path)!r}) / 'seen.json').write_text(json.dumps(job)); sys.exit(1)"
    quantize(base, played(tmp_path, note))
    assert json.loads((tmp_path / "seen.json").read_text())["steps"][0]["method"] == "gptq"
    ours = invoke("prune", base, "--output-dir", tmp_path / "out", "--dry-run", "--json")
    assert "ALPSModifier" in str(ours.json["recipe"])


def test_a_rounded_folder_has_its_grid(base: Path, tmp_path: Path) -> None:
    outcome = quantize(base, played(tmp_path, "round_off(3)"))
    assert outcome.code == 0, outcome.err
    grid = read_grid(tmp_path / "rounded")
    assert (grid.bits, grid.group_size, len(grid.scales)) == (3, 16, 28)
    weights = load_file(tmp_path / "rounded" / "model.safetensors")
    for name, scales in grid.scales.items():
        assert codes_of(weights[f"{name}.weight"], scales, bits=3).abs().max() == 3


def test_a_grid_that_was_not_kept_is_an_error(base: Path, tmp_path: Path) -> None:
    outcome = quantize(base, played(tmp_path, "round_off(4)"))
    assert outcome.code == 10
    assert "off the grid of 3 bits" in outcome.errors[0]


def test_another_backend_is_other_settings(base: Path, tmp_path: Path) -> None:
    assert prune(base, played(tmp_path, "halve()")).code == 0
    ours = invoke(
        "prune", base, "--calibration", tmp_path / "text.txt", *CALIBRATED, "--output-dir", tmp_path / "pruned"
    )
    assert ours.code == 73
    assert "backend" in ours.errors[0]


def test_the_job_names_every_linear_of_the_blocks_and_no_other(base: Path, tmp_path: Path) -> None:
    note = f"(pathlib.Path({str(tmp_path)!r}) / 'seen.json').write_text(json.dumps(job)); halve()"
    assert prune(base, played(tmp_path, note)).code == 0
    job = json.loads((tmp_path / "seen.json").read_text())
    assert job["model"] == str(base)
    (step,) = job["steps"]
    assert step["method"] == "sparsegpt"
    assert step["options"]["sparsity"] == 0.5
    assert len(step["linears"]) == 28
    assert not [name for name in step["linears"] if not name.startswith("model.layers.")]


def test_a_share_a_linear_goes_there_and_is_checked(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    fields = '{sparsity: [0.5, 0.75], targets: ["re:.*q_proj", "re:.*up_proj"], ignore: ["re:.*layers.[123]"]}'
    recipe.write_text(f"a_stage: {{a_modifiers: {{SparseGPTModifier: {fields}}}}}")
    deed = f"(pathlib.Path({str(tmp_path)!r}) / 'seen.json').write_text(json.dumps(job)); halve()"
    outcome = prune(base, played(tmp_path, deed), "--recipe", recipe)
    (step,) = json.loads((tmp_path / "seen.json").read_text())["steps"]
    assert step["linears"] == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    assert step["options"]["sparsity"] == [0.5, 0.75]
    assert outcome.code == 10
    assert "model.layers.0.mlp.up_proj has 50.00% zeros, asked were 75.00%" in outcome.errors[0]


@pytest.mark.parametrize(
    ("deed", "words", "code", "says"),
    [
        ("pass", (), 10, ("has 0.00% zeros, asked were 50.00%", "llmcompressor 0.14")),
        ("halve()", ("--sparsity", 0.7), 10, ("has 50.00% zeros, asked were 70.00%",)),
        ("halve()", ("--pattern", "2:4"), 10, ("fewer than 2 zeros",)),
        ("halve(); del weights[linears[3]]", (), 70, ("gave no weight back for model.layers.0.self_attn.o_proj",)),
        ("halve(); weights[linears[0]][0, 0] = float('nan')", (), 70, ("NaN", "model.layers.0.self_attn.q_proj")),
        ("halve(); weights[linears[0]] = np.zeros((2, 2), np.float32)", (), 70, ("[2, 2]",)),
        ("halve(); fallbacks = linears[:9]", (), 10, ("gave up its method for 9 of 28", "--max-fallback")),
        ("sys.exit('no such recipe')", (), 69, ("failed in", "no such recipe")),
        ("sys.exit(0)", (), 70, ("without a whole answer",)),
        ("os.kill(os.getpid(), 9)", (), 71, ("memory",)),
    ],
)
def test_what_a_library_gets_wrong_is_an_error_and_leaves_nothing(
    base: Path, tmp_path: Path, deed: str, words: tuple[object, ...], code: int, says: tuple[str, ...]
) -> None:
    outcome = prune(base, played(tmp_path, deed), *words)
    assert outcome.code == code, outcome.err
    assert len(outcome.errors) == 1
    assert [part for part in says if part not in outcome.errors[0]] == []
    assert not (tmp_path / "pruned").exists()
    assert [path for path in left_behind(tmp_path) if "base" not in path] == []


def test_fallbacks_may_be_allowed_and_are_counted(base: Path, tmp_path: Path) -> None:
    outcome = prune(base, played(tmp_path, "halve(); fallbacks = linears[:9]"), "--max-fallback", 1)
    assert outcome.code == 0, outcome.err
    assert outcome.json["fallbacks"] == 9


# --- what cannot be asked


def test_a_library_that_is_not_there(base: Path, tmp_path: Path) -> None:
    outcome = prune(base, played(tmp_path, "halve()", absent=True))
    assert outcome.code == 69
    assert "-m venv ENV" in outcome.errors[0]


def test_a_python_that_is_not_there(base: Path, tmp_path: Path) -> None:
    assert prune(base, tmp_path / "nowhere").code == 66


def test_a_python_that_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("no program")
    with pytest.raises(UnavailableError, match="does not run"):
        python_for(BACKENDS["llmcompressor"], str(tmp_path / "python"))


def test_without_a_python_this_one_must_have_the_library() -> None:
    assert python_for(Backend("torch", "", (), "torch"), None) == Path(sys.executable)
    with pytest.raises(UnavailableError, match="--backend-python ENV/bin/python"):
        python_for(Backend("no_such_library", "", (), "it"), None)
    with pytest.raises(InputNotFoundError):
        python_for(BACKENDS["gptqmodel"], "/no/such/python")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("prune", "--backend", "gptqmodel"), 2, "gptqmodel has no sparsegpt (gptq)"),
        (("prune", "--backend", "llmcompresor"), 2, "did you mean 'llmcompressor'?"),
        (("prune", "--method", "alps", "--backend", "llmcompressor"), 2, "llmcompressor has no alps"),
        (("prune", "--recipe", "dense.yaml", "--backend", "llmcompressor"), 2, "llmcompressor has no match_dense"),
        (("quantize", "--recipe", "joint.yaml", "--backend", "llmcompressor"), 2, "a stage for each"),
    ],
)
def test_what_a_backend_cannot_do(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dense.yaml").write_text("a_stage: {a_modifiers: {SparseGPTModifier: {sparsity: 0.5, match_dense: 1.0}}}")
    Path("joint.yaml").write_text(
        "a_stage: {a_modifiers: {GPTQModifier: {sparsity: 0.5, actorder: null, config_groups: "
        "{a: {targets: [Linear], weights: {num_bits: 4, strategy: group, group_size: 16}}}}}}"
    )
    outcome = invoke(words[0], base, *words[1:], "--output-dir", tmp_path / "out")
    assert outcome.code == code, outcome.err
    assert says in outcome.errors[0]


def test_a_bench_has_no_backends(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {backend: llmcompressor}")
    outcome = invoke("bench", "--recipe", recipe, "--output-dir", tmp_path / "out", "--dry-run")
    assert outcome.code == 78
    assert "bench" in outcome.errors[0]


# --- the child process


def test_a_child_dies_with_us(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = f"pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid()))"
    python = played(tmp_path, f"import time; {note}; time.sleep(60)")

    def interrupted(child: object) -> int:
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            os.sched_yield()
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.Popen.wait", _first(interrupted))
    (tmp_path / "job").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(BACKENDS["llmcompressor"], python, tmp_path / "job", model=base, requests=[_request()], tokens=_tokens())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def _first(action):
    """`action` in the place of the first call only."""
    real, calls = subprocess.Popen.wait, []

    def wait(child, *more, **options):
        calls.append(child)
        return action(child) if len(calls) == 1 else real(child, *more, **options)

    return wait


def _request() -> Request:
    return Request("sparsegpt", {"sparsity": 0.5}, ["model.layers.0.self_attn.q_proj"])


def _tokens() -> torch.Tensor:
    return random_tokens(2, 8)


def test_the_child_works_in_the_job_folder_and_gets_the_tokens(base: Path, tmp_path: Path) -> None:
    deed = "open('litter', 'w').close(); seconds = float(load_file(folder / 'tokens.safetensors')['tokens'].sum())"
    folder = tmp_path / "job"
    folder.mkdir()
    python = played(tmp_path, deed)
    answer = run(BACKENDS["llmcompressor"], python, folder, model=base, requests=[_request()], tokens=_tokens())
    assert answer.seconds == _tokens().sum()
    assert (folder / "litter").exists()
    assert answer.process_seconds > 0


@pytest.mark.parametrize(("deed", "error"), [("sys.exit(3)", UnavailableError), ("sys.exit(0)", NumericalError)])
def test_an_early_end(base: Path, tmp_path: Path, deed: str, error: type[Exception]) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    with pytest.raises(error):
        run(
            BACKENDS["llmcompressor"],
            played(tmp_path, deed),
            folder,
            model=base,
            requests=[_request()],
            tokens=_tokens(),
        )


def test_a_killed_child_is_out_of_memory(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    python = played(tmp_path, "os.kill(os.getpid(), 9)")
    with pytest.raises(OutOfMemoryError):
        run(BACKENDS["llmcompressor"], python, folder, model=base, requests=[_request()], tokens=_tokens())


# --- counted, not believed


def test_a_share_may_be_missed_by_a_hundredth() -> None:
    weight = torch.ones(10, 100)
    weight[:, :50] = 0
    assert fault_of(weight, None, {"sparsity": 0.5}) is None
    assert fault_of(weight, None, {"sparsity": 0.505}) is None
    assert fault_of(weight, None, {"sparsity": 0.52}) == "has 50.00% zeros, asked were 52.00%"
    assert fault_of(weight, None, {"sparsity": 0.48}) is not None


def test_a_share_of_a_narrow_matrix_may_be_missed_by_a_weight_a_row() -> None:
    weight = torch.ones(5, 20)
    weight[:, :13] = 0
    assert fault_of(weight, None, {"sparsity": 0.7}) is None
    assert fault_of(weight, None, {"sparsity": 0.71}) is not None


def test_every_group_of_a_pattern_counts() -> None:
    weight = torch.ones(3, 8)
    weight[:, [0, 2, 5, 6]] = 0
    assert fault_of(weight, None, {"sparsity": 0.5, "pattern": (2, 4)}) is None
    weight[1, 5], weight[1, 1] = 1, 0
    assert (
        fault_of(weight, None, {"sparsity": 0.5, "pattern": [2, 4]})
        == "has fewer than 2 zeros in 16.67% of its groups of 4"
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [8, None])
def test_a_grid_has_as_many_values_as_its_bits(bits: int, group_size: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 64), generator=generator)
    scales = 0.1 + torch.rand(6, 64 // (group_size or 64), generator=generator)
    options = {"bits": bits, "group_size": group_size}
    spread = scales.repeat_interleave(group_size or 64, 1)
    weight = codes * spread
    assert fault_of(weight, scales, options) is None
    assert "without scales" in fault_of(weight, None, options)
    assert "without scales" in fault_of(weight, scales[:, :0], options)
    assert "not positive" in fault_of(weight, scales * 0, options)
    beyond = weight.clone()
    beyond[0, 0] = 2 ** (bits - 1) * spread[0, 0]
    assert fault_of(beyond, scales, options) == f"has 0.26% of its weights off the grid of {bits} bits"
    between = weight.clone()
    between[5, 63] -= 0.3 * spread[5, 63]
    assert "off the grid" in fault_of(between, scales, options)


def test_scales_become_numbers_that_fp16_holds() -> None:
    scales = torch.tensor([[0.1, 1e-9], [3.3, 0.7]])
    codes = torch.tensor([[1, -4, 3, 0], [2, 2, -1, 3]])
    weight, kept = with_fp16_scales(codes * scales.repeat_interleave(2, 1), scales)
    assert torch.equal(kept, torch.tensor([[0.1, 2.0**-24], [3.3, 0.7]]).half().float())
    assert torch.equal(weight, codes * kept.repeat_interleave(2, 1))


def test_peak_memory_is_that_of_the_process_alone() -> None:
    """A child that has started from a large process begins with its parent's peak in getrusage."""
    ballast = torch.ones(75_000_000)  # 300 MB
    code = f"import sys; sys.path.insert(0, {str(WORKERS)!r}); import llmcompressor_worker as w; print(w.peak_bytes())"
    told = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert 1e6 < int(told) < 1e8
    assert peak_bytes() > ballast.nbytes


# --- llm-compressor's words


def test_gptq_in_their_words() -> None:
    options = {"bits": 3, "group_size": 64, "damping": 0.02, "block_size": 96, "act_order": True}
    weights = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    assert gptq_fields(options, ["a.b"]) == {
        "config_groups": {"group_0": {"targets": ["a.b"], "weights": weights}},
        "block_size": 96,
        "dampening_frac": 0.02,
        "actorder": "static",
    }
    other = gptq_fields(options | {"group_size": None, "act_order": False}, ["a.b"])
    assert other["actorder"] is None
    assert other["config_groups"]["group_0"]["weights"]["strategy"] == "channel"


def test_what_llmcompressor_says_in_its_log_only() -> None:
    listener = Listener()
    for line in (
        "Sparsifying model.layers.0.mlp.up_proj. using 24 samples",
        "Sparsifying model.layers.0.mlp.down_proj. using 24 samples",
        "Failed to invert hessian due to numerical instability. Consider increasing",
        "Sparsifying model.layers.1.mlp.up_proj. using 24 samples",
        "Modules quantized with round-to-nearest due to hessian inversion failure: a.b, c.d",
        "Hessian inversion failed for 3/9 modules. Affected modules: a.b, and 1 more (full list at DEBUG level)",
    ):
        listener(line)
    assert listener.fallbacks == {"model.layers.0.mlp.down_proj", "a.b", "c.d"}


# --- GPTQModel's words


def packed_columns(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """The definition: bit after bit down every column into words of 32, the lowest first."""
    words = []
    for column in numbers.T.tolist():
        stream = sum(number << (bits * place) for place, number in enumerate(column))
        words.append([(stream >> 32 * word) & 0xFFFFFFFF for word in range(len(column) * bits // 32)])
    signed = torch.tensor(words).T
    return torch.where(signed >= 2**31, signed - 2**32, signed).to(torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_gptq_v1_packs_is_unpacked(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (64, 32), generator=generator)  # [in, out]
    zeros = torch.randint(1, 2**bits, (2, 32), generator=generator)
    scales = torch.rand(2, 32, generator=generator)
    groups = torch.arange(64) // 32
    packed = {
        "a.qweight": packed_columns(codes, bits),
        "a.qzeros": packed_columns((zeros - 1).T, bits).T,
        "a.scales": scales,
        "a.g_idx": groups.to(torch.int32),
    }
    expected = (codes - zeros[groups]) * scales[groups]
    assert torch.equal(unpacked(packed, "a", bits), expected.T)


def test_linears_that_gptqmodel_leaves_alone() -> None:
    network = tiny_model("llama").network
    every = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    assert left_out(network, every) is None
    assert left_out(network, every[1:]) == {"-:^model\\.layers\\.0\\.self_attn\\.q_proj$": {}}


def test_what_gptqmodel_tells_of_its_fallbacks() -> None:
    told = {
        "gptq": [
            {"layer": 1, "module": "mlp.up_proj", "loss": "fallback(rtn): 0.0012"},
            {"layer": 1, "module": "mlp.down_proj", "loss": "0.0004"},
        ]
    }
    linears = [f"model.layers.{layer}.mlp.{name}" for layer in (1, 11) for name in ("up_proj", "down_proj")]
    assert fallbacks(told, linears) == ["model.layers.1.mlp.up_proj"]
