"""The tokens that a compression is calibrated on."""

import torch
from safetensors.torch import save_file
from tiny_models import saved, tiny_model

from mopcompress.entrypoints import inputs
from mopcompress.progress import silent
from mopcompress.recipe import load_recipe
from mopcompress.storage import artifacts
from mopcompress.storage.cache import cache_folder

SAMPLED = torch.arange(16).view(2, 8)


def run_of(folder):
    source = saved(tiny_model(), folder / "model")
    settings = {"model": str(source), "device": "cpu", "num_calibration_samples": 2, "max_seq_length": 8}
    return load_recipe(None, settings).run, source


def test_two_processes_may_sample_the_same_text(tmp_path, monkeypatch):
    """The second finds the entry of the first when it is done, and reads it."""
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    run, source = run_of(tmp_path)

    def sample_after_another(*_arguments, **_settings):
        folder = cache_folder() / "calibration"
        [scratch] = folder.glob(".*partial*")
        with monkeypatch.context() as patch:
            patch.setattr(artifacts.os, "getpid", lambda: 1)
            with artifacts.publish(folder / scratch.name[1:].partition(".")[0], {}) as other:
                save_file({"tokens": SAMPLED}, other / inputs.FILE)
        return SAMPLED + 1

    monkeypatch.setattr(inputs, "sample_text", sample_after_another)
    assert torch.equal(inputs.load_calibration(run, source, "0" * 64, silent).tokens, SAMPLED)
