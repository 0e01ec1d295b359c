"""A training can be stopped anywhere, and goes on to the very same adapter."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from cli_runner import QUICK_RECOVERY, TINY, write_data
from factories import on_progress
from safetensors.torch import load_file, save_file

from mopcompress.entrypoints.bench.runner import bench
from mopcompress.entrypoints.finished_inputs import verify_finished
from mopcompress.entrypoints.recover import recover
from mopcompress.environment import provenance
from mopcompress.errors import NumericalError, OutputError, StorageError, UsageError
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
def _kept_every_step(monkeypatch):
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
    """A training that nothing stopped."""
    recover(recipe, tmp_path / "whole", seed=0)
    return weights(tmp_path / "whole")


def stop_after(step, which="training mop"):
    def progress(what, done, _total):
        if what.startswith(which) and done == step:
            raise KilledError

    return on_progress(progress)


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "flags", [{"arm": arm} for arm in ("mop+", "lora", "smop")] + [{"arm": "mop", "distill": 0.5}], ids=str
)
def test_every_kind_of_arm_goes_on_to_the_same_adapter(recipe, stories, tmp_path, flags):
    teacher = {"teacher": str(stories)} if "distill" in flags else {}
    chosen, told = recovery_recipe(recipe, flags | teacher), []
    recover(chosen, tmp_path / "whole", seed=0)
    with pytest.raises(KilledError):
        recover(chosen, tmp_path / "out", seed=0, progress=stop_after(3, f"training {flags['arm']}"))
    recover(chosen, tmp_path / "out", seed=0, progress=on_progress(lambda line, _done, _total: told.append(line)))
    assert any("going on after 3 finished steps" in line for line in told)
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("step", [1, 3, STEPS])
def test_a_stopped_training_goes_on_to_the_same_adapter(recipe, whole, tmp_path, step):
    target, told = tmp_path / "out", []
    with pytest.raises(KilledError):
        recover(recipe, target, seed=0, progress=stop_after(step))
    assert not target.exists()
    facts = recover(recipe, target, seed=0, progress=on_progress(lambda line, _done, _total: told.append(line)))
    assert any(f"going on after {step} finished steps" in line for line in told)
    assert equal(weights(target), whole)
    assert facts["train_steps"] == STEPS
    assert not (tmp_path / ".out.unfinished").exists()


def test_a_process_that_is_killed_goes_on_to_the_same_adapter(stories, data, tmp_path):
    words = ["recover", str(stories), "--data", str(data), "--device", "cpu", *map(str, QUICK_RECOVERY)]
    words[words.index("--steps") + 1] = "12"
    script = "from mopcompress.recover import checkpoint as u; u.INTERVAL_SECONDS = 0.0; from mopcompress.cli import main; main()"

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
    target, unfinished = tmp_path / "out", tmp_path / ".out.unfinished"
    killed = start(target)
    while not list(unfinished.glob("*.safetensors")) and killed.poll() is None:
        pass
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    again = start(target)
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert "going on after" in said
    assert equal(weights(target), weights(tmp_path / "whole"))


def test_a_damaged_standing_is_told_of_and_not_used(recipe, whole, tmp_path):
    target, told = tmp_path / "out", []
    with pytest.raises(KilledError):
        recover(recipe, target, seed=0, progress=stop_after(3))
    (path,) = (tmp_path / ".out.unfinished").glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    recover(recipe, target, seed=0, progress=on_progress(lambda line, _done, _total: told.append(line)))
    assert any("is damaged (its checksum is wrong): beginning again" in line for line in told)
    assert equal(weights(target), whole)


@pytest.mark.parametrize(
    ("flags", "seed", "said"),
    [
        ({}, 1, "seed was 0, is 1"),
        ({"learning_rate": 0.25}, 0, "learning_rate was 0.5, is 0.25"),
        ({"gate_logit_scale": 0.5}, 0, r"gate_temper was 0\.3, is 0\.5"),
    ],
)
def test_another_job_in_its_place_is_refused(recipe, tmp_path, flags, seed, said):
    with pytest.raises(KilledError):
        recover(recipe, tmp_path / "out", seed=0, progress=stop_after(2))
    with pytest.raises(OutputError, match=f"another job .*{said}"):
        recover(recovery_recipe(recipe, flags), tmp_path / "out", seed=seed)


@pytest.mark.parametrize("text", ["{half", "[1]", "caf\udce9"])
def test_a_damaged_job_is_another_one(recipe, tmp_path, text):
    with pytest.raises(KilledError):
        recover(recipe, tmp_path / "out", seed=0, progress=stop_after(2))
    job = artifacts.job_folder(tmp_path / "out") / "job.json"
    job.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(OutputError, match=r"another job \(job.json is damaged\); .*remove the folder"):
        recover(recipe, tmp_path / "out", seed=0)


def test_of_many_differences_some_are_told(recipe, tmp_path):
    with pytest.raises(KilledError):
        recover(recipe, tmp_path / "out", seed=0, progress=stop_after(2))
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
def test_a_stopped_sweep_goes_on_where_it_was(recipe, tmp_path, sweep_steps, finished):
    """In the middle of a training, after so many finished ones."""
    swept = recovery_recipe(recipe, {"sweep": True, "sweep_steps": sweep_steps})
    whole, begun, told = recover(swept, tmp_path / "whole", seed=0), [], []

    def stop(what, done, _total):
        if what.startswith("training mop") and done == 1:
            begun.append(what)
            if len(begun) > finished:
                raise KilledError

    with pytest.raises(KilledError):
        recover(swept, tmp_path / "out", seed=0, progress=on_progress(stop))
    again = recover(swept, tmp_path / "out", seed=0, progress=on_progress(lambda line, *_: told.append(line)))
    assert sum("going on after 1 finished step" in line for line in told) == 1
    trials = [[one["validation_nats"] for one in facts["sweep"]["trials"]] for facts in (whole, again)]
    assert trials[0] == trials[1]
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert again["train_steps"] == STEPS
    assert not (tmp_path / ".out.unfinished").exists()


def test_seconds_of_a_stopped_training_are_those_of_all_its_steps(recipe, tmp_path, monkeypatch):
    now = 0.0

    def clock():
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr("mopcompress.recover.training.time.perf_counter", clock)
    seconds = recover(recipe, tmp_path / "whole", seed=0)["train_seconds"]
    with pytest.raises(KilledError):
        recover(recipe, tmp_path / "out", seed=0, progress=stop_after(3))
    assert recover(recipe, tmp_path / "out", seed=0)["train_seconds"] == seconds


@pytest.fixture
def grid(stories):
    run = {"model": str(stories), "group_size": "4", "arms": ("mop",), "seeds": (0,)}
    return override_recovery(load_recipe(TINY, run), {"steps": STEPS})


def test_a_bench_that_was_stopped_in_a_training_goes_on_in_it(grid, tmp_path):
    told = []
    bench(grid, tmp_path / "whole")
    with pytest.raises(KilledError):
        bench(grid, tmp_path / "run", progress=stop_after(3))
    assert len(list((tmp_path / "run" / "adapters").iterdir())) == 1
    rows = bench(grid, tmp_path / "run", progress=on_progress(lambda line, *_: told.append(line)))
    assert any("going on after 3 finished steps" in line for line in told)
    adapter = "adapters/sparsegpt-50-mop-0"
    assert equal(weights(tmp_path / "run" / adapter), weights(tmp_path / "whole" / adapter))
    assert rows[-1].train_steps == STEPS
    assert [path.name for path in (tmp_path / "run" / "adapters").iterdir()] == ["sparsegpt-50-mop-0"]


@pytest.mark.parametrize(
    ("stage", "what", "step"), [("compress", "sparsegpt: calibrating", 2), ("bench.runner", "training mop", 3)]
)
def test_a_bench_goes_on_with_other_code_but_not_in_the_middle(grid, tmp_path, monkeypatch, stage, what, step):
    told = []
    with pytest.raises(KilledError):
        bench(grid, tmp_path / "run", progress=stop_after(step, what))
    changed = {"commit": "another"}
    monkeypatch.setattr(f"mopcompress.entrypoints.{stage}.provenance", lambda device: provenance(device) | changed)
    bench(grid, tmp_path / "run", progress=on_progress(lambda line, *_: told.append(line)))
    assert any("cannot go on here (commit was" in line and "beginning again" in line for line in told)
    assert not any("going on after" in line for line in told)
    assert not list((tmp_path / "run").glob("*/.*"))


def test_a_teacher_with_other_weights_is_another_job(recipe, stories, tmp_path):
    """Under the same name: the folder's content was changed between two runs."""
    teacher = tmp_path / "teacher"
    shutil.copytree(stories, teacher)
    taught = recovery_recipe(recipe, {"distill": 0.5, "teacher": str(teacher)})
    with pytest.raises(KilledError):
        recover(taught, tmp_path / "stopped", seed=0, progress=stop_after(2))
    recover(taught, tmp_path / "whole", seed=0)
    file = teacher / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(OutputError, match=r"another job .*teacher was"):
        recover(taught, tmp_path / "stopped", seed=0)
    with pytest.raises(OutputError, match="made from another teacher"):
        verify_finished(tmp_path / "whole", taught, lambda *_: None)


def test_a_training_that_could_only_fail_again_is_not_kept(recipe, tmp_path):
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


def test_after_settings_that_cannot_be_others_are_taken_in_its_place(recipe, tmp_path):
    with pytest.raises(UsageError, match="oracle"):
        recover(recovery_recipe(recipe, {"arm": "oracle", "experts": 3}), tmp_path / "out", seed=0)
    assert recover(recovery_recipe(recipe, {"arm": "oracle"}), tmp_path / "out", seed=0)["train_steps"] == STEPS


def standing_of(rows=()):
    mixture = MixtureOfPrompts(torch.zeros(1, 2, 4), 1, None)
    return TrainingState(mixture, torch.optim.AdamW(mixture.parameters()), list(rows))


def test_it_writes_no_more_often_than_it_should(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "INTERVAL_SECONDS", 1000.0)
    keeping = CheckpointFolder(tmp_path, print).for_run(0.5, 2)
    keeping.save_if_due(standing_of())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(checkpoint, "INTERVAL_SECONDS", 0.0)
    keeping.save_if_due(standing_of([TrainRow(step=1, steps=2, nll=1.5, tokens=3, seconds=0.1, norms={})]))
    assert [path.name for path in tmp_path.iterdir()] == ["2-steps-at-0.5.safetensors"]


def test_a_disk_that_fails_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"2-steps-at-0\.5\.safetensors failed"):
        CheckpointFolder(tmp_path / "nowhere", print).for_run(0.5, 2).save_if_due(standing_of())
