import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from cli_runner import TINY, write_data
from factories import on_progress
from safetensors.torch import load_file, save_file
from tiny_models import saved, tiny_model

from mopcompress.data.text_windows import text_windows
from mopcompress.entrypoints.bench.runner import bench
from mopcompress.entrypoints.compress import compress
from mopcompress.entrypoints.evaluate import evaluate_folder
from mopcompress.entrypoints.recover import recover
from mopcompress.errors import DataError, OutputError, QualityGateError, RecipeError, UsageError
from mopcompress.grid import CompressionSetting, cells_of
from mopcompress.models.model_loading import load_model, weights_hash
from mopcompress.recipe import load_recipe
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recipe.overrides import override_recovery, recovery_recipe
from mopcompress.results import BenchRow, append_row, read_documents, read_rows
from mopcompress.storage import artifacts

CELLS = [
    ("dense", "none", 0),
    ("sparsegpt 50%", "none", 0),
    ("sparsegpt 50%", "single", 0),
    ("sparsegpt 50%", "mop", 0),
]
CLOCKS = ("train_seconds", "compress_seconds", "evaluate_seconds", "peak_bytes")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def recipe_of(stories):
    """`recipes/tiny.yaml` with flags; its model's layers have 64 and 172 inputs, which groups of 4 divide."""
    return lambda **flags: load_recipe(TINY, {"model": str(stories), "group_size": "4"} | flags)


@pytest.fixture(scope="module")
def finished(recipe_of, tmp_path_factory):
    """The folder of one uninterrupted run. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("bench") / "run"
    bench(recipe_of(), folder)
    return folder


def measured(rows):
    """All of the rows that does not depend on the machine's speed."""
    return [{name: value for name, value in asdict(row).items() if name not in CLOCKS} for row in rows]


def test_every_cell_has_one_row_in_grid_order(finished):
    assert [row.cell for row in read_rows(finished / "rows.jsonl")] == CELLS


def test_every_row_is_complete(finished):
    dense, pruned, single, mop = rows = read_rows(finished / "rows.jsonl")
    for row in rows:
        assert (row.documents, row.data) == (12, "skills")
        assert row.scored_tokens == dense.scored_tokens > 12
        assert 1 < row.perplexity < 1e6
        assert sum(score.documents for score in row.per_task.values()) == 12
        assert row.model_bytes > 500_000
        assert row.evaluate_seconds > 0
        assert row.peak_bytes > 0
        scores = read_documents(finished / row.documents_file)
        assert sum(scores.scored_tokens) == row.scored_tokens
        assert len(scores.nats) == 12
    assert {row.model_sha256 for row in rows[1:]} == {weights_hash(finished / "models" / "sparsegpt-50")}
    assert dense.model_sha256 not in (None, pruned.model_sha256)
    assert (dense.sparsity, dense.weights) == (0.0, 0)
    assert {row.sparsity for row in rows[1:]} == {0.5}
    assert {row.weights for row in rows[1:]} == {5 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 172 * 64)}
    assert pruned.compress_seconds > 0
    assert len({row.perplexity for row in rows}) == 4
    assert (pruned.trained_parameters, pruned.adapter_bytes, pruned.train_steps) == (0, 0, 0)
    prompts = 2 * 12 * 64 + 1
    assert single.trained_parameters == prompts
    assert mop.trained_parameters == prompts + 64 * 128 + 128 + 128 * 12 + 12
    assert single.train_steps == mop.train_steps == 4
    assert single.train_seconds > 0
    assert mop.train_seconds > 0
    assert mop.adapter_bytes > 4 * mop.trained_parameters
    assert single.gate is None
    assert len(mop.gate.tasks) == len(mop.gate.weights)
    assert all(sum(weights) == pytest.approx(12, rel=1e-4) for weights in mop.gate.weights)
    assert 0 <= mop.gate.accuracy <= 1


def test_a_finished_folder_has_manifest_and_reports(finished):
    run = json.loads((finished / "run.json").read_text())
    assert run["finished"] >= run["started"]
    assert run["seconds"] > 0
    assert run["recipe"]["run"]["test_rows"] == 12
    for kind in ("models/sparsegpt-50", "adapters/sparsegpt-50-single-0", "adapters/sparsegpt-50-mop-0"):
        artifacts.verify(finished / kind)
    for name in ("report.json", "report.md", "report.html"):
        assert (finished / name).stat().st_size > 500


def test_a_finished_run_does_nothing_again(finished, recipe_of, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    messages = []
    rows = bench(recipe_of(), folder, progress=on_progress(lambda *call: messages.append(call)))
    assert rows == read_rows(finished / "rows.jsonl")
    assert (folder / "rows.jsonl").read_bytes() == (finished / "rows.jsonl").read_bytes()
    assert not [what for what, _, _ in messages if "training" in what or "scoring" in what]


def test_a_killed_run_resumes_to_the_same_rows(finished, recipe_of, tmp_path):
    """Killed while a line was written: two rows are whole, a third is cut, the last adapter was never written."""
    folder = shutil.copytree(finished, tmp_path / "run")
    lines = (finished / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rows.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:100])
    shutil.rmtree(folder / "adapters" / "sparsegpt-50-mop-0")
    (folder / "documents" / "sparsegpt-50-mop-0.json").unlink()
    rows = bench(recipe_of(), folder)
    assert measured(rows) == measured(read_rows(finished / "rows.jsonl"))
    assert (folder / "rows.jsonl").read_bytes().startswith(b"".join(lines[:2]))
    found, expected = (run / "adapters" / "sparsegpt-50-mop-0" / "adapter.safetensors" for run in (folder, finished))
    assert found.read_bytes() == expected.read_bytes()


def test_the_adapter_of_a_removed_row_is_replaced(finished, recipe_of, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    lines = (finished / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rows.jsonl").write_bytes(b"".join(lines[:-1]))
    old = folder / "adapters" / "sparsegpt-50-mop-0"
    (old / "adapter.safetensors").write_bytes(b"of a training that nobody remembers")
    bench(recipe_of(), folder)
    found, expected = (run / "adapters" / old.name / "adapter.safetensors" for run in (folder, finished))
    assert found.read_bytes() == expected.read_bytes()


def test_a_run_from_the_start_gives_the_same_rows(finished, recipe_of, tmp_path):
    assert measured(bench(recipe_of(), tmp_path / "run")) == measured(read_rows(finished / "rows.jsonl"))


def test_a_larger_grid_runs_only_what_is_new(finished, recipe_of, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    messages = []
    rows = bench(
        recipe_of(ratios="0.5,0.25", methods="sparsegpt,magnitude", bits="4", seeds="0,1", arms="none,single"),
        folder,
        progress=on_progress(lambda what, done, total: messages.append(what)),
    )
    pruned = ["sparsegpt 50%", "sparsegpt 25%", "magnitude 50%", "magnitude 25%", "gptq 4-bit"]
    new = [("sparsegpt 50%", "single", 1)]
    new += [(name, arm, seed) for name in pruned[1:] for arm, seed in (("none", 0), ("single", 0), ("single", 1))]
    assert [row.cell for row in rows] == CELLS + new
    assert (folder / "rows.jsonl").read_bytes().startswith((finished / "rows.jsonl").read_bytes())
    shared = folder / "models" / "sparsegpt-50" / "manifest.json"
    assert shared.read_bytes() == (finished / "models" / "sparsegpt-50" / "manifest.json").read_bytes()
    assert {row.ratio: row.sparsity for row in rows if row.ratio} == pytest.approx({0.5: 0.5, 0.25: 0.25}, abs=1e-3)
    assert len({row.perplexity for row in rows}) == len(rows)


def test_a_joint_run_quantizes_the_pruned_model(finished, recipe_of, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    rows = bench(recipe_of(ratios="0.5,0.75", bits="4", joint=True, arms="none,mop"), folder)
    new = [row for row in rows if row.cell not in CELLS]
    names = [f"sparsegpt {share}% + gptq 4-bit" for share in (50, 75)]
    assert [row.cell for row in new] == [(name, arm, 0) for name in names for arm in ("none", "mop")]
    assert [(row.method, row.ratio, row.bits) for row in new[::2]] == [
        ("sparsegpt+gptq", 0.5, 4),
        ("sparsegpt+gptq", 0.75, 4),
    ]
    weights = load_file(folder / "models" / "sparsegpt-75-gptq-4-bit" / "model.safetensors")
    for name, weight in weights.items():
        if "_proj" in name:
            assert int((weight == 0).sum()) >= 0.75 * weight.numel() - 1, name
    assert [row.sparsity >= row.ratio for row in new] == [True] * 4
    report = (folder / "report.md").read_text()
    assert all(name in report for name in names)


@pytest.mark.parametrize(
    ("flags", "named"),
    [({"test_rows": "6"}, "run.test_rows was 12, is 6"), ({"seed": "1"}, "run.seed was 0, is 1")],
)
def test_other_settings_in_a_folder_are_an_error(finished, recipe_of, tmp_path, flags, named):
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(RecipeError, match=named):
        bench(recipe_of(**flags), folder)
    for name in ("rows.jsonl", "run.json"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_a_manifest_without_a_new_field_has_its_default(finished, recipe_of, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    manifest = json.loads((folder / "run.json").read_text())
    for stage in manifest["recipe"].values():
        stage.get("recovery_modifiers", {}).get("PromptRecoveryModifier", {}).pop("log_opening", None)
    (folder / "run.json").write_text(json.dumps(manifest))
    assert [row.cell for row in bench(recipe_of(), folder)] == CELLS
    manifest["recipe"]["recovery_stage"]["recovery_modifiers"]["PromptRecoveryModifier"]["log_opening"] = -1.0
    (folder / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match="prompt_log_weight was -1"):
        bench(recipe_of(), folder)


def test_a_manifest_without_clipping_fields_means_old_values(finished, recipe_of, tmp_path):
    """Its rows are of a fixed norm alone, which is not the default any more."""
    folder = shutil.copytree(finished, tmp_path / "run")
    manifest = json.loads((folder / "run.json").read_text())
    recovery = manifest["recipe"]["recovery_stage"]["recovery_modifiers"]["PromptRecoveryModifier"]
    assert (recovery.pop("clip_percentile"), recovery.pop("gate_clipping")) == (50, "apart")
    (folder / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(
        RecipeError, match=r"gate_clipping was 'together', is 'apart'; .*clip_percentile was 100\.0, is 50\.0; use"
    ):
        bench(recipe_of(), folder)
    before = {"grad_clip_percentile": 100, "gate_clipping": "together"}
    assert [row.cell for row in bench(override_recovery(recipe_of(), before), folder)] == CELLS


def test_rows_of_another_model_are_an_error(finished, recipe_of, tmp_path):
    """As when models were removed and pruned again by another number of threads."""
    folder = shutil.copytree(finished, tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in lines[1:]:
        row["model_sha256"] = "another"
    before = "".join(json.dumps(row) + "\n" for row in lines)
    (folder / "rows.jsonl").write_text(before)
    with pytest.raises(DataError, match=r"finished rows of sparsegpt 50% are of another model than models/ holds now"):
        bench(recipe_of(seeds="0,1"), folder)
    assert (folder / "rows.jsonl").read_text() == before


def test_rows_of_another_revision_of_an_arm_are_an_error(finished, recipe_of, tmp_path, monkeypatch):
    """As when the code was updated in between: what is finished stays, and other arms can be added."""
    monkeypatch.setitem(ARM_DEFAULTS, "mop", replace(ARM_DEFAULTS["mop"], revision=2))
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(DataError, match=r"mop has changed since \(revision 1, now 2\), .*; use another --output-dir"):
        bench(recipe_of(seeds="0,1"), folder)
    for name in ("rows.jsonl", "run.json"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    rows = bench(recipe_of(seeds="0,1", arms="none,single"), folder)
    assert {(row.arm, row.revision) for row in rows} == {("none", 1), ("single", 1), ("mop", 1)}
    assert [row.cell for row in rows] == [*CELLS, ("sparsegpt 50%", "single", 1)]


def test_a_folder_in_use_is_an_error(finished, recipe_of, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    refused = []

    def start_another(_what, _done, _total):
        if not refused:
            with pytest.raises(OutputError, match="in use") as caught:
                bench(recipe_of(), folder)
            refused.append(caught)

    (folder / "rows.jsonl").unlink()
    bench(recipe_of(), folder, progress=on_progress(start_another))
    assert refused


def test_single_commands_give_the_numbers_of_a_bench(finished, recipe_of, tmp_path):
    recipe = recipe_of()
    compress(recipe, [recipe.modifier_for("sparsegpt").with_sparsity(0.5)], tmp_path / "pruned")
    pruned = recipe_of(model=str(tmp_path / "pruned"))
    recover(pruned, tmp_path / "adapter", seed=0)
    rows = {row.cell: row for row in read_rows(finished / "rows.jsonl")}
    for stage, adapter, cell in (
        (recipe, None, CELLS[0]),
        (pruned, None, CELLS[1]),
        (pruned, tmp_path / "adapter", CELLS[3]),
    ):
        found = evaluate_folder(stage, adapter)
        assert found["perplexity"] == rows[cell].perplexity
        assert found["perplexity_macro"] == rows[cell].perplexity_macro
        assert found["exact_match"] == rows[cell].exact_match
        assert found["scored_tokens"] == rows[cell].scored_tokens
    assert found["gate"] == asdict(rows[CELLS[3]].gate)


def test_too_many_fallbacks_publish_nothing(recipe_of, tmp_path):
    """A single calibration token cannot fill a Gram matrix, and with hardly any damping nothing mends it."""
    recipe = recipe_of(num_calibration_samples="1", max_seq_length="8", max_fallback="0")
    modifier = recipe.modifier_for("sparsegpt").model_copy(update={"dampening_frac": 1e-9})
    with pytest.raises(QualityGateError, match=r"run\.max_fallback_fraction"):
        compress(recipe, [modifier], tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == [".pruned.unfinished"]


# --- rows on disk


def test_rows_are_read_back_equal(finished, tmp_path):
    rows = read_rows(finished / "rows.jsonl")
    for row in rows:
        append_row(row, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert all(isinstance(row, BenchRow) for row in rows)


def test_a_damaged_line_is_an_error_unless_it_is_the_last(finished, tmp_path):
    lines = (finished / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\n" + b"".join(lines))
    with pytest.raises(DataError, match="line 1 is not a bench row"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_bytes(b"".join(lines) + b"\xff")
    assert len(read_rows(tmp_path / "rows.jsonl")) == len(lines)


def test_a_row_replaces_an_incomplete_line(finished, tmp_path):
    first, second = (finished / "rows.jsonl").read_bytes().splitlines(keepends=True)[:2]
    for rest in (b"", first[:50], first + second[:-1]):
        (tmp_path / "rows.jsonl").write_bytes(rest)
        append_row(read_rows(finished / "rows.jsonl")[1], tmp_path / "rows.jsonl")
        assert (tmp_path / "rows.jsonl").read_bytes() == (first if rest.startswith(first) else b"") + second


def test_plain_text_and_arms_of_the_dense_model_are_scored(recipe_of, tmp_path, stories):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog who liked to run in the park. " * 60)
    recipe = recipe_of(arms=("none",), dense_arms=("single",), text=str(text), text_samples=2)
    rows = {row.cell: row for row in bench(recipe, tmp_path / "run")}
    assert list(rows) == [("dense", "none", 0), ("dense", "single", 0), ("sparsegpt 50%", "none", 0)]
    model = load_model(stories, device=torch.device("cpu"))
    windows = text_windows(text.read_text(), model.tokenizer, samples=2, length=256)
    with torch.inference_mode():
        logits = model.network(input_ids=windows).logits[:, 31:-1]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 32:].flatten())
    assert rows["dense", "none", 0].text_perplexity == pytest.approx(float(nats.exp()), rel=1e-4)
    others = {rows[cell].text_perplexity for cell in rows}
    assert len(others) == 3
    assert None not in others
    assert "plain text" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_training_text_is_a_task_of_the_gate(recipe_of, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog who liked to run in the park. " * 60)
    recipe = recipe_of(arms="none,mop", train_text=str(text), train_text_samples="3")
    rows = bench(recipe, tmp_path / "run")
    gate = next(row.gate for row in rows if row.arm == "mop")
    assert set(gate.domains) - set(gate.tasks) == {"plain text"}
    assert "3 windows of" in (tmp_path / "run" / "report.md").read_text()
    text.write_text("There was a little cat. " * 200)
    with pytest.raises(RecipeError, match="training text"):
        bench(recipe, tmp_path / "run")


@pytest.mark.slow
def test_rows_without_tasks_have_seven_experts_by_default(recipe_of, tmp_path):
    """As many prompt tokens in each, a gate that knows no right expert, and a line that says so, once."""
    data = write_data(tmp_path / "data", rows=12)
    for path in data.iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line | {"task": ""}) + "\n" for line in lines))
    arms, messages = ("single", "mop", "smop", "idp"), []
    recipe = recipe_of(data=str(data), arms=",".join(arms))
    rows = bench(recipe, tmp_path / "run", progress=on_progress(lambda line, done, total: messages.append(line)))
    rows = {row.arm: row for row in rows if row.method != "dense"}
    tokens = 7 * recipe.recovery.prompts_per_expert
    assert {rows[arm].trained_parameters for arm in ("single", "idp")} == {64 * tokens + 1}
    for arm in arms[1:]:
        shape = load_file(tmp_path / "run" / "adapters" / f"sparsegpt-50-{arm}-0" / "adapter.safetensors")[
            "prompts"
        ].shape
        assert (shape[0], shape[0] * shape[1]) == (7, tokens)
    assert (len(rows["mop"].gate.load), rows["mop"].gate.accuracy) == (7, None)
    assert sum("7 experts" in line and "recovery.experts" in line for line in messages) == 1
    assert "clusters of the training instructions" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(UsageError, match="where rows name no tasks"):
        bench(recipe_of(data=str(data), arms="oracle"), tmp_path / "oracle")
    messages.clear()
    few = override_recovery(recipe_of(data=str(data), arms="mop"), {"experts": 2})
    found = bench(few, tmp_path / "few", progress=on_progress(lambda line, done, total: messages.append(line)))[-1]
    assert len(found.gate.load) == 2
    assert not any("name no tasks" in line for line in messages)
    messages.clear()
    recipe = override_recovery(recipe_of(arms="none,mop"), {"experts": 2})
    bench(recipe, tmp_path / "named", progress=on_progress(lambda line, done, total: messages.append(line)))
    assert sum("2 experts are not one for each of the" in line for line in messages) == 1


@pytest.mark.slow
def test_controls_of_the_gate_are_cells_too(recipe_of, tmp_path):
    """The oracle cannot score text of no task; a gate of clusters has no tasks to be right about."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog. " * 200)
    arms = ("mop", "uniform", "oracle", "shuffled", "idp")
    flags = {"gate_labels": "clusters", "gate_mode": "separate", "shared_expert": True, "top_k": 2}
    recipe = override_recovery(recipe_of(arms=",".join(arms), text=str(text), text_samples="2"), flags)
    rows = {row.arm: row for row in bench(recipe, tmp_path / "run") if row.method != "dense"}
    assert {arm for arm, row in rows.items() if row.text_perplexity is None} == {"oracle"}
    assert {arm for arm, row in rows.items() if row.gate} == {"mop", "shuffled", "idp"}
    assert {row.gate.accuracy for row in rows.values() if row.gate} == {None}
    assert sum(weight > 0 for weight in rows["mop"].gate.load) > 0
    alike = ("uniform", "oracle", "idp")
    assert len({rows[arm].trained_parameters for arm in alike}) == 1
    assert rows["mop"].trained_parameters == rows["shuffled"].trained_parameters > rows["uniform"].trained_parameters
    oracle = tmp_path / "run" / "adapters" / "sparsegpt-50-oracle-0"
    base = str(tmp_path / "run" / "models" / "sparsegpt-50")
    found = evaluate_folder(recipe_of(model=base, text=str(text), text_samples="2"), oracle)
    assert (found["perplexity"], found["text_perplexity"]) == (pytest.approx(rows["oracle"].perplexity), None)


def test_a_top_k_beyond_the_experts_is_an_error(recipe_of, stories, tmp_path):
    recipe = recovery_recipe(recipe_of(), {"top_k": 13})
    with pytest.raises(UsageError, match=r"recovery\.top_k: 13 of 12 experts"):
        recover(recipe, tmp_path / "adapter", seed=0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"top_k": 13}, "recovery.top_k: 13 of 12 experts"),
        ({"layer": 99}, "recovery.layer: 99"),
        ({"rank": 999}, "rank: 999 is more than"),
        ({"adapter_targets": ("no_proj",)}, "no linear .* is 'no_proj'"),
    ],
)
def test_impossible_arms_are_an_error_before_any_writing(recipe_of, tmp_path, flags, said):
    with pytest.raises((UsageError, DataError), match=said):
        bench(override_recovery(recipe_of(arms="none,mop,lora"), flags), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["LOCK"]


def test_arms_of_the_whole_network_start_at_layer_zero(recipe_of, tmp_path):
    rows = bench(override_recovery(recipe_of(arms="none,norms"), {"layer": 0}), tmp_path / "run")
    assert {row.arm for row in rows} == {"none", "norms"}


def test_closed_form_arms_need_no_validation_rows(recipe_of, stories, tmp_path):
    data = write_data(tmp_path / "rows")
    long = {"task": "say", "instruction": "say cat " * 30, "input": "", "output": "the cat"}
    (data / "validation.jsonl").write_text(json.dumps(long) + "\n")
    flags = {"data": str(data), "skip_rows_longer_than": "60"}
    swept = override_recovery(recipe_of(arms="none,eora", **flags), {"sweep": True})
    assert {row.arm for row in bench(swept, tmp_path / "run")} == {"none", "eora"}
    with pytest.raises(DataError, match="chooses by validation rows"):
        bench(override_recovery(recipe_of(arms="none,mop", **flags), {"sweep": True}), tmp_path / "other")


def test_unseeded_arms_have_one_cell(recipe_of, tmp_path):
    cells = cells_of(
        recipe_of(arms="none,eora,mop", seeds="1,2").run.model_dump(by_alias=True),
        CompressionSetting("sparsegpt", 0.5, None),
    )
    assert [(cell.arm, cell.seed) for cell in cells] == [("none", 0), ("eora", 0), ("mop", 1), ("mop", 2)]


def test_unsuitable_dense_weights_are_an_error_early(recipe_of, stories, tmp_path):
    teacher = saved(tiny_model(num_hidden_layers=5), tmp_path / "teacher")
    shutil.copy(stories / "tokenizer.json", teacher)
    shutil.copy(stories / "tokenizer_config.json", teacher)
    named = override_recovery(recipe_of(arms="none,eora"), {"teacher": str(teacher)})
    with pytest.raises(DataError, match=r"name the right recovery\.teacher"):
        bench(named, tmp_path / "run")
    with pytest.raises(RecipeError, match="eora compares with the dense model's linears, and structured"):
        bench(recipe_of(arms="none,eora", methods="structured,magnitude"), tmp_path / "run")
    with pytest.raises(UsageError, match=r"recovery\.layer: 99"):
        bench(override_recovery(recipe_of(arms="none", dense_arms=""), {"layer": 99}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["LOCK"]


def test_a_changed_teacher_is_another_setting(recipe_of, stories, tmp_path):
    teacher = shutil.copytree(stories, tmp_path / "teacher")
    recipe = override_recovery(recipe_of(arms="none"), {"teacher": str(teacher)})
    bench(recipe, tmp_path / "run")
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match="teacher was"):
        bench(recipe, tmp_path / "run")


# --- written answers


def test_generated_answers_are_scored_when_asked_for(recipe_of, finished, tmp_path):
    """With the oracle too, which is messages the task; nothing that was scored before changes."""
    folder = tmp_path / "run"
    rows = bench(recipe_of(max_new_tokens="6", arms="none,single,oracle"), folder)
    before = {row.cell: row for row in read_rows(finished / "rows.jsonl")}
    for row in rows:
        written = read_documents(folder / row.documents_file).written
        assert len(written.answers) == row.documents == 12
        assert row.rouge_l == pytest.approx(sum(written.rouge_l) / 12)
        assert 0 <= row.written_exact_match <= row.rouge_l_macro <= 1
        assert [sample.answer for sample in row.samples] == written.answers[:3]
        assert all(sample.instruction and sample.reference for sample in row.samples)
        assert not any("Answer:" in sample.instruction for sample in row.samples)
        if row.cell in before:
            assert row.perplexity == before[row.cell].perplexity
    assert "ROUGE-L" in (folder / "report.md").read_text()
    assert {(row.rouge_l, row.samples) for row in before.values()} == {(None, ())}


def test_evaluate_generates_the_answers_of_the_bench(recipe_of, tmp_path):
    folder = tmp_path / "run"
    rows = bench(recipe_of(max_new_tokens="6", arms="none,mop"), folder)
    model = str(folder / "models" / "sparsegpt-50")
    recipe = recipe_of(max_new_tokens="6", model=model)
    found = evaluate_folder(recipe, folder / "adapters" / "sparsegpt-50-mop-0")
    row = next(row for row in rows if row.arm == "mop")
    assert [found[name] for name in ("rouge_l", "rouge_l_macro", "written_exact_match")] == [
        row.rouge_l,
        row.rouge_l_macro,
        row.written_exact_match,
    ]
    assert found["samples"] == [asdict(sample) for sample in row.samples]


def test_rows_without_answers_are_read(finished, tmp_path):
    row = json.loads((finished / "rows.jsonl").read_text().splitlines()[0])
    for name in ("rouge_l", "rouge_l_macro", "written_exact_match", "samples"):
        del row[name]
    row["per_task"] = {
        task: {name: score[name] for name in ("documents", "scored_tokens", "perplexity", "exact_match")}
        for task, score in row["per_task"].items()
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert read_rows(tmp_path / "rows.jsonl") == read_rows(finished / "rows.jsonl")[:1]
    scores = json.loads((finished / row["documents_file"]).read_text())
    del scores["written"]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    assert read_documents(tmp_path / "scores.json") == read_documents(finished / row["documents_file"])
