"""EoRA as an arm: LoRA's adapter, untrained, but the best of its rank in closed form (Liu et al., arXiv 2410.21271).

For each linear, B A brings the outputs of the compressed weight nearest to those of the dense one, on the linear's
inputs in the compressed model. These come from the training rows, instructions and responses. So the arm shows the
worth of a rank without a gradient step. A repair that `prune` or `quantize` added counts as part of the weight.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.algorithms.eora import eora
from mopcompress.algorithms.gram import InputGram
from mopcompress.data.encoding import Document
from mopcompress.errors import DataError, NumericalError, UsageError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, forward_hooks, weight_of
from mopcompress.models.repair import repair_of
from mopcompress.recover.adapter import Adapter, AdapterConfig, AdapterInit, AdapterInputs, DenseWeights
from mopcompress.recover.methods import lora
from mopcompress.recover.methods.module_patches import PatchedModules

_TOKENS = 2048  # tokens per forward pass, about


@torch.no_grad()
def initialize(config: AdapterConfig, inputs: AdapterInputs, _init: AdapterInit) -> PatchedModules:
    """Return the finished adapter. Nothing is random, and updates of weights that are still dense are zero.

    Costs a forward pass over all training rows, and memory for the dense weight and the Gram matrix of every patched
    linear. Raises `UsageError` without dense weights, `DataError` when they are those of another network.
    """
    model, dense_weights = inputs.model, inputs.dense_weights
    if dense_weights is None:
        raise UsageError(
            f"arm {config.arm}: made from the dense model's weights, and none are known; give recovery.teacher"
        )
    adapter = lora.build(model, config)
    patches = adapter.patches_by_name()
    linears = {name: model.network.get_submodule(name) for name in patches}
    pairs = {name: _dense_and_compressed(name, linear, dense_weights) for name, linear in linears.items()}
    compressed = {name: linears[name] for name, pair in pairs.items() if not torch.equal(*pair)}
    grams = input_grams(model, inputs.states, compressed) if compressed else {}
    for name, gram in grams.items():
        patch = patches[name]
        assert isinstance(patch, lora.LoRAUpdate)  # for mypy: a ModuleDict forgets the type of its modules
        up, down = eora(*pairs[name], gram, rank=len(patch.down))
        patch.up.copy_(up)
        patch.down.copy_(down)
    return adapter


def input_grams(
    model: LanguageModel, states: HiddenStateDataset, linears: Mapping[str, nn.Module]
) -> dict[str, Float[Tensor, "_ _"]]:
    """Return the mean x xᵀ of each linear's inputs over all tokens of the documents.

    A linear that no token reaches is left out.
    """
    grams: defaultdict[str, InputGram] = defaultdict(InputGram)

    def update_gram(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            try:
                grams[name].update(inputs[0].flatten(0, -2))
            except NumericalError as error:
                raise NumericalError(f"{name}, on the training rows: {error}") from error

        return hook

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.enter_context(forward_hooks([linear], update_gram(name), pre=True))
        for rows in _equal_length_batches(states.documents):
            model.run_upper(states.batch(rows).hidden, states.layer)
    return {name: gram.mean() for name, gram in grams.items()}


def _equal_length_batches(documents: Sequence[Document]) -> list[list[int]]:
    """Return rows in batches without padding, which a Gram matrix would count."""
    rows_by_length: defaultdict[int, list[int]] = defaultdict(list)
    for row, document in enumerate(documents):
        rows_by_length[len(document.tokens)].append(row)
    batches = []
    for length, rows in rows_by_length.items():
        batch_size = max(1, _TOKENS // length)
        batches += [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return batches


def check_dense_shapes(adapter: Adapter, model: LanguageModel, dense_weights: DenseWeights | None) -> None:
    """Raise `DataError` when a linear that the adapter patches has another shape in the dense model."""
    if dense_weights is not None and isinstance(adapter, PatchedModules):
        for name in adapter.patches_by_name():
            _check_shapes(name, dense_weights(name), weight_of(model.network.get_submodule(name)))


def _dense_and_compressed(
    name: str, linear: Linear, dense_weights: DenseWeights
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
    """Return a linear's dense weight, and the one that it computes with, its repair included."""
    dense_weight, weight, repair = dense_weights(name), weight_of(linear), repair_of(linear)
    _check_shapes(name, dense_weight, weight)
    return dense_weight, weight if repair is None else weight + repair.up @ repair.down


def _check_shapes(name: str, dense_weight: Tensor, weight: Tensor) -> None:
    if dense_weight.shape != weight.shape:
        raise DataError(
            f"{name} is {len(weight)} x {weight.shape[1]}, and {len(dense_weight)} x {dense_weight.shape[1]} in the "
            "dense model, which must have the same widths; use another arm, or name the right recovery.teacher"
        )
