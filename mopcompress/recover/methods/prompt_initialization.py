"""The arms that are prompts in the middle of the network, from one start: grouped and weighed or not, flowing or deep.

- `single`: all prompts in one group; a plain prompt, whatever the reading of a gate.
- `mop`: groups of prompts, the experts, weighed by a gate that reads the instruction.
- `uniform`: the experts without a gate, each of weight 1. At equal seeds it equals `single` before and after training;
  with the reading `separate` it does not, and says how much of `mop` is the gate.
- `oracle`: all weight on the expert of the example's true task. No gate is trained, and none can tell tasks better.
- `shuffled`: `mop`, but the gate reads another example (see `weighing.by_another`): what a gate does without sense.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mopcompress.errors import UsageError
from mopcompress.evaluation.hidden_states import CachedStates
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import AdapterConfig, trained_parameters
from mopcompress.recover.methods import gate as gates
from mopcompress.recover.methods.expert_weights import Mixing, Weighing, by_another, by_task
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.recover.start import Material, Start

GATED = ("mop", "shuffled")


def build(model: LanguageModel, config: AdapterConfig) -> MixtureOfPrompts:
    """Groups of prompts, and a gate for the arms that have one; equally many prompts in all of them.

    Raises `DataError` for some families, `UsageError` when the oracle has no tasks to go by.
    """
    model.check_promptable()
    if config.arm == "oracle" and not config.tasks:
        raise UsageError(
            f"arm oracle: {config.experts} experts are not one for each task of the data; leave --experts out, or the "
            "arm where rows name no tasks"
        )
    prompts = torch.zeros(config.groups, config.prompts_per_expert, config.hidden_size)
    gate = gates.Gate(config.hidden_size, config.experts) if config.arm in GATED else None
    if config.arm == "single":
        return _built(MixtureOfPrompts(prompts.flatten(0, 1)[None], config.layer, None), model, config)
    weighings: dict[str, Weighing] = {"oracle": partial(by_task, tuple(config.tasks)), "shuffled": by_another}
    mixing = Mixing(
        weighing=weighings.get(config.arm),
        reading=config.gate_reading,
        shared=config.shared_expert,
        top_k=None if config.arm == "uniform" else config.top_k,
    )
    return _built(MixtureOfPrompts(prompts, config.layer, gate, mixing=mixing), model, config)


def _built(mixture: MixtureOfPrompts, model: LanguageModel, config: AdapterConfig) -> MixtureOfPrompts:
    mixture = mixture.to(model.device)
    if config.deep:
        mixture.to(model.network.dtype).deepen(model)
        mixture.float()
    return mixture


def begin(config: AdapterConfig, material: Material, start: Start) -> MixtureOfPrompts:
    """Prompts that begin as hidden states of training instructions, an expert's from its own domain.

    Every arm gets the very same states, so that arms differ in grouping and gate alone. A gate is pre-trained on the
    domains and tempered. A deep mixture begins as what these prompts are in every layer.
    """
    states = material.states
    mixture = build(material.model, replace(config, deep=False))
    generator = torch.Generator().manual_seed(start.seed)
    domains = expert_domains(states, config.tasks, config.experts, generator=generator)
    groups = first_prompts(states, domains, config, generator=generator)
    with torch.no_grad():
        mixture.prompts.copy_(groups.view_as(mixture.prompts))
        mixture.log_opening.fill_(start.log_opening)
    if mixture.gate is not None:
        mixture.gate.draw(generator)
        gates.pretrain(mixture.gate, states.summaries, domains.to(states.device), steps=start.gate_pretraining_steps)
        mixture.gate.temper(start.gate_temper)
    if config.deep:
        mixture.deepen(material.model)
    return mixture


def budget(model: LanguageModel, config: AdapterConfig) -> int:
    """How many numbers `mop` trains with these settings, its gate included, a deep one's layers not.

    It is what rivals may train too. Raises `DataError` for families that can have no `mop`.
    """
    return trained_parameters(build(model, replace(config, arm="mop", deep=False)))


def first_prompts(
    states: CachedStates, domains: Int[Tensor, " documents"], config: AdapterConfig, *, generator: torch.Generator
) -> Float[Tensor, "groups prompts hidden"]:
    """States at random instruction positions, each expert's of its own domain's documents, a shared one's of all."""
    every = range(len(states.documents))
    groups = [
        states.some_states(
            [row for row in every if domains[row] == expert] or every, config.prompts_per_expert, generator
        )
        for expert in range(config.experts)
    ]
    if config.shared_expert:
        groups.append(states.some_states(every, config.prompts_per_expert, generator))
    return torch.stack(groups)


def expert_domains(
    states: CachedStates, tasks: Sequence[str], experts: int, *, generator: torch.Generator
) -> Int[Tensor, " documents"]:
    """Which expert each training document belongs to: its task, one to one, when there are as many; else k-means."""
    if experts == len(tasks):
        return torch.tensor([tasks.index(document.task) for document in states.documents])
    return gates.cluster(states.summaries, experts, generator=generator).cpu()
