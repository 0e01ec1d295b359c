"""First values of prompts, and the domain of each expert.

First prompts are hidden states of training instructions at the injection layer, or token embeddings at layer 0. They
have the right scale: N(0, 0.02) is wrong mid-network. An expert's prompts come from the documents of its own domain.
Domains are the tasks, one to one, when there are as many tasks as experts. Otherwise k-means on the mean instruction
states finds them.
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
    """Return states at random instruction positions, for each expert from its own domain's documents.

    A shared expert, and an expert whose domain is empty, draws from all documents.
    """
    all_rows = range(len(states.documents))
    groups = [
        states.sample_states(
            [row for row in all_rows if domains[row] == expert] or all_rows, config.prompts_per_expert, generator
        )
        for expert in range(config.experts)
    ]
    if config.shared_expert:
        groups.append(states.sample_states(all_rows, config.prompts_per_expert, generator))
    return torch.stack(groups)


def expert_domains(
    states: HiddenStateDataset, tasks: Sequence[str], experts: int, *, generator: torch.Generator
) -> Int[Tensor, " documents"]:
    """Return the expert of each training document: that of its task when there are as many, else its cluster."""
    if experts == len(tasks):
        return torch.tensor([tasks.index(document.task) for document in states.documents])
    return kmeans(states.means, experts, generator=generator).cpu()


def sample_token_embeddings(states: HiddenStateDataset, count: int, init: AdapterInit) -> Float[Tensor, "count hidden"]:
    """Return embeddings of tokens at random positions in training instructions; `states` are those of layer 0."""
    generator = torch.Generator().manual_seed(init.seed)
    return states.sample_states(range(len(states.documents)), count, generator)


def kmeans(
    means: Float[Tensor, "documents hidden"], clusters: int, *, generator: torch.Generator, rounds: int = 50
) -> Int[Tensor, " documents"]:
    """Cluster standardized means by k-means and return the cluster of each document.

    Seeds are spread by k-means++ (Arthur and Vassilvitskii, 2007); an emptied cluster keeps its old centre.
    """
    points = (means - means.mean(0)) / means.std(0, correction=0).clamp_min(1e-6)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < clusters:
        squared_distance = torch.cdist(points, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, points[torch.multinomial(squared_distance.cpu(), 1, generator=generator)]])
    for _ in range(rounds):
        owner = torch.cdist(points, centres).argmin(1)
        for index in owner.unique():
            centres[index] = points[owner == index].mean(0)
    return torch.cdist(points, centres).argmin(1)
