"""Several processes train as one does."""

import json
import os
import subprocess
import sys

import pytest
from invoking import write_data
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
SETTINGS = ["--steps", "4", "--prompts-per-expert", "2", "--gate-pretraining-steps", "3", "--rows-per-step", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_processes_train_as_one_and_the_first_alone_writes(stories, tmp_path, launcher):
    data = write_data(tmp_path / "data")
    words = ["mopcompress", "recover", "--model", str(stories), "--data", str(data), "--device", "cpu", *SETTINGS]
    environment = os.environ | {"MOPCOMPRESS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(*before, target):
        command = [sys.executable, "-m", *before, *words, "--json", "--output-dir", str(tmp_path / target)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), load_file(tmp_path / target / "adapter.safetensors")

    one, alone = run(target="one")
    both, together = run(*launcher, "-m", target="two")
    assert both["final_nats"] == pytest.approx(one["final_nats"], rel=1e-4)
    assert alone.keys() == together.keys()
    for name, weight in alone.items():
        assert_close(together[name], weight, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["processes"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data", "one", "two"]
