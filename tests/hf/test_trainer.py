"""transformers' Trainer trains the adapter, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import perturbed_adapter
from recovered_models import LAYER, labelled_batch
from tiny_models import random_documents, tiny_model
from transformers import Trainer, TrainingArguments

from mopcompress.errors import DataError
from mopcompress.hf import MopForCausalLM

DOCUMENTS = random_documents(16)
LEARNING_RATES = {"mop": 0.1, "smop": 0.1, "lora": 0.03, "mop+": 0.03}


def untrained_model(arm: str) -> MopForCausalLM:
    model = tiny_model()
    return MopForCausalLM.from_parts(model, *perturbed_adapter(arm, model, layer=LAYER))


def trainer_of(arm: str, folder: Path, *, side: str = "left", **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "learning_rate": LEARNING_RATES[arm],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=untrained_model(arm),
        args=TrainingArguments(output_dir=str(folder), **settings | changes),
        train_dataset=list(DOCUMENTS),
        data_collator=lambda documents: labelled_batch(documents, side=side),
    )


def losses_of(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(("side", "arm"), [("right", "mop"), *(("left", arm) for arm in LEARNING_RATES)])
def test_trainer_trains_the_adapter_alone(side: str, arm: str, tmp_path: Path) -> None:
    trainer = trainer_of(arm, tmp_path, side=side, max_steps=20, per_device_train_batch_size=8)
    model = trainer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train()
    losses = losses_of(trainer)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    optimized = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert optimized == {id(weight) for weight in model.adapter.parameters()}
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {f"adapter.{name}" for name, _ in model.adapter.named_parameters()}
    network = model.network.state_dict()
    assert all(torch.equal(weight, before[f"network.{name}"]) for name, weight in network.items())
    assert not model.network.training


@pytest.mark.parametrize("arm", ["mop", "lora", "mop+"])  # not smop, which draws noise in each part
def test_accumulated_gradients_are_those_of_a_whole_batch(arm: str, tmp_path: Path) -> None:
    whole = trainer_of(arm, tmp_path, max_steps=3, per_device_train_batch_size=8)
    parts = trainer_of(arm, tmp_path, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for trainer in (whole, parts):
        trainer.train()
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-4)


@pytest.mark.parametrize(("arm", "shard"), [("mop", "20KB"), *((arm, "5GB") for arm in LEARNING_RATES)])
def test_a_resumed_training_ends_at_the_same_weights(
    arm: str, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one file of weights, and from several."""
    save = MopForCausalLM.save_pretrained
    monkeypatch.setattr(
        MopForCausalLM, "save_pretrained", lambda *args, **kwargs: save(*args, **kwargs, max_shard_size=shard)
    )
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = trainer_of(arm, tmp_path, save_strategy="steps", save_steps=2, **settings)
    whole.train()
    assert len(list((tmp_path / "checkpoint-2").glob("model*.safetensors"))) > (shard == "20KB")
    again = trainer_of(arm, tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(losses_of(again)) == 4
    expected, resumed = whole.model.state_dict(), again.model.state_dict()
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
    last = MopForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(last[name], tensor) for name, tensor in expected.items())


def test_a_trainer_that_removes_the_labels_raises(tmp_path: Path) -> None:
    """Without them the gate would read the response."""
    with pytest.raises(DataError, match="label smoothing"):
        trainer_of("mop", tmp_path, max_steps=1, label_smoothing_factor=0.1).train()
