"""Modifiers that prune, with the fields and defaults of llm-compressor 0.14 (SparseML's older names too).

`dampening_frac` is the share of the Gram matrix's mean diagonal that is added to its diagonal. Fields of a type
`Ignored...` or `Unsupported` are for recipes of other tools only (see `field_types`).
"""

import math
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator

from mopcompress.errors import RecipeError
from mopcompress.recipe.field_types import (
    BlockSize,
    BlockTargets,
    Damping,
    IgnoredLayers,
    IgnoredSchedule,
    IgnoredScheduleFields,
    IgnoredSwitch,
    IgnoredTime,
    PartialShare,
    Rounding,
    Share,
    Shares,
    Spec,
    Steps,
    Structure,
    Targets,
    UnitInterval,
    fault,
    parse_structure,
)
from mopcompress.recipe.validation_errors import join_lines, list_faults

AnyModifier = TypeVar("AnyModifier", bound=Spec)
AnyPruning = TypeVar("AnyPruning", bound="PruningModifier")


def replace_checked(modifier: AnyModifier, **changes: object) -> AnyModifier:
    """Return a checked copy; raises `RecipeError` for values that are wrong in a recipe too."""
    kind = type(modifier)
    try:
        return kind.model_validate(modifier.model_dump() | changes)
    except ValidationError as error:
        raise RecipeError(join_lines(found.in_recipe(kind.__name__) for found in list_faults(error, kind))) from error


def check_share(share: float, structure: str) -> None:
    """Raise a fault when an N:M structure removes another share."""
    pattern = parse_structure(structure)
    removed = pattern[0] / pattern[1] if pattern else share
    if not math.isclose(share, removed, abs_tol=0.01):  # 1:3 may be written 0.33
        raise fault(f"mask_structure {structure} removes a share of {removed:g}", f"{removed:g}")


class PruningModifier(Spec):
    """Fields of all modifiers that prune single weights; from `refit_steps` on, they are ours."""

    method: ClassVar[str]
    share_field: ClassVar[str] = "sparsity"
    default_share: ClassVar[float] = 0.5  # of a modifier that no recipe names

    mask_structure: Structure = "0:0"
    targets: BlockTargets = ("Linear",)
    refit_steps: Steps = 0  # of conjugate gradients on the mask, towards its least-squares values
    match_dense: UnitInterval = (
        0.0  # share of the way from the linear's own outputs (0) to those of the dense model (1)
    )
    match_samples: PartialShare = 1.0  # share of the calibration samples that the dense model sees for it
    allocation: Literal["uniform", "owl", "ramp", "error", "best"] = "uniform"  # best: by a trial of the others
    owl_m: Annotated[float, Field(gt=0, le=1e6)] = 5.0  # an outlier has this many times the mean score of its block
    allocation_spread: Annotated[
        float, Field(ge=0, le=1, validation_alias=AliasChoices("allocation_spread", "owl_lmbda"))
    ] = 0.08  # how far a linear's sparsity may lie from the requested one, about

    @model_validator(mode="before")
    @classmethod
    def _profile_is_an_allocation(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not fields.keys() & {"sparsity_profile", "owl_m", "owl_lmbda"}:
            return fields
        unset = {name for name in ("sparsity_profile", "owl_m", "owl_lmbda") if fields.get(name) is None}
        others = {name: field for name, field in fields.items() if name not in unset | {"sparsity_profile"}}
        if "sparsity_profile" in unset:
            return others
        if fields["sparsity_profile"] != "owl" or others.setdefault("allocation", "owl") != "owl":
            raise fault("sparsity_profile: not 'owl', or another than allocation; write allocation alone")
        return others

    @model_validator(mode="after")
    def _one_way_to_share(self: AnyPruning) -> AnyPruning:
        if self.allocation == "uniform":
            if (self.owl_m, self.allocation_spread) != (5.0, 0.08):
                raise fault(
                    "owl_m and allocation_spread have no effect without an allocation; add it, or take them out"
                )
            return self
        if self.owl_m != 5.0 and self.allocation not in {"owl", "best"}:
            raise fault(f"owl_m has no effect with allocation: {self.allocation}; take it out, or choose owl or best")
        others = {
            "a list of sparsity": isinstance(getattr(self, "sparsity", None), tuple),
            "mask_structure": bool(self.pattern),
            "apply_globally": getattr(self, "apply_globally", False),
        }
        other = next((name for name, is_set in others.items() if is_set), None)
        if other:
            raise fault(f"allocation: {self.allocation} and {other} both say what each layer loses; keep one of them")
        return self

    @field_validator("sparsity", "final_sparsity", check_fields=False)
    @classmethod
    def _agrees_with_structure_and_targets(cls, sparsity: Any, info: Any) -> Any:
        # `info` is pydantic's ValidationInfo, a protocol that beartype cannot check
        for share in sparsity if isinstance(sparsity, tuple) else (sparsity,):
            check_share(share, info.data.get("mask_structure", ""))
        targets = info.data.get("targets", ())
        if isinstance(sparsity, tuple) and targets and len(sparsity) != len(targets):
            raise fault(f"a list has one share per target, and there are {len(targets)} targets")
        return sparsity

    @property
    def pattern(self) -> tuple[int, int] | None:
        """`(n, m)`: n zeros in every m weights of a row; None when any weight may go."""
        return parse_structure(self.mask_structure)

    def with_sparsity(self: AnyPruning, ratio: float) -> AnyPruning:
        """Return a copy with another share; raises `RecipeError` when an N:M structure contradicts it."""
        return replace_checked(self, **{self.share_field: ratio})


class SparseGPTModifier(PruningModifier):
    """Remove weights by their effect on the layer's output, and refit the others (arXiv 2301.00774)."""

    method: ClassVar[str] = "sparsegpt"

    sparsity: Shares  # a list has one share per target; a linear of several targets has that of the first
    ignore: Targets = ()
    block_size: BlockSize = 128
    dampening_frac: Damping = 0.01
    preserve_sparsity_mask: bool = False
    sequential_update: IgnoredSwitch = None
    sequential_targets: IgnoredLayers = None
    target_ids: IgnoredLayers = None
    offload_hessians: IgnoredSwitch = None
    quantize: Rounding = None

    @model_validator(mode="before")
    @classmethod
    def _join_prunen_and_prunem(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not {"prunen", "prunem"} & fields.keys():
            return fields
        structure = f"{fields.get('prunen')}:{fields.get('prunem')}"
        if fields.get("mask_structure", structure) != structure:
            raise fault(f"prunen and prunem say {structure}, mask_structure says something else; keep mask_structure")
        others = {name: field for name, field in fields.items() if name not in {"prunen", "prunem"}}
        return others | {"mask_structure": structure}


class ALPSModifier(PruningModifier):
    """Find mask and values together, by ADMM on the layer's output error, then refit them (arXiv 2406.07831)."""

    method: ClassVar[str] = "alps"

    sparsity: Shares
    ignore: Targets = ()
    dampening_frac: Damping = 0.01
    iterations: Annotated[int, Field(ge=1, le=1000)] = 12
    refit_steps: Steps = 6
    match_dense: UnitInterval = 1.0
    match_samples: PartialShare = 0.5  # half of the samples show nearly all of the drift
    preserve_sparsity_mask: bool = False


class WandaPruningModifier(PruningModifier):
    """Remove the lowest |weight| x input norm of every output row (arXiv 2306.11695)."""

    method: ClassVar[str] = "wanda"

    sparsity: Shares
    ignore: Targets = ()
    sequential_update: IgnoredSwitch = None
    sequential_targets: IgnoredLayers = None


class MagnitudePruningModifier(PruningModifier):
    """Remove the smallest weights at once: a schedule over training steps has no meaning here."""

    method: ClassVar[str] = "magnitude"
    share_field: ClassVar[str] = "final_sparsity"
    ignore: ClassVar[tuple[str, ...]] = ()

    final_sparsity: Share
    init_sparsity: IgnoredTime = None
    start: IgnoredTime = None
    end: IgnoredTime = None
    update: IgnoredTime = None
    update_frequency: IgnoredTime = None
    update_scheduler: IgnoredSchedule = None
    scheduler_args: IgnoredScheduleFields = None
    leave_enabled: IgnoredSwitch = None
    apply_globally: bool = False  # one threshold for all layers, instead of the same share of each

    @field_validator("apply_globally")
    @classmethod
    def _has_a_choice(cls, globally: bool, info: Any) -> bool:
        if globally and parse_structure(info.data.get("mask_structure", "")):
            raise fault(
                f"mask_structure {info.data['mask_structure']} fixes the share of every layer; keep one of them"
            )
        return globally

    @property
    def sparsity(self) -> float:
        """The share of weights removed."""
        return self.final_sparsity


class StructuredPruningModifier(Spec):
    """Remove whole MLP channels and heads, equally many from every block, and refit the linears that read the others.

    The matrices get smaller, so plain code gets faster, and `config.json` says so.
    """

    method: ClassVar[str] = "structured"
    share_field: ClassVar[str] = "mlp_sparsity"
    default_share: ClassVar[float] = 0.25

    mlp_sparsity: Share  # of the channels of every MLP
    head_sparsity: Share = 0.0  # of the key-value heads, each with its query heads
    score: Literal["error", "norm"] = "error"  # remove what costs least after the refit, or what is smallest
    dampening_frac: Damping = 0.01

    @property
    def sparsity(self) -> float:
        """The share that a ratio of a bench sets."""
        return self.mlp_sparsity

    def with_sparsity(self, ratio: float) -> "StructuredPruningModifier":
        """Return a copy with another share of channels."""
        return replace_checked(self, mlp_sparsity=ratio)


Masking = SparseGPTModifier | ALPSModifier | WandaPruningModifier | MagnitudePruningModifier
Pruning = Masking | StructuredPruningModifier
PRUNING_MODIFIERS: tuple[type[Pruning], ...] = get_args(Pruning)
