"""Several processes train as one does."""

import json
import os
import subprocess
import sys

import pytest
from cli_runner import write_data
from safetensors.torch import load_file
from torch.testing import assert_close

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # its --cpu starts several processes through MPI alone; --multi_gpu means torchrun, with GPUs or without
    "accelerate launch": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}
SHORT = {"prompts_per_expert": 2, "gate_pretraining_steps": 3, "train_batch_size": 3}
SETTINGS = ["--steps", "4", *(word for item in SHORT.items() for word in ("--set", "recovery.{}={}".format(*item)))]


STEPS = """
import json, os
from mopcompress.entrypoints import train_adapter
fit = train_adapter.fit
def noted(*given, **settings):
    rows = fit(*given, **settings)
    if os.environ.get("RANK", "0") == "0":
        with open(os.environ["NOTED"], "w") as file:
            json.dump([row.nll for row in rows], file)
    return rows
train_adapter.fit = noted
from mopcompress.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_processes_train_as_one_and_the_first_alone_writes(stories, tmp_path, launcher):
    data, script = write_data(tmp_path / "data"), tmp_path / "steps.py"
    script.write_text(STEPS)
    words = ["recover", str(stories), "--data", str(data), "--device", "cpu", *SETTINGS]
    environment = os.environ | {"MOPCOMPRESS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(*before, target):
        noted = tmp_path / f"{target}.json"
        command = [sys.executable, *before, str(script), *words, "--output-dir", str(tmp_path / target)]
        done = subprocess.run(
            command, env=environment | {"NOTED": str(noted)}, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(noted.read_text()), load_file(tmp_path / target / "adapter.safetensors")

    one, alone = run(target="one")
    both, together = run("-m", *launcher, target="two")
    assert len(one) == 4
    assert both == pytest.approx(one, rel=1e-4)  # the loss of every step
    assert alone.keys() == together.keys()
    for name, weight in alone.items():
        assert_close(together[name], weight, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["processes"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache",
        "data",
        "one",
        "one.json",
        "steps.py",
        "two",
        "two.json",
    ]


SWEPT = """
import os, sys
from mopcompress.entrypoints import lr_sweep
write = lr_sweep.write_trials
def die(trials, folder):
    write(trials, folder)
    if len(trials) == 2:
        os._exit(9)
lr_sweep.write_trials = die if os.environ.get("DIE") else write
from mopcompress.cli import main
main()
"""


@pytest.mark.slow
def test_two_processes_sweep_as_one_and_go_on_after_the_trials_that_the_first_one_kept(stories, tmp_path):
    data, script = write_data(tmp_path / "data"), tmp_path / "swept.py"
    script.write_text(SWEPT)
    words = ["recover", str(stories), "--data", str(data), "--device", "cpu", *SETTINGS, "--sweep", "--json"]
    environment = os.environ | {"MOPCOMPRESS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(*before, target, **more):
        command = [sys.executable, *before, str(script), *words, "--output-dir", str(tmp_path / target)]
        # one that is killed leaves the other's account of it where it ran
        return subprocess.run(
            command, env=environment | more, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    two = ("-m", *LAUNCHERS["torchrun"])
    alone, killed = run(target="one"), run(*two, target="two", DIE="1")
    assert alone.returncode == 0, alone.stderr
    assert killed.returncode != 0
    kept = json.loads((tmp_path / ".two.unfinished" / "trials.json").read_text())
    again = run(*two, target="two")
    assert again.returncode == 0, again.stderr
    one, both = (json.loads((tmp_path / name / "manifest.json").read_text())["sweep"] for name in ("one", "two"))
    assert both["trials"][:2] == kept  # their seconds too: they were not tried again
    assert both["learning_rate"] == one["learning_rate"]
    found, expected = ([trial["validation_nats"] for trial in sweep["trials"]] for sweep in (both, one))
    assert found == pytest.approx(expected, rel=1e-3)


TAUGHT = """
import os, sys, time
from mopcompress.recover.distillation import Teacher
run = Teacher._run
def noted(self, *given):
    with open(os.environ["NOTED"], "a") as file:
        file.write(os.environ["RANK"] + "\\n")
    time.sleep(3)  # the other would not find it and run its own, if it did not wait
    return run(self, *given)
Teacher._run = noted
from mopcompress.cli import main
main()
"""


@pytest.mark.slow
def test_of_two_processes_the_first_alone_runs_the_teacher(stories, tmp_path):
    data, script, noted = write_data(tmp_path / "data"), tmp_path / "taught.py", tmp_path / "noted"
    script.write_text(TAUGHT)
    taught = ["--teacher", str(stories), "--distill", "0.5", "--output-dir", str(tmp_path / "out"), "--json"]
    words = ["recover", str(stories), "--data", str(data), "--device", "cpu", *SETTINGS, *taught]
    environment = os.environ | {"MOPCOMPRESS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"], str(script), *words]
    done = subprocess.run(
        command, env=environment | {"NOTED": str(noted)}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert noted.read_text().split() == ["0"]
