"""Objects that many tests need, made with as little as possible."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_documents, tiny_model
from torch import Tensor

from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import set_weight, weight_of
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.adapter import Adapter, AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.save_and_load import load_adapter, save_adapter
from mopcompress.recover.training import TrainingConfig
from mopcompress.storage import artifacts

TASKS = ("add", "sort", "tell")  # of `random_documents`


@dataclass(frozen=True)
class ProgressCalls:
    """A `Progress` that calls `act(what, done, total)`; messages have 0 of 0."""

    act: Callable[[str, int, int], object]

    def message(self, text: str) -> None:
        self.act(text, 0, 0)

    def update(self, what: str, done: int, total: int) -> None:
        self.act(what, done, total)


def on_progress(act: Callable[[str, int, int], object]) -> ProgressCalls:
    """Return a receiver of progress that calls `act` for messages and counts alike."""
    return ProgressCalls(act)


def training_config(**changes: Any) -> TrainingConfig:
    """Return the settings of a short training with all gradients clipped to norm 1."""
    settings = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 0.1,
        "gate_learning_rate": 1e-2,
        "warmup_fraction": 0.1,
        "max_grad_norm": 1.0,
        "grad_clip_percentile": 100.0,
        "clip_gate_separately": True,
        "seed": 0,
    }
    return TrainingConfig(**settings | changes)


def adapter_config(arm: str, model: LanguageModel, **changes: Any) -> AdapterConfig:
    """Return the config of an adapter with three experts of two prompts, at layer 0."""
    settings: dict[str, Any] = {
        "arm": arm,
        "experts": len(TASKS),
        "prompts_per_expert": 2,
        "layer": 0,
        "hidden_size": model.hidden_size,
        "base_sha256": "",
        "tasks": TASKS,
    }
    return AdapterConfig(**settings | changes)


def adapter_init(**changes: Any) -> AdapterInit:
    """Return first values for which five steps of gate pre-training are enough."""
    settings = {"gate_pretraining_steps": 5, "gate_logit_scale": 3.0, "prompt_log_weight": -1.0, "seed": 0}
    return AdapterInit(**settings | changes)


def initialized_adapter(
    arm: str, model: LanguageModel, states: HiddenStateDataset, *, init: AdapterInit | None = None, **changes: Any
) -> tuple[Adapter, AdapterConfig]:
    """Return an adapter before its first step, at the layer of `states`, and its config.

    The dense weights that some arms read are the model's own.
    """
    config = adapter_config(arm, model, **{"layer": states.layer} | changes)

    def dense_weight(name: str) -> torch.Tensor:
        return weight_of(model.network.get_submodule(name))

    inputs = AdapterInputs(model, states, tuple(config.tasks), dense_weight)
    return RECOVERY_METHODS[arm].initialize(config, inputs, init or adapter_init()), config


def perturbed_adapter(
    arm: str, model: LanguageModel, *, layer: int = 2, scale: float = 0.1, seed: int = 0, **changes: Any
) -> tuple[Adapter, AdapterConfig]:
    """Return an adapter like a trained one: initialized, and moved away from doing nothing by noise of `scale`."""
    layer = 0 if ARM_DEFAULTS[arm].at_input else layer
    states = HiddenStateDataset(model, random_documents(9, tasks=TASKS), layer, batch_size=4)
    init = adapter_init(gate_pretraining_steps=3, prompt_log_weight=1.0)
    adapter, config = initialized_adapter(arm, model, states, init=init, **{"prompts_per_expert": 8} | changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return adapter, config


def response_nll(
    model: LanguageModel, states: HiddenStateDataset, adapter: Adapter | None = None, *, compiled: bool = False
) -> Tensor:
    """Return the NLL in nats of every response token, document after document, with an adapter or without."""
    batch = states.batch(range(len(states.documents)))
    if adapter is None:
        context: Any = nullcontext()
    elif compiled:
        context = adapter.compile_for_inference(model)(batch.instructions)
    else:
        context = adapter.active(model, batch.instructions)
    with context:
        return score_responses(model, batch, states.layer).nll


def saved_and_loaded(
    adapter: Adapter, config: AdapterConfig, model: LanguageModel, folder: Path
) -> tuple[Adapter, AdapterConfig]:
    """Write an adapter to `folder`, and return what is loaded from there."""
    with artifacts.publish(folder, {}) as scratch:
        save_adapter(adapter, config, scratch)
    return load_adapter(folder, model, base_sha256=config.base_sha256)


def pairwise(families: Sequence[str], arms: Sequence[str]) -> list[Any]:
    """Return all pairs of a family and an arm for `parametrize`.

    Every arm on llama, and every family with `mop` and `lora`, run always; the other pairs are marked slow.
    """
    return [
        pytest.param(family, arm, marks=() if family == "llama" or arm in ("mop", "lora") else pytest.mark.slow)
        for family in families
        for arm in arms
    ]


def pruned_model(family: str = "llama") -> LanguageModel:
    """Return a tiny model with a random half of every block's weights at zero."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    for module in model.blocks.modules():
        if hasattr(module, "weight") and module.weight.ndim == 2:
            weight = weight_of(module)
            set_weight(module, weight * (torch.rand(weight.shape, generator=generator) < 0.5), None)
    return model


def slow_except_llama(families: Sequence[str]) -> list[Any]:
    """Return families for `parametrize` of an arm's tests, all but llama marked slow."""
    return [pytest.param(family, marks=() if family == "llama" else pytest.mark.slow) for family in families]
