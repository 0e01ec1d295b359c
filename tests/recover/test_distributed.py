"""Several processes train as a single one does."""

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
def record(*arguments, **settings):
    rows = fit(*arguments, **settings)
    if os.environ.get("RANK", "0") == "0":
        with open(os.environ["RECORD"], "w") as file:
            json.dump([row.nll for row in rows], file)
    return rows
train_adapter.fit = record
from mopcompress.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_processes_train_as_one_and_only_the_first_writes(stories, tmp_path, launcher):
    data, script = write_data(tmp_path / "data"), tmp_path / "steps.py"
    script.write_text(STEPS)
    words = ["recover", str(stories), "--data", str(data), "--device", "cpu", *SETTINGS]
    environment = os.environ | {"MOPCOMPRESS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def train(*launcher, target):
        record = tmp_path / f"{target}.json"
        command = [sys.executable, *launcher, str(script), *words, "--output-dir", str(tmp_path / target)]
        variables = environment | {"RECORD": str(record)}
        run = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return json.loads(record.read_text()), load_file(tmp_path / target / "adapter.safetensors")

    losses, alone = train(target="one")
    losses_of_two, together = train("-m", *launcher, target="two")
    assert len(losses) == 4
    assert losses_of_two == pytest.approx(losses, rel=1e-4)
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
def test_two_processes_sweep_as_one_and_resume_after_its_trials(stories, tmp_path):
    data, script = write_data(tmp_path / "data"), tmp_path / "swept.py"
    script.write_text(SWEPT)
    words = ["recover", str(stories), "--data", str(data), "--device", "cpu", *SETTINGS, "--sweep", "--json"]
    environment = os.environ | {"MOPCOMPRESS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(*launcher, target, **variables):
        command = [sys.executable, *launcher, str(script), *words, "--output-dir", str(tmp_path / target)]
        # after a kill the launcher writes a report to the working folder
        return subprocess.run(
            command, env=environment | variables, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    two = ("-m", *LAUNCHERS["torchrun"])
    alone, killed = run(target="one"), run(*two, target="two", DIE="1")
    assert alone.returncode == 0, alone.stderr
    assert killed.returncode != 0
    trials = json.loads((tmp_path / ".two.unfinished" / "trials.json").read_text())
    resumed = run(*two, target="two")
    assert resumed.returncode == 0, resumed.stderr
    of_one, of_two = (json.loads((tmp_path / name / "manifest.json").read_text())["sweep"] for name in ("one", "two"))
    assert of_two["trials"][:2] == trials  # with their seconds: they were not repeated
    assert of_two["learning_rate"] == of_one["learning_rate"]
    losses, expected = ([trial["validation_nats"] for trial in sweep["trials"]] for sweep in (of_two, of_one))
    assert losses == pytest.approx(expected, rel=1e-3)


TAUGHT = """
import os, sys, time
from mopcompress.recover.distillation import Teacher
run = Teacher._run
def record(self, *arguments):
    with open(os.environ["RECORD"], "a") as file:
        file.write(os.environ["RANK"] + "\\n")
    time.sleep(3)  # the other process would run its own teacher, if it did not wait for this one
    return run(self, *arguments)
Teacher._run = record
from mopcompress.cli import main
main()
"""


@pytest.mark.slow
def test_only_the_first_of_two_processes_runs_the_teacher(stories, tmp_path):
    data, script, record = write_data(tmp_path / "data"), tmp_path / "taught.py", tmp_path / "record"
    script.write_text(TAUGHT)
    taught = ["--teacher", str(stories), "--distill", "0.5", "--output-dir", str(tmp_path / "out"), "--json"]
    words = ["recover", str(stories), "--data", str(data), "--device", "cpu", *SETTINGS, *taught]
    environment = os.environ | {"MOPCOMPRESS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"], str(script), *words]
    variables = environment | {"RECORD": str(record)}
    run = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert record.read_text().split() == ["0"]
