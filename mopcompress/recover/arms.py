"""The arms of the comparison, all from one start: the same prompts, grouped and gated or not."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mopcompress.recover import gate as gates
from mopcompress.recover.mixture import MixtureOfPrompts
from mopcompress.states import CachedStates


@dataclass(frozen=True, kw_only=True)
class Start:
    """How prompts and gate begin."""

    arm: str  # single: one group, no gate; mop: gated experts
    experts: int
    prompts_per_expert: int
    gate_pretraining_steps: int
    gate_temper: float
    log_opening: float
    seed: int


def begin(states: CachedStates, tasks: Sequence[str], start: Start) -> MixtureOfPrompts:
    """Prompts that begin as hidden states of training instructions, an expert's from its own domain.

    `single` gets the very same states in one group, so that arms differ in grouping and gate alone. The gate of `mop`
    is pre-trained on the domains and tempered.
    """
    generator = torch.Generator().manual_seed(start.seed)
    domains = expert_domains(states, tasks, start.experts, generator=generator)
    every = range(len(states.documents))
    groups = [
        states.some_states(
            [row for row in every if domains[row] == expert] or every, start.prompts_per_expert, generator
        )
        for expert in range(start.experts)
    ]
    prompts = torch.stack(groups)
    if start.arm == "single":
        return MixtureOfPrompts(prompts.flatten(0, 1)[None], states.layer, None, log_opening=start.log_opening)
    gate = gates.Gate(prompts.shape[-1], start.experts, generator=generator).to(states.device)
    gates.pretrain(gate, states.summaries, domains.to(states.device), steps=start.gate_pretraining_steps)
    gate.temper(start.gate_temper)
    return MixtureOfPrompts(prompts, states.layer, gate, log_opening=start.log_opening)


def expert_domains(
    states: CachedStates, tasks: Sequence[str], experts: int, *, generator: torch.Generator
) -> Int[Tensor, " documents"]:
    """Which expert each training document belongs to: its task, one to one, when there are as many; else k-means."""
    if experts == len(tasks):
        return torch.tensor([tasks.index(document.task) for document in states.documents])
    return gates.cluster(states.summaries, experts, generator=generator).cpu()
