"""EoRA as an arm: LoRA's adapter, untrained, but the best of its rank in closed form (Liu et al., arXiv 2410.21271).

For each linear, B A brings the outputs of the compressed weight nearest to those of the dense one, on the inputs that
the training rows, instructions and responses, have there in the compressed model. So it says what a rank is worth
without a gradient step. A repair that `prune` or `quantize` left beside the weights is taken as part of them.
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

_TOKENS = 2048  # that go through the blocks at a time, about


@torch.no_grad()
def initialize(config: AdapterConfig, material: AdapterInputs, _start: AdapterInit) -> PatchedModules:
    """The finished adapter. Nothing of it is random, and it is zero beside a weight that is still the dense one.

    Costs a forward pass over all training rows, and memory for the dense weight and the Gram matrix of every linear
    that it changes. Raises `UsageError` without dense weights, `DataError` when they are those of another network.
    """
    model, dense = material.model, material.dense
    if dense is None:
        raise UsageError(f"arm {config.arm}: made from the dense model's weights, and none are known; give --teacher")
    adapter = lora.build(model, config)
    changes = adapter.by_name()
    linears = {name: model.network.get_submodule(name) for name in changes}
    pairs = {name: _dense_and_now(name, linear, dense) for name, linear in linears.items()}
    moved = {name: linears[name] for name, pair in pairs.items() if not torch.equal(*pair)}
    grams = input_grams(model, material.states, moved) if moved else {}
    for name, gram in grams.items():
        change = changes[name]
        assert isinstance(change, lora.LoRAUpdate)  # for mypy: a ModuleDict forgets what it holds
        up, down = eora(*pairs[name], gram, rank=len(change.down))
        change.up.copy_(up)
        change.down.copy_(down)
    return adapter


def input_grams(
    model: LanguageModel, states: HiddenStateDataset, linears: Mapping[str, nn.Module]
) -> dict[str, Float[Tensor, "_ _"]]:
    """Mean x xᵀ of each linear's inputs over all tokens of the documents; without linears that no token reaches."""
    grams: defaultdict[str, InputGram] = defaultdict(InputGram)

    def noting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            try:
                grams[name].update(inputs[0].flatten(0, -2))
            except NumericalError as error:
                raise NumericalError(f"{name}, on the training rows: {error}") from error

        return note

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.enter_context(forward_hooks([linear], noting(name), pre=True))
        for rows in _equally_long(states.documents):
            model.run_upper(states.batch(rows).hidden, states.layer)
    return {name: gram.mean() for name, gram in grams.items()}


def _equally_long(documents: Sequence[Document]) -> list[list[int]]:
    """Rows in batches without padding, which a Gram matrix would count."""
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for row, document in enumerate(documents):
        by_length[len(document.tokens)].append(row)
    batches = []
    for length, rows in by_length.items():
        size = max(1, _TOKENS // length)
        batches += [rows[first : first + size] for first in range(0, len(rows), size)]
    return batches


def check_dense(adapter: Adapter, model: LanguageModel, dense: DenseWeights | None) -> None:
    """Raise `DataError` when a linear that the adapter changes has another width in the dense model."""
    if dense is not None and isinstance(adapter, PatchedModules):
        for name in adapter.by_name():
            _check_shapes(name, dense(name), weight_of(model.network.get_submodule(name)))


def _dense_and_now(
    name: str, linear: Linear, dense: DenseWeights
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
    """The weight that a linear had, and the one that it computes with."""
    had, now, repair = dense(name), weight_of(linear), repair_of(linear)
    _check_shapes(name, had, now)
    return had, now if repair is None else now + repair.up @ repair.down


def _check_shapes(name: str, had: Tensor, now: Tensor) -> None:
    if had.shape != now.shape:
        raise DataError(
            f"{name} is {len(now)} x {now.shape[1]}, and {len(had)} x {had.shape[1]} in the dense model: nothing can "
            "be told from a model of other widths; use another arm, or name the right --teacher"
        )
