"""`GPTQModifier`: llm-compressor's `scheme` presets and `config_groups`, resolved to bits, group size and symmetry."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from mopcompress.recipe.field_types import (
    Activations,
    Bits,
    BlockSize,
    BlockTargets,
    Damping,
    IgnoredLayers,
    IgnoredSwitch,
    PartialShare,
    Share,
    Spec,
    Structure,
    Targets,
    UnitInterval,
    Unsupported,
    UnsupportedKVCache,
    fault,
    parse_structure,
)
from mopcompress.recipe.pruning_modifiers import check_share, replace_checked
from mopcompress.recipe.unsupported import other_scheme
from mopcompress.recipe.validation_errors import nearest_name

GROUPED = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
SCHEMES = {
    "W2A16": {"num_bits": 2, **GROUPED},
    "W3A16": {"num_bits": 3, **GROUPED},
    "W4A16": {"num_bits": 4, **GROUPED},
    "W8A16": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
}


OBSERVERS = ("minmax", "memoryless_minmax", "static_minmax", "mse", "memoryless_mse")


def _known_observer(name: Any) -> None:
    """Drop the observer: scales always minimise the squared rounding error weighted by the inputs."""
    if name is not None and name not in OBSERVERS:
        raise fault(f"not one of {', '.join(OBSERVERS)}", nearest_name(name, OBSERVERS))


def _whole_numbers(kind: Any) -> Any:
    if kind == "float":
        raise fault("floating-point grids (FP8, NVFP4) are not made here; write int, or leave it out")
    return kind


def _symmetric_only(symmetric: bool) -> bool:
    if not symmetric:
        raise fault("asymmetric grids are not made here: stock tools cannot load them; write true, or leave it out")
    return symmetric


def _known_strategy(strategy: Any) -> Any:
    if strategy in (None, "tensor", "block", "tensor_group", "token"):
        raise fault("not made here; write channel (one scale per row), or group with a group_size")
    return strategy


def _known_order(order: Any) -> Any:
    if order in ("group", True):
        raise fault("groups of scattered inputs are not made here: stock tools no longer load them", "'static'")
    return "static" if order == "weight" else None if order is False else order  # upstream has two names for each


class WeightQuantization(Spec):
    """Rounding of weights: llm-compressor's QuantizationArgs, as far as GPTQ on weights alone goes."""

    num_bits: Bits
    type: Annotated[Literal["int"], BeforeValidator(_whole_numbers)] = "int"
    symmetric: Annotated[bool, AfterValidator(_symmetric_only)] = True
    strategy: Annotated[Literal["group", "channel"], BeforeValidator(_known_strategy)]
    group_size: Annotated[int, Field(ge=-1, le=65536)] | None = Field(None, validate_default=True)
    dynamic: Annotated[Literal[False] | None, Field(exclude=True), AfterValidator(lambda _value: None)] = None
    observer: Annotated[None, BeforeValidator(_known_observer), Field(exclude=True)] = None
    block_structure: Unsupported = None
    scale_dtype: Unsupported = None
    zp_dtype: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _strategy_from_group_size(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("strategy") is not None:
            return fields
        size = fields.get("group_size")
        return fields | {"strategy": "tensor" if size is None else "channel" if size == -1 else "group"}  # as upstream

    @field_validator("group_size")
    @classmethod
    def _fits_the_strategy(cls, size: int | None, info: Any) -> int | None:
        strategy = info.data.get("strategy")
        if strategy == "group" and (size is None or size < 2):
            raise fault("strategy: group needs a group_size of 2 or more, such as 64 or 128")
        if strategy == "channel" and size not in {None, -1}:
            raise fault("strategy: channel has one scale per row: leave group_size out, or write strategy: group")
        return None if size == -1 else size


class QuantizationGroup(Spec):
    """One entry of `config_groups`."""

    targets: BlockTargets = ("Linear",)
    weights: WeightQuantization
    input_activations: Activations = None
    output_activations: Activations = None
    format: Unsupported = None


class GPTQModifier(Spec):
    """Round weights column by column, refitting the others (arXiv 2210.17323). Zeros of a pruned layer stay zero."""

    method: ClassVar[str] = "gptq"
    parts: ClassVar[tuple[type[Spec], ...]] = (QuantizationGroup, WeightQuantization)  # for nearest-name hints

    config_groups: dict[str, QuantizationGroup] = Field(default_factory=dict)  # never empty: see `_spell_out`
    ignore: Targets = ()
    block_size: BlockSize = 128
    dampening_frac: Damping = 0.01
    actorder: Annotated[Literal["static"] | None, BeforeValidator(_known_order)] = "static"
    mask_structure: Structure = "0:0"
    sparsity: Share = Field(0.0, validate_default=True)  # removed in the same pass over columns, as SparseGPT does
    match_dense: UnitInterval = (
        0.0  # share of the way from the linear's own outputs (0) to those of the dense model (1)
    )
    match_samples: PartialShare = 1.0  # share of the calibration samples that the dense model sees for it
    scheme: Unsupported = None
    sequential_update: IgnoredSwitch = None
    sequential_targets: IgnoredLayers = None
    offload_hessians: IgnoredSwitch = None
    kv_cache_scheme: UnsupportedKVCache = None

    @model_validator(mode="before")
    @classmethod
    def _one_way_to_say_it(cls, fields: Any) -> Any:
        return _lift_actorder(_spell_out(dict(fields))) if isinstance(fields, dict) else fields

    @field_validator("scheme", mode="before")
    @classmethod
    def _known_scheme(cls, scheme: Any) -> Any:
        if isinstance(scheme, str) and (why := other_scheme(scheme)):
            raise fault(why)
        if scheme is not None:
            raise fault(f"not one of {', '.join(SCHEMES)} (others need config_groups)", nearest_name(scheme, SCHEMES))
        return scheme

    @field_validator("sparsity")
    @classmethod
    def _goes_from_left_to_right(cls, sparsity: float, info: Any) -> float:
        check_share(sparsity, info.data.get("mask_structure", ""))
        if sparsity and info.data.get("actorder"):
            raise fault("weights are removed in the order of the inputs: write actorder: null beside it")
        return sparsity

    @field_validator("config_groups")
    @classmethod
    def _one_group(cls, groups: dict[str, QuantizationGroup]) -> dict[str, QuantizationGroup]:
        if len(groups) != 1:
            raise fault(f"exactly one group is supported, found {len(groups)}; write one stage for each")
        return groups

    @property
    def _group(self) -> QuantizationGroup:
        return next(iter(self.config_groups.values()))

    @property
    def targets(self) -> tuple[str, ...]:
        """Layers to round."""
        return self._group.targets

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return self._group.weights.num_bits

    @property
    def group_size(self) -> int | None:
        """Weights of a row that share one scale; None: the whole row."""
        return self._group.weights.group_size

    @property
    def pattern(self) -> tuple[int, int] | None:
        """`(n, m)`: n zeros in every m weights of a row; None when any weight may go."""
        return parse_structure(self.mask_structure)

    @property
    def symmetric(self) -> bool:
        """Always: the grid has its zero in the middle."""
        return self._group.weights.symmetric

    def with_bits(self, bits: int, group_size: int | None) -> "GPTQModifier":
        """Return a copy with another precision; raises `RecipeError` when it is impossible."""
        strategy = "channel" if group_size is None else "group"
        weights = {"num_bits": bits, "group_size": group_size, "strategy": strategy}
        return replace_checked(self, config_groups={"group_0": {"targets": self.targets, "weights": weights}})


def _spell_out(fields: dict[str, Any]) -> dict[str, Any]:
    """Turn `scheme` and `targets` into `config_groups`; wrong values stay for the checks of their fields."""
    scheme = fields.get("scheme")
    weights = SCHEMES.get(scheme.upper()) if isinstance(scheme, str) else None
    if scheme is not None:
        if fields.get("config_groups"):
            raise fault("scheme and config_groups are both given; keep one")
        targets = fields.pop("targets", ["Linear"])
        if weights:
            del fields["scheme"]
            fields["config_groups"] = {"group_0": {"weights": weights, "targets": targets}}
    elif "targets" in fields and isinstance(fields.get("config_groups"), dict):
        targets = fields.pop("targets")
        groups = fields["config_groups"].items()
        fields["config_groups"] = {name: _aimed_at(targets, group) for name, group in groups}
    elif fields.get("config_groups") is None:
        raise fault("say how: scheme: W4A16, or config_groups with weights")
    return fields


def _aimed_at(targets: Any, group: Any) -> Any:
    if isinstance(group, dict) and group.get("targets", targets) not in (targets, [targets]):
        raise fault("targets differ from those in config_groups; keep the latter")
    return {"targets": targets} | group if isinstance(group, dict) else group


def _lift_actorder(fields: dict[str, Any]) -> dict[str, Any]:
    """Move `weights.actorder` (the older place) to the modifier's `actorder`."""
    groups = fields.get("config_groups")
    if not isinstance(groups, dict):
        return fields
    lifted = {}
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and "actorder" in weights:
            if (fields.setdefault("actorder", weights["actorder"]) or None) != (weights["actorder"] or None):
                raise fault("actorder differs from the one in config_groups; keep one")
            group = group | {"weights": {key: value for key, value in weights.items() if key != "actorder"}}
        lifted[name] = group
    return fields | {"config_groups": lifted}
