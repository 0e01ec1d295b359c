import json
import shutil

import pytest
import torch
from cli_runner import invoke, write_data
from factories import on_progress
from safetensors.torch import save_file
from tiny_models import random_documents, saved, tiny_model

from mopcompress.entrypoints.teacher import build_distillation, dense_folder
from mopcompress.errors import DataError, InputNotFoundError
from mopcompress.models.model_loading import OpenedModel, weights_hash
from mopcompress.progress import silent
from mopcompress.recipe import PromptRecoveryModifier

DOCUMENTS = random_documents(9)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))


def test_the_teacher_follows_the_recipe_and_has_our_tokens(tiny_llama, tmp_path):
    folder = saved(tiny_model(seed=1), tmp_path / "teacher")
    modifier = PromptRecoveryModifier(distill=0.25, distill_temperature=2.5, squarehead=3.0, teacher=str(folder))
    base, updates = OpenedModel(tmp_path, tiny_llama), []
    progress = on_progress(lambda *update: updates.append(update))
    built = build_distillation(modifier, base, DOCUMENTS, 4, progress)
    assert (built.fraction, built.squarehead_weight, built.teacher.temperature) == (0.25, 3.0, 2.5)
    assert updates[-1][1:] == (len(DOCUMENTS), len(DOCUMENTS))
    undistilled = PromptRecoveryModifier(teacher=str(folder))
    assert build_distillation(undistilled, base, DOCUMENTS, 4, silent) is None
    other = tiny_model()
    other.tokenizer.add_tokens(["another"])
    with pytest.raises(DataError, match=r"its tokens are not those of .* recovery.teacher"):
        build_distillation(modifier, OpenedModel(tmp_path, other), DOCUMENTS, 4, silent)
    padded = tiny_model(vocab_size=tiny_llama.config.vocab_size + 8)
    with pytest.raises(DataError, match=r"scores \d+ tokens, padding included, and .* recovery.teacher"):
        build_distillation(modifier, OpenedModel(tmp_path, padded), DOCUMENTS, 4, silent)


def model_folder(path, base=None):
    """Write a folder with weights, and a manifest that names its base model."""
    path.mkdir()
    save_file({"weight": torch.randn(2, 2)}, path / "model.safetensors")
    if base is not None:
        manifest = {"base": {"folder": str(base), "sha256": weights_hash(base)}}
        (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_the_teacher_is_the_dense_model_at_the_start(tmp_path):
    dense = model_folder(tmp_path / "dense")
    pruned = model_folder(tmp_path / "pruned", dense)
    assert dense_folder(pruned) == dense
    assert dense_folder(model_folder(tmp_path / "rounded", pruned)) == dense


def test_a_missing_or_changed_teacher_is_refused(tmp_path):
    dense = model_folder(tmp_path / "dense")
    pruned = model_folder(tmp_path / "pruned", dense)
    with pytest.raises(InputNotFoundError, match=r"name one by recovery.teacher"):
        dense_folder(dense)
    save_file({"weight": torch.zeros(2, 2)}, dense / "model.safetensors")
    with pytest.raises(DataError, match=r"has weights .* was made from"):
        dense_folder(pruned)
    shutil.rmtree(dense)
    with pytest.raises(InputNotFoundError, match="is not there"):
        dense_folder(pruned)


def test_recover_distils_from_the_named_teacher(stories, tmp_path):
    data = write_data(tmp_path / "data")
    final_nats = {}
    for fraction in (0, 1):
        target = tmp_path / f"adapter-{fraction}"
        taught = ["--distill", fraction, "--teacher", stories] if fraction else []
        flags = [*taught, "--arm", "single", "--steps", 3]
        outcome = invoke("recover", stories, "--data", data, "--output-dir", target, *flags)
        assert outcome.code == 0, outcome.err
        final_nats[fraction] = json.loads((target / "manifest.json").read_text())["final_nats"]
    assert final_nats[0] != final_nats[1]
    outcome = invoke("recover", stories, "--data", data, "--output-dir", tmp_path / "none", "--distill", 1)
    assert outcome.code == 66
    assert "recovery.teacher" in outcome.err
