"""The arms that are prompts in the middle of the network, all from one start: grouped and gated, or not."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mopcompress.models.language_model import LanguageModel
from mopcompress.recover import gate as gates
from mopcompress.recover.adapter import AdapterConfig
from mopcompress.recover.mixture import MixtureOfPrompts
from mopcompress.recover.start import Material, Start
from mopcompress.states import CachedStates


def build(model: LanguageModel, config: AdapterConfig) -> MixtureOfPrompts:
    """`mop`: experts and a gate; `single`: as many prompts in one group. Raises `DataError` for some families."""
    model.check_promptable()
    gated = config.arm == "mop"
    groups = config.experts if gated else 1
    prompts = torch.zeros(groups, config.experts * config.prompts_per_expert // groups, config.hidden_size)
    gate = gates.Gate(config.hidden_size, config.experts) if gated else None
    return MixtureOfPrompts(prompts, config.layer, gate).to(model.device)


def begin(config: AdapterConfig, material: Material, start: Start) -> MixtureOfPrompts:
    """Prompts that begin as hidden states of training instructions, an expert's from its own domain.

    `single` gets the very same states in one group, so that arms differ in grouping and gate alone. The gate of `mop`
    is pre-trained on the domains and tempered.
    """
    states = material.states
    mixture = build(material.model, config)
    generator = torch.Generator().manual_seed(start.seed)
    domains = expert_domains(states, material.tasks, config.experts, generator=generator)
    every = range(len(states.documents))
    groups = [
        states.some_states(
            [row for row in every if domains[row] == expert] or every, config.prompts_per_expert, generator
        )
        for expert in range(config.experts)
    ]
    with torch.no_grad():
        mixture.prompts.copy_(torch.stack(groups).view_as(mixture.prompts))
        mixture.log_opening.fill_(start.log_opening)
    if mixture.gate is not None:
        mixture.gate.draw(generator)
        gates.pretrain(mixture.gate, states.summaries, domains.to(states.device), steps=start.gate_pretraining_steps)
        mixture.gate.temper(start.gate_temper)
    return mixture


def expert_domains(
    states: CachedStates, tasks: Sequence[str], experts: int, *, generator: torch.Generator
) -> Int[Tensor, " documents"]:
    """Which expert each training document belongs to: its task, one to one, when there are as many; else k-means."""
    if experts == len(tasks):
        return torch.tensor([tasks.index(document.task) for document in states.documents])
    return gates.cluster(states.summaries, experts, generator=generator).cpu()
