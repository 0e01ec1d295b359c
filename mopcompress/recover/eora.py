"""EoRA (Liu et al., arXiv 2410.21271) as an arm: LoRA's shape, filled in closed form instead of trained.

The factors are those that bring each linear nearest to the dense model's own weight, for the inputs that it gets from
the training rows in the compressed network. Nothing is trained, so it says what the steps of the other arms are worth.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mopcompress.eora import eora
from mopcompress.errors import DataError
from mopcompress.gram import InputGram
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.linears import Linear, weight_of
from mopcompress.models.repair import repair_of
from mopcompress.recover import lora
from mopcompress.recover.adapter import AdapterConfig
from mopcompress.recover.changes import Changes
from mopcompress.recover.start import Material, Start
from mopcompress.states import CachedStates, batches_by_length

ROWS = 16  # documents that run at once


def begin(config: AdapterConfig, material: Material, start: Start) -> Changes:
    """The finished repair; where nothing is missing it is zero.

    Raises `DataError` without a dense model of the same shape, and for a model that has a repair already.
    """
    if material.dense is None:
        raise DataError("arm eora: no dense model to come near to; give --teacher")
    model, adapter = material.model, lora.build(material.model, config)
    linears = {name: model.network.get_submodule(name) for name in adapter.by_name()}
    for name, linear in linears.items():
        if repair_of(linear) is not None:
            raise DataError(f"arm eora: {name} has a low-rank repair already; prune without --repair-rank, or use lora")
    grams = grams_of(model, material.states, linears)
    for name, change in adapter.by_name().items():
        assert isinstance(change, lora.LowRank)  # for mypy: it was built as one
        linear = linears[name]
        assert isinstance(linear, nn.Linear | Conv1D)  # for mypy: changes stand beside linears
        dense = material.dense(name)
        if dense.shape != weight_of(linear).shape:
            raise DataError(
                f"arm eora: {name} is {tuple(weight_of(linear).shape)}, in the dense model {tuple(dense.shape)}; "
                "name the model that this one was made from by --teacher"
            )
        up, down = eora(dense.to(model.device).float(), weight_of(linear).float(), grams[name], rank=len(change.down))
        with torch.no_grad():
            change.up.copy_(up)
            change.down.copy_(down)
    return adapter


@torch.inference_mode()
def grams_of(
    model: LanguageModel, states: CachedStates, linears: Mapping[str, Linear | nn.Module]
) -> dict[str, Float[Tensor, "inputs inputs"]]:
    """Of each linear's inputs: the mean of x xᵀ over the tokens of all documents, padding left out."""
    grams = {name: InputGram() for name in linears}
    real = torch.zeros(0)

    def hook(name: str) -> "nn.modules.module.RemovableHandle":  # type: ignore[name-defined]
        def note(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            grams[name].update(inputs[0].flatten(0, -2)[real])

        return linears[name].register_forward_pre_hook(note)

    handles = [hook(name) for name in linears]
    try:
        for chosen in batches_by_length(states.documents, ROWS, generator=None):
            batch = states.batch(chosen)
            lengths = torch.tensor([len(states.documents[row].tokens) for row in chosen])
            real = (torch.arange(batch.hidden.shape[1]) < lengths[:, None]).flatten().to(model.device)
            model.resume(batch.hidden, states.layer)
    finally:
        for handle in handles:
            handle.remove()
    return {name: gram.mean() for name, gram in grams.items()}
