"""`run:`, the part of a recipe that is ours: model, data, grid and machine.

`--set run.FIELD=VALUE` wins over every field of it, and so do the flags that some fields have. Relative paths are
relative to the working directory, in a recipe too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from mopcompress.errors import UsageError
from mopcompress.recipe.arms import ARM_DEFAULTS, known_arm
from mopcompress.recipe.field_types import STORED_NAMES, Bits, Distinct, FilePath, Listed, Name, Share, Spec, fault
from mopcompress.recipe.pruning_modifiers import PRUNING_MODIFIERS
from mopcompress.recipe.validation_errors import Fault, field_name, join_lines, list_faults, nearest_name

PRUNING_METHODS: tuple[str, ...] = tuple(modifier.method for modifier in PRUNING_MODIFIERS)
OURS = "mopcompress"
NO_FIELDS: Mapping[str, object] = MappingProxyType({})
BACKENDS = (OURS, "llmcompressor", "gptqmodel")

Arms = Annotated[tuple[Annotated[str, AfterValidator(known_arm)], ...], Listed, Distinct]
Rows = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=8, le=1_048_576)]  # tokens
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True)
class Affects:
    """Mark of a field of `RunSpec`: what depends on its value. Every output depends on a field without a mark.

    `nothing`: no number at all. `cells`: which cells a bench has, not what is in them. `bench`: rows of a bench, not
    the folders that the other commands write.
    """

    what: Literal["nothing", "cells", "bench"]


NOTHING, CELLS, BENCH = Affects("nothing"), Affects("cells"), Affects("bench")


def _method(name: str) -> str:
    if name not in PRUNING_METHODS:
        hint = "--bits" if name == "gptq" else nearest_name(name, PRUNING_METHODS)
        raise fault(f"not one of {', '.join(PRUNING_METHODS)}", hint)
    return name


def _not_dense(ratio: float) -> float:
    if ratio == 0:
        raise fault("not a share to remove: 0 is the dense model, which every bench measures; leave it out")
    return ratio


def _whole_row(size: Any) -> Any:
    """Return the number of weights of a row that share a scale; None for -1, which is the whole row."""
    return None if size == -1 else size


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise fault("not one of auto, cpu, cuda, cuda:N, mps", nearest_name(name, ("auto", "cpu", "cuda", "mps")))
    return name


def _backend(name: str) -> str:
    if name not in BACKENDS:
        raise fault(f"not one of {', '.join(BACKENDS)}", nearest_name(name, BACKENDS))
    return name


Ratio = Annotated[Share, AfterValidator(_not_dense)]
Method = Annotated[str, AfterValidator(_method)]
GroupSize = Annotated[Annotated[int, Field(ge=2, le=65536)] | None, BeforeValidator(_whole_row)]


class RunSpec(Spec):
    """Model, data, grid and machine of a run; the defaults are those of `recipes/default.yaml`."""

    model: FilePath = "smollm2"
    data: FilePath = "skills"
    columns: dict[Name, Name] = Field(default_factory=dict)  # column of the data: our field
    train_rows: Rows | None = 320  # None: all
    validation_rows: Rows | None = 96
    test_rows: Rows | None = 144
    max_length: Length = 512  # tokens of a row; longer rows are dropped, a response alone over it is an error
    skip_rows_longer_than: Length | None = None  # a choice of rows: only those of at most so many tokens take part
    eval_text: FilePath | None = None  # plain text that no arm is trained on, to be scored too
    eval_text_samples: Rows = 24  # windows of it
    train_text: FilePath | None = None  # plain text to train on too, as a task of its own
    train_text_samples: Rows = 96  # windows of it, added to the training rows
    max_new_tokens: Annotated[Tokens | None, BENCH] = None  # also answer the test rows, with at most so many tokens
    calibration: FilePath = "self"  # text that the model writes itself, or a text file
    num_calibration_samples: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    max_seq_length: Length = 512  # tokens of a calibration sample
    ratios: Annotated[tuple[Ratio, ...], Listed, Distinct, CELLS] = (0.5, 0.85, 0.95)
    methods: Annotated[tuple[Method, ...], Listed, Distinct, CELLS] = ("sparsegpt",)
    bits: Annotated[tuple[Bits, ...], Listed, Distinct, CELLS] = ()
    prune_then_quantize: Annotated[bool, CELLS] = False  # with bits: round the pruned models, not the dense one
    group_size: Annotated[GroupSize, BENCH] = 64  # weights of a row that share a scale
    arms: Annotated[Arms, Field(min_length=1), CELLS] = ("none", "single", "mop")
    dense_arms: Annotated[Arms, CELLS] = ("none",)  # of the dense model: tells recovery from adaptation to the data
    seeds: Annotated[tuple[Seed, ...], Listed, Distinct, Field(min_length=1), CELLS] = (0,)
    seed: Seed = 0
    eval_batch_size: Annotated[int, Field(ge=1, le=65536), BENCH] = 16  # rows, in evaluation
    device: Annotated[str, AfterValidator(_device)] = "auto"
    backend: Annotated[str, AfterValidator(_backend)] = OURS  # the library whose methods compress
    backend_python: Annotated[FilePath | None, BENCH] = None  # the interpreter that has it; None: this one
    output_dir: Annotated[FilePath | None, NOTHING] = None
    max_fallback_fraction: Annotated[float, Field(ge=0, le=1), NOTHING] = (
        0.1  # share of matrices that may need more damping than asked for
    )

    @model_validator(mode="after")
    def _scored_text_is_not_trained_on(self) -> "RunSpec":
        if self.train_text is not None and self.train_text == self.eval_text:
            raise fault(
                "train_text: the same as eval_text, which is scored because no arm is trained on it; name another"
            )
        return self

    @property
    def trained_arms(self) -> tuple[str, ...]:
        """Arms of the grid that have an adapter, each once."""
        return tuple(dict.fromkeys(arm for arm in (*self.arms, *self.dense_arms) if arm != "none"))

    @property
    def computed_arms(self) -> tuple[str, ...]:
        """Arms among them that have a closed form: they come from the dense model's weights, without a seed."""
        return tuple(arm for arm in self.trained_arms if ARM_DEFAULTS[arm].learning_rate is None)


def stored_names_of_fields(*marks: Affects) -> tuple[str, ...]:
    """Return the stored names of the fields of `RunSpec` that have one of these marks."""
    fields = [name for name, field in RunSpec.model_fields.items() if any(mark in field.metadata for mark in marks)]
    return tuple(STORED_NAMES.get(name, name) for name in fields)


LISTS = {name for name, field in RunSpec.model_fields.items() if isinstance(field.default, tuple)}
WORDS = {
    "model",
    "data",
    "calibration",
    "eval_text",
    "train_text",
    "methods",
    "arms",
    "dense_arms",
    "device",
    "backend",
    "backend_python",
    "output_dir",
}


def check_flags(
    flags: Mapping[str, object], settings: Mapping[str, object] = NO_FIELDS, run: Mapping[str, object] = NO_FIELDS
) -> dict[str, Any]:
    """Return the fields of `run` (by present names, checked) with those of `flags` and `settings` in their place.

    A flag that is None was not given; text is split at commas where a list belongs. Settings are taken as they are.
    Raises `UsageError` with all faults, one line each, and for a field that is given twice.
    """
    given = {name: flag for name, flag in flags.items() if flag is not None}
    by_field = {field_name(RunSpec, name): name for name in settings}
    for name in given:
        if field_name(RunSpec, name) in by_field:
            flag = name.replace("_", "-")
            raise UsageError(
                f"--{flag}: given twice, by --set run.{by_field[field_name(RunSpec, name)]} too; give it once"
            )
    faults: list[Fault] = []
    parsed = {name: _parsed(field_name(RunSpec, name), name, flag, faults) for name, flag in given.items()}
    wrong = {fault.path[0] for fault in faults}
    changes = {name: change for name, change in {**parsed, **settings}.items() if name not in wrong}
    changed = {field_name(RunSpec, name) for name in changes}
    try:
        checked = RunSpec.model_validate({name: old for name, old in run.items() if name not in changed} | changes)
    except ValidationError as error:
        faults += list_faults(error, RunSpec)
    if faults:
        raise UsageError(
            join_lines(
                fault.in_setting("run") if fault.path and fault.path[0] in settings else fault.in_flags()
                for fault in faults
            )
        )
    return {name: getattr(checked, name) for name in {*run, *changed}}


def _parsed(field: str, name: str, flag: object, faults: list[Fault]) -> object:
    if field == "columns" and isinstance(flag, str):
        pairs = [pair.partition("=") for pair in flag.split(",")]
        if not all(key and value for key, _, value in pairs):
            faults.append(Fault((name,), "not column=field, with commas between several", flag))
        return {key.strip(): value.strip() for key, _, value in pairs}
    if field not in LISTS or not isinstance(flag, str | list | tuple):
        return flag if field in WORDS else _number(flag)
    pieces = [piece.strip() for piece in flag.split(",")] if isinstance(flag, str) and flag else list(flag)
    if "" in pieces:
        faults.append(Fault((name,), "an entry is empty: write values with one comma between", flag))
    return tuple(pieces) if field in WORDS else tuple(_number(piece) for piece in pieces)


def _number(flag: object) -> object:
    """Return text of a command line as the number that it looks like; anything else as it is."""
    if not isinstance(flag, str):
        return flag
    for kind in (int, float):
        try:
            return kind(flag)
        except ValueError:
            continue
    return flag
