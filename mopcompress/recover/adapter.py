"""The adapter interface: module, configuration, initial values, and the `RecoveryMethod` that builds it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.evaluation.hidden_states import ApplyAdapter, HiddenStateDataset, InstructionStates
from mopcompress.models.language_model import LanguageModel

DenseWeights = Callable[[str], Float[Tensor, "out in"]]
"""Returns the weight that the linear of a dotted name had before compression; raises `DataError` without one."""


@runtime_checkable  # so that the test run can check it
class Adapter(Protocol):
    """A `torch.nn.Module` whose parameters are trained while the network stays frozen.

    Outside the contexts that `active` and `compile_for_inference` give, the network computes bitwise what it did.
    """

    layer: int
    """The first block that the adapter changes: the hidden states that enter it are the same for every step."""

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[object]:
        """Let the adapter act on these examples inside the context, with gradients to its parameters.

        In the context the network runs on the same [batch, time] rows as `instructions`.
        """
        ...

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Return a faster `active` for a trained adapter: all that is the same for every example is computed once."""
        ...

    def parameter_groups(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Return every trained parameter, once, under the name of its learning rate: `adapter` or `gate`."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the tensors to store, as `torch.nn.Module` does."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The settings of an adapter: with its weights and the model, all that is needed to build it again."""

    arm: str  # a name of `registry.RECOVERY_METHODS`
    experts: int  # number of experts
    prompts_per_expert: int  # prompt tokens per expert
    layer: int  # the first block that the adapter changes
    hidden_size: int  # of the model
    base_sha256: str  # of the compressed model's weights: an adapter fits no other model
    tasks: Sequence[str]  # [experts], the task of each; empty when experts were found by clustering
    gate_mode: str = "renormalised"  # effect of a gate's weights in attention: see `methods/expert_weights.py`
    shared_expert: bool = False  # one more group of prompts, of weight 1 for every example
    top_k: int | None = None  # experts that act at inference; None: all
    per_layer_prompts: bool = False  # train keys and values in every layer, in place of states that flow on
    rank: int | None = None  # of low-rank updates; None: the largest that trains no more numbers than `mop`
    targets: Sequence[str] | None = None  # ends of the names of linears with low-rank updates; None: the writers

    @property
    def groups(self) -> int:
        """The number of groups of prompts: the experts, and the shared one if there is one."""
        return self.experts + self.shared_expert


def trained_parameters(adapter: Adapter) -> int:
    """Return how many numbers training changes, the gate's included."""
    return sum(parameter.numel() for group in adapter.parameter_groups().values() for parameter in group)


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One optimizer step."""

    step: int  # from 1
    steps: int  # of the whole training
    nll: float  # nats per response token, the mean over the step's rows
    tokens: int  # that ran through the upper blocks, without padding
    seconds: float  # wall-clock time of the step
    norms: Mapping[str, float]  # of the gradients before clipping, by the group that was clipped together


@dataclass(frozen=True)
class AdapterInputs:
    """Data from which an adapter's initial values are computed."""

    model: LanguageModel
    states: HiddenStateDataset  # of the training documents, at the adapter's layer
    tasks: tuple[str, ...]  # of the training documents, in alphabetical order; empty when rows name none
    dense_weights: DenseWeights | None = None  # of the model before compression, if it is known


@dataclass(frozen=True, kw_only=True)
class AdapterInit:
    """The settings that an adapter's first values depend on, and its shapes do not."""

    gate_pretraining_steps: int  # of the gate, on the experts' domains
    gate_logit_scale: float  # factor of the pre-trained gate's logits: below 1 the gate starts less certain
    prompt_log_weight: float  # added to the log weight of every prompt; below 0 prompts start almost closed
    seed: int


@dataclass(frozen=True)
class RecoveryMethod:
    """The two ways to make an adapter of one method; `recover.registry` explains methods and arms."""

    build: Callable[[LanguageModel, AdapterConfig], Adapter]  # its shapes, for weights that are loaded
    initialize: Callable[[AdapterConfig, AdapterInputs, AdapterInit], Adapter]  # before the first step


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter, its settings and the record of its training."""

    adapter: Adapter
    config: AdapterConfig
    rows: list[TrainRow]  # one per step; none for a method in closed form
    seconds: float  # initialization (gate pre-training included) and all steps; not the shared hidden states
