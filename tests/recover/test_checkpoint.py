"""A training can be interrupted anywhere, and is resumed to the very same adapter."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from cli_runner import QUICK_RECOVERY, TINY, write_data
from factories import on_progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mopcompress.entrypoints.bench.runner import bench
from mopcompress.entrypoints.recover import recover
from mopcompress.entrypoints.unchanged_inputs import verify_finished
from mopcompress.environment import provenance
from mopcompress.errors import NumericalError, OutputError, StorageError, UsageError
from mopcompress.progress import silent
from mopcompress.recipe import load_recipe
from mopcompress.recipe.overrides import override_recovery, recovery_recipe
from mopcompress.recover import checkpoint
from mopcompress.recover.adapter import TrainRow
from mopcompress.recover.checkpoint import CheckpointFolder, TrainingState
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.storage import artifacts

STEPS = 5


class KilledError(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _save_every_step(monkeypatch):
    monkeypatch.setattr(checkpoint, "INTERVAL_SECONDS", 0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "rows")


@pytest.fixture
def recipe(stories, data):
    loaded = load_recipe(None, {"device": "cpu", "model": str(stories), "data": str(data)})
    flags = {"steps": STEPS, "prompts_per_expert": 2, "gate_pretraining_steps": 3, "batch_size": 4}
    return recovery_recipe(loaded, flags)


def weights(folder):
    return load_file(folder / "adapter.safetensors")


@pytest.fixture
def whole(recipe, tmp_path):
    """The weights of a training that nothing interrupted."""
    recover(recipe, tmp_path / "whole", seed=0)
    return weights(tmp_path / "whole")


def kill_after(step, label="training mop"):
    def progress(what, done, _total):
        if what.startswith(label) and done == step:
            raise KilledError

    return on_progress(progress)


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "flags", [{"arm": arm} for arm in ("mop+", "lora", "smop")] + [{"arm": "mop", "distill": 0.5}], ids=str
)
def test_every_kind_of_arm_resumes_to_the_same_adapter(recipe, stories, tmp_path, flags):
    teacher = {"teacher": str(stories)} if "distill" in flags else {}
    of_arm, messages = recovery_recipe(recipe, flags | teacher), []
    recover(of_arm, tmp_path / "whole", seed=0)
    with pytest.raises(KilledError):
        recover(of_arm, tmp_path / "out", seed=0, progress=kill_after(3, f"training {flags['arm']}"))
    recover(of_arm, tmp_path / "out", seed=0, progress=on_progress(lambda line, *_: messages.append(line)))
    assert any("going on after 3 finished steps" in line for line in messages)
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("step", [1, 3, STEPS])
def test_an_interrupted_training_resumes_to_the_same_adapter(recipe, whole, tmp_path, step):
    target, messages = tmp_path / "out", []
    with pytest.raises(KilledError):
        recover(recipe, target, seed=0, progress=kill_after(step))
    assert not target.exists()
    manifest = recover(recipe, target, seed=0, progress=on_progress(lambda line, *_: messages.append(line)))
    assert any(f"going on after {step} finished steps" in line for line in messages)
    assert equal(weights(target), whole)
    assert manifest["train_steps"] == STEPS
    assert not (tmp_path / ".out.unfinished").exists()


def test_a_killed_process_resumes_to_the_same_adapter(stories, data, tmp_path):
    words = ["recover", str(stories), "--data", str(data), "--device", "cpu", *map(str, QUICK_RECOVERY)]
    words[words.index("--steps") + 1] = "12"
    script = (
        "from mopcompress.recover import checkpoint; checkpoint.INTERVAL_SECONDS = 0.0; "
        "from mopcompress.cli import main; main()"
    )

    def start(target):
        return subprocess.Popen(
            [sys.executable, "-c", script, *words, "--output-dir", target],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole = start(tmp_path / "whole")
    whole.communicate()
    assert whole.returncode == 0
    target, job_folder = tmp_path / "out", tmp_path / ".out.unfinished"
    killed = start(target)
    while not list(job_folder.glob("*.safetensors")) and killed.poll() is None:
        pass
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    resumed = start(target)
    _, stderr = resumed.communicate()
    assert resumed.returncode == 0, stderr
    assert "going on after" in stderr
    assert equal(weights(target), weights(tmp_path / "whole"))


def test_a_damaged_checkpoint_is_logged_and_not_used(recipe, whole, tmp_path):
    target, messages = tmp_path / "out", []
    with pytest.raises(KilledError):
        recover(recipe, target, seed=0, progress=kill_after(3))
    (path,) = (tmp_path / ".out.unfinished").glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    recover(recipe, target, seed=0, progress=on_progress(lambda line, *_: messages.append(line)))
    assert any("is damaged (its checksum is wrong): beginning again" in line for line in messages)
    assert equal(weights(target), whole)


@pytest.mark.parametrize(
    ("flags", "seed", "difference"),
    [
        ({}, 1, "seed was 0, is 1"),
        ({"learning_rate": 0.25}, 0, "learning_rate was 0.5, is 0.25"),
        ({"gate_logit_scale": 0.5}, 0, r"gate_temper was 0\.3, is 0\.5"),
    ],
)
def test_the_work_of_another_job_is_refused(recipe, tmp_path, flags, seed, difference):
    with pytest.raises(KilledError):
        recover(recipe, tmp_path / "out", seed=0, progress=kill_after(2))
    with pytest.raises(OutputError, match=f"another job .*{difference}"):
        recover(recovery_recipe(recipe, flags), tmp_path / "out", seed=seed)


@pytest.mark.parametrize("text", ["{half", "[1]", "caf\udce9"])
def test_a_damaged_job_is_another_one(recipe, tmp_path, text):
    with pytest.raises(KilledError):
        recover(recipe, tmp_path / "out", seed=0, progress=kill_after(2))
    job = artifacts.job_folder(tmp_path / "out") / "job.json"
    job.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(OutputError, match=r"another job \(job.json is damaged\); .*remove the folder"):
        recover(recipe, tmp_path / "out", seed=0)


def test_of_many_differences_six_are_named(recipe, tmp_path):
    with pytest.raises(KilledError):
        recover(recipe, tmp_path / "out", seed=0, progress=kill_after(2))
    changed = {"learning_rate": 0.25, "gate_logit_scale": 0.5, "steps": 9, "batch_size": 3, "warmup_fraction": 0.5}
    with pytest.raises(OutputError) as caught:
        recover(
            recovery_recipe(recipe, changed | {"max_grad_norm": 2.0, "prompt_log_weight": -1.0}),
            tmp_path / "out",
            seed=1,
        )
    assert str(caught.value).count(", is ") == 6
    assert "; and 3 more" in str(caught.value)


@pytest.mark.parametrize(("sweep_steps", "finished"), [(None, 1), (None, 2), (2, 0), (2, 3)])
def test_an_interrupted_sweep_is_resumed(recipe, tmp_path, sweep_steps, finished):
    """The interruption is in the middle of a training, after `finished` trials."""
    swept = recovery_recipe(recipe, {"sweep": True, "sweep_steps": sweep_steps})
    whole, started, messages = recover(swept, tmp_path / "whole", seed=0), [], []

    def kill(what, done, _total):
        if what.startswith("training mop") and done == 1:
            started.append(what)
            if len(started) > finished:
                raise KilledError

    with pytest.raises(KilledError):
        recover(swept, tmp_path / "out", seed=0, progress=on_progress(kill))
    resumed = recover(swept, tmp_path / "out", seed=0, progress=on_progress(lambda line, *_: messages.append(line)))
    assert sum("going on after 1 finished step" in line for line in messages) == 1
    trials = [[trial["validation_nats"] for trial in run["sweep"]["trials"]] for run in (whole, resumed)]
    assert trials[0] == trials[1]
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert resumed["train_steps"] == STEPS
    assert not (tmp_path / ".out.unfinished").exists()


def test_seconds_of_a_resumed_training_cover_all_its_steps(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("mopcompress.recover.training.time.perf_counter", itertools.count(1.0).__next__)
    seconds = recover(recipe, tmp_path / "whole", seed=0)["train_seconds"]
    with pytest.raises(KilledError):
        recover(recipe, tmp_path / "out", seed=0, progress=kill_after(3))
    assert recover(recipe, tmp_path / "out", seed=0)["train_seconds"] == seconds


@pytest.fixture
def grid(stories):
    run = {"model": str(stories), "group_size": "4", "arms": ("mop",), "seeds": (0,)}
    return override_recovery(load_recipe(TINY, run), {"steps": STEPS})


def test_a_bench_resumes_in_the_middle_of_a_training(grid, tmp_path):
    messages = []
    bench(grid, tmp_path / "whole")
    with pytest.raises(KilledError):
        bench(grid, tmp_path / "run", progress=kill_after(3))
    assert len(list((tmp_path / "run" / "adapters").iterdir())) == 1
    rows = bench(grid, tmp_path / "run", progress=on_progress(lambda line, *_: messages.append(line)))
    assert any("going on after 3 finished steps" in line for line in messages)
    adapter = "adapters/sparsegpt-50-mop-0"
    assert equal(weights(tmp_path / "run" / adapter), weights(tmp_path / "whole" / adapter))
    assert rows[-1].train_steps == STEPS
    assert [path.name for path in (tmp_path / "run" / "adapters").iterdir()] == ["sparsegpt-50-mop-0"]


@pytest.mark.parametrize(
    ("module", "label", "step"), [("compress", "sparsegpt: calibrating", 2), ("bench.runner", "training mop", 3)]
)
def test_a_bench_with_other_code_restarts_the_step_it_was_in(grid, tmp_path, monkeypatch, module, label, step):
    messages = []
    with pytest.raises(KilledError):
        bench(grid, tmp_path / "run", progress=kill_after(step, label))
    other = {"commit": "another"}
    monkeypatch.setattr(f"mopcompress.entrypoints.{module}.provenance", lambda device: provenance(device) | other)
    bench(grid, tmp_path / "run", progress=on_progress(lambda line, *_: messages.append(line)))
    assert any("cannot go on here (commit was" in line and "beginning again" in line for line in messages)
    assert not any("going on after" in line for line in messages)
    assert not list((tmp_path / "run").glob("*/.*"))


def test_a_teacher_with_other_weights_is_another_job(recipe, stories, tmp_path):
    """The name is the same: the folder's content changed between two runs."""
    teacher = tmp_path / "teacher"
    shutil.copytree(stories, teacher)
    taught = recovery_recipe(recipe, {"distill": 0.5, "teacher": str(teacher)})
    with pytest.raises(KilledError):
        recover(taught, tmp_path / "stopped", seed=0, progress=kill_after(2))
    recover(taught, tmp_path / "whole", seed=0)
    file = teacher / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(OutputError, match=r"another job .*teacher was"):
        recover(taught, tmp_path / "stopped", seed=0)
    with pytest.raises(OutputError, match="made from another teacher"):
        verify_finished(tmp_path / "whole", taught, silent)


def test_a_training_that_would_fail_again_leaves_nothing(recipe, tmp_path):
    wild = recovery_recipe(
        recipe, {"learning_rate": 10.0, "max_grad_norm": 1e6, "steps": 60, "prompt_log_weight": 30.0}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mopcompress.recover.training.compute_losses", lambda *_: torch.full((2,), torch.nan, requires_grad=True)
        )
        with pytest.raises(NumericalError):
            recover(wild, tmp_path / "out", seed=0)
    assert not list(tmp_path.iterdir())


def test_after_impossible_settings_others_can_be_used(recipe, tmp_path):
    with pytest.raises(UsageError, match="oracle"):
        recover(recovery_recipe(recipe, {"arm": "oracle", "experts": 3}), tmp_path / "out", seed=0)
    assert recover(recovery_recipe(recipe, {"arm": "oracle"}), tmp_path / "out", seed=0)["train_steps"] == STEPS


def state_of(rows=()):
    mixture = MixtureOfPrompts(torch.zeros(1, 2, 4), 1, None)
    return TrainingState(mixture, torch.optim.AdamW(mixture.parameters()), list(rows))


def test_a_checkpoint_is_saved_only_when_due(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "INTERVAL_SECONDS", 1000.0)
    saved = CheckpointFolder(tmp_path, print).for_run(0.5, 2)
    saved.save_if_due(state_of())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(checkpoint, "INTERVAL_SECONDS", 0.0)
    saved.save_if_due(state_of([TrainRow(step=1, steps=2, nll=1.5, tokens=3, seconds=0.1, norms={})]))
    assert [path.name for path in tmp_path.iterdir()] == ["2-steps-at-0.5.safetensors"]


def test_a_failing_disk_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"2-steps-at-0\.5\.safetensors failed"):
        CheckpointFolder(tmp_path / "nowhere", print).for_run(0.5, 2).save_if_due(state_of())


def test_a_checkpoint_brings_another_state_to_the_saved_one(tmp_path):
    """The weights, AdamW's moments and the rows; the file keeps its first names."""
    state, other = state_of([TrainRow(step=1, steps=2, nll=1.5, tokens=3, seconds=0.1, norms={"all": 2.0})]), state_of()
    state.adapter.prompts.grad = torch.ones_like(state.adapter.prompts)
    state.optimizer.step()
    messages = []
    checkpoint_of_run = CheckpointFolder(tmp_path, messages.append).for_run(0.5, 2)
    checkpoint_of_run.load_into(other)
    assert not messages
    checkpoint_of_run.save_if_due(state)
    checkpoint_of_run.load_into(other)
    assert messages == [f"going on after 1 finished steps, from {tmp_path}"]
    assert other.rows == state.rows
    assert torch.equal(other.adapter.prompts, state.adapter.prompts)
    assert equal(other.state_dict(), state.state_dict())
    with safe_open(tmp_path / "2-steps-at-0.5.safetensors", framework="pt") as file:
        assert {"adapter.prompts", "optimiser.0.exp_avg", "optimiser.0.exp_avg_sq"} <= set(file.keys())
        assert json.loads(file.metadata()["rows"])[0]["nats"] == 1.5
