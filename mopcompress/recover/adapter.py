"""What recovery trains: a small module that acts on a frozen network, and the settings that make it up again."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.evaluation.hidden_states import ApplyAdapter, HiddenStateDataset, InstructionStates
from mopcompress.models.language_model import LanguageModel

DenseWeights = Callable[[str], Float[Tensor, "out in"]]
"""The weight that the linear of a dotted name had before it was compressed; `DataError` when there is none."""


@runtime_checkable  # so that the test run can check it
class Adapter(Protocol):
    """A `torch.nn.Module` whose parameters are trained while the network below it stays as it is.

    Outside of `active` and of what `compile_for_inference` gives, the network is bitwise what it was.
    """

    layer: int
    """The first block that it changes: the states below are the same for every step."""

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[object]:
        """Inside it the adapter acts on these examples, with gradients to its parameters."""
        ...

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """The same for an adapter that is trained no more: what no example changes is computed here, once."""
        ...

    def parameter_groups(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Every trained parameter, once, under the name of its learning rate: `adapter`, or `gate`."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """What is stored, as of any module."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter's weights are for: with the model, all that is needed to make it up again."""

    arm: str
    experts: int
    prompts_per_expert: int
    layer: int
    hidden_size: int
    base_sha256: str  # of the compressed model's weights: an adapter fits no other model
    tasks: Sequence[str]  # expert e's domain, in order; empty when experts were found by clustering
    gate_mode: str = "renormalised"  # what a gate's weight does in attention: see `weighing`
    shared_expert: bool = False  # one more group of prompts, which weighs 1 for every example
    top_k: int | None = None  # experts that act at inference; None: all
    per_layer_prompts: bool = False  # keys and values of their own in every layer, in place of states that flow on
    rank: int | None = None  # of low-rank updates; None: the largest that trains no more than `mop` would
    targets: Sequence[str] | None = None  # ends of the names of linears that have low-rank updates; None: the writers

    @property
    def groups(self) -> int:
        """Groups of prompts: the experts, and the shared one if there is one."""
        return self.experts + self.shared_expert


def trained_parameters(adapter: Adapter) -> int:
    """How many numbers training changes, the gate's included."""
    return sum(parameter.numel() for group in adapter.parameter_groups().values() for parameter in group)


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One optimiser step."""

    step: int  # from 1
    steps: int
    nll: float  # nats per response token, the mean over the step's rows
    tokens: int  # real tokens that ran through the upper blocks, padding not counted
    seconds: float
    norms: Mapping[str, float]  # of the gradients before they were clipped, by the group that was clipped by itself


@dataclass(frozen=True)
class AdapterInputs:
    """What there is to begin with."""

    model: LanguageModel
    states: HiddenStateDataset  # of the training documents, at the adapter's layer
    tasks: tuple[str, ...]
    dense_weights: DenseWeights | None = None  # where it is known from what the model was compressed


@dataclass(frozen=True, kw_only=True)
class AdapterInit:
    """The choices that an adapter's first values depend on, and its shapes do not."""

    gate_pretraining_steps: int
    gate_logit_scale: float
    prompt_log_weight: float
    seed: int


@dataclass(frozen=True)
class RecoveryMethod:
    """One line of a comparison."""

    build: Callable[[LanguageModel, AdapterConfig], Adapter]  # its shapes; the values are loaded into it
    initialize: Callable[[AdapterConfig, AdapterInputs, AdapterInit], Adapter]  # as it is before the first step


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter, and how it was trained."""

    adapter: Adapter
    config: AdapterConfig
    rows: list[TrainRow]
    seconds: float  # the start (gate pre-training included) and all steps; not the shared cache of lower states
