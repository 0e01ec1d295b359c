"""The arms that are prompts in the middle of the network, from one start: grouped and weighed or not, flowing or deep.

- `single`: all prompts in one group; a plain prompt, whatever the reading of a gate.
- `mop`: groups of prompts, the experts, weighed by a gate that reads the instruction.
- `uniform`: the experts without a gate, each of weight 1. At equal seeds it equals `single` before and after training;
  with the reading `separate` it does not, and says how much of `mop` is the gate.
- `oracle`: all weight on the expert of the example's true task. No gate is trained, and none can tell tasks better.
- `shuffled`: `mop`, but the gate reads another example (see `weighing.by_another`): what a gate does without sense.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.recover.adapter import AdapterConfig, AdapterInit


def first_prompts(
    states: HiddenStateDataset, domains: Int[Tensor, " documents"], config: AdapterConfig, *, generator: torch.Generator
) -> Float[Tensor, "groups prompts hidden"]:
    """States at random instruction positions, each expert's of its own domain's documents, a shared one's of all."""
    every = range(len(states.documents))
    groups = [
        states.sample_states(
            [row for row in every if domains[row] == expert] or every, config.prompts_per_expert, generator
        )
        for expert in range(config.experts)
    ]
    if config.shared_expert:
        groups.append(states.sample_states(every, config.prompts_per_expert, generator))
    return torch.stack(groups)


def expert_domains(
    states: HiddenStateDataset, tasks: Sequence[str], experts: int, *, generator: torch.Generator
) -> Int[Tensor, " documents"]:
    """Which expert each training document belongs to: its task, one to one, when there are as many; else k-means."""
    if experts == len(tasks):
        return torch.tensor([tasks.index(document.task) for document in states.documents])
    return kmeans(states.summaries, experts, generator=generator).cpu()


def sample_token_embeddings(
    states: HiddenStateDataset, count: int, start: AdapterInit
) -> Float[Tensor, "count hidden"]:
    """Embeddings of tokens at random places in training instructions."""
    generator = torch.Generator().manual_seed(start.seed)
    return states.sample_states(range(len(states.documents)), count, generator)


def kmeans(
    summaries: Float[Tensor, "documents hidden"], clusters: int, *, generator: torch.Generator, rounds: int = 50
) -> Int[Tensor, " documents"]:
    """k-means on standardised summaries: the experts' domains when there are not as many tasks as experts.

    Seeds are spread by k-means++ (Arthur and Vassilvitskii, 2007); an emptied cluster keeps its old centre.
    """
    points = (summaries - summaries.mean(0)) / summaries.std(0, correction=0).clamp_min(1e-6)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < clusters:
        nearest = torch.cdist(points, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, points[torch.multinomial(nearest.cpu(), 1, generator=generator)]])
    for _ in range(rounds):
        owner = torch.cdist(points, centres).argmin(1)
        for index in owner.unique():
            centres[index] = points[owner == index].mean(0)
    return torch.cdist(points, centres).argmin(1)
