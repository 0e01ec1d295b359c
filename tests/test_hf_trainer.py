"""transformers' Trainer trains the adapter, and nothing else."""

from pathlib import Path

import pytest
import torch
from test_hf_model import batch_of, made
from tiny import random_documents
from transformers import Trainer, TrainingArguments

DOCUMENTS = random_documents(16)


@pytest.mark.parametrize("side", ["left", "right"])
def test_trainer_trains_the_adapter_alone(side: str, tmp_path: Path) -> None:
    model = made()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(DOCUMENTS),
        data_collator=lambda documents: batch_of(documents, side=side),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    optimised = {id(one) for group in trainer.optimizer.param_groups for one in group["params"]}
    assert optimised == {id(one) for one in model.adapter.parameters()}
    changed = {name for name, one in model.state_dict().items() if not torch.equal(one, before[name])}
    assert changed == {f"adapter.{name}" for name, _ in model.adapter.named_parameters()}
    assert not model.network.training
