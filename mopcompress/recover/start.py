"""From what, and how, an adapter begins."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mopcompress.evaluation.hidden_states import CachedStates
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import Adapter, AdapterConfig

DenseWeights = Callable[[str], Float[Tensor, "out in"]]
"""The weight that the linear of a dotted name had before it was compressed; `DataError` when there is none."""


@dataclass(frozen=True)
class Material:
    """What there is to begin with."""

    model: LanguageModel
    states: CachedStates  # of the training documents, at the adapter's layer
    tasks: tuple[str, ...]
    dense: DenseWeights | None = None  # where it is known from what the model was compressed


@dataclass(frozen=True, kw_only=True)
class Start:
    """The choices that an adapter's first values depend on, and its shapes do not."""

    gate_pretraining_steps: int
    gate_temper: float
    log_opening: float
    seed: int


@dataclass(frozen=True)
class Arm:
    """One line of a comparison."""

    build: Callable[[LanguageModel, AdapterConfig], Adapter]  # its shapes; the values are loaded into it
    begin: Callable[[AdapterConfig, Material, Start], Adapter]  # as it is before the first step
