"""Types of recipe fields: shares, names, lists, and fields of other tools that are ignored or not supported yet."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasGenerator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)
from pydantic_core import PydanticCustomError

from mopcompress.recipe.validation_errors import EACH, ONE

# Present name -> name in stored recipes, which were written before a field had its present name. Both are read, and
# the stored one is written.
STORED_NAMES = {
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "max_grad_norm": "clip_norm",
    "grad_clip_percentile": "clip_percentile",
    "gate_logit_scale": "gate_temper",
    "gate_mode": "gate_reading",
    "prompt_log_weight": "log_opening",
    "per_layer_prompts": "deep",
    "eval_batch_size": "batch_size",
    "max_new_tokens": "write_tokens",
    "skip_rows_longer_than": "longest_row",
    "eval_text": "text",
    "eval_text_samples": "text_samples",
    "columns": "map",
    "prune_then_quantize": "joint",
    "max_fallback_fraction": "max_fallback",
}


class Spec(BaseModel):
    """Checked settings: frozen, no unknown names, no text where a number belongs (1 is a number, '1' is not)."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        alias_generator=AliasGenerator(
            validation_alias=lambda name: AliasChoices(name, STORED_NAMES.get(name, name)),
            serialization_alias=lambda name: STORED_NAMES.get(name, name),
        ),
    )


def fault(message: str, hint: str | None = None) -> PydanticCustomError:
    """Return an error whose message and hint reach the user as they are."""
    return PydanticCustomError("recipe", "{message}", {"message": message, "hint": hint})


def _share(number: float) -> float:
    if number == 1:
        raise fault("not a share of weights between 0 and 1: no weight would be left")
    if not 0 <= number < 1:
        raise fault("not a share of weights between 0 and 1", f"{number / 100:g}" if 1 < number < 100 else None)
    return number


def _name(text: str) -> str:
    if not text.strip():
        raise fault("not a name: empty")
    if len(text) > 1024 or re.search("[\0\ud800-\udfff]", text):
        raise fault("not a name: longer than 1024 characters, or with a zero byte or half a character")
    return text


def _target(text: str) -> str:
    if text.startswith("re:"):
        try:
            re.compile(text[3:])
        except (re.error, OverflowError, RecursionError) as error:
            raise fault(f"not a regular expression ({error})") from error
    return text


def _listed(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values


def _named(values: Any) -> Any:
    return (values,) if isinstance(values, str) else _listed(values)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    distinct = set()
    for value in values:
        if value in distinct:
            raise fault(f"not distinct: {value!r} stands twice")
        distinct.add(value)
    return values


def _inside_blocks(target: str) -> str:
    if target.removesuffix(".weight") in {"lm_head", "Embedding"}:
        raise fault("embeddings and head are never compressed here; take it out")
    return target


def _bits(number: int) -> int:
    if number not in BITS:
        near = min(BITS, key=lambda bits: (abs(bits - number), -bits))
        raise fault("not one of 2, 3, 4, 8: no stock tool stores another width", str(near))
    return number


def reject_with(reason: str) -> BeforeValidator:
    """Return a validator that accepts only null or false, for a field of another tool that would change a result."""

    def refuse(value: Any) -> None:
        if value not in (None, False):
            raise fault(f"{reason}; leave it out")

    return BeforeValidator(refuse)


def _structure(text: str) -> str:
    if text == "unstructured":
        return "0:0"
    pattern = parse_structure(text)
    if pattern is None and text != "0:0":
        raise fault(
            "not N:M (N zeros of M weights, 0 < N < M), and not 'unstructured'; other structures are not supported yet"
        )
    return text if pattern is None else f"{pattern[0]}:{pattern[1]}"


def parse_structure(text: str) -> tuple[int, int] | None:
    """Return `(n, m)` of "n:m", n zeros in every m weights; None unless 0 < n < m."""
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    pattern = (int(match[1]), int(match[2])) if match else (0, 0)
    return pattern if 0 < pattern[0] < pattern[1] else None


BITS = (2, 3, 4, 8)

Share = Annotated[float, AfterValidator(_share)]
OneOrEach = Discriminator(lambda value: EACH if isinstance(value, list | tuple) else ONE)
Name = Annotated[str, AfterValidator(_name)]
Target = Annotated[Name, AfterValidator(_target)]
Targets = Annotated[tuple[Target, ...], BeforeValidator(_named)]
BlockTargets = Annotated[tuple[Annotated[Target, AfterValidator(_inside_blocks)], ...], BeforeValidator(_named)]
Bits = Annotated[int, AfterValidator(_bits)]
Listed = BeforeValidator(_listed)
Shares = Annotated[Annotated[Share, Tag(ONE)] | Annotated[tuple[Share, ...], Listed, Tag(EACH)], OneOrEach]
Distinct = AfterValidator(_distinct)
Steps = Annotated[int, Field(ge=0, le=1000)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
PartialShare = Annotated[float, Field(gt=0, le=1)]
Structure = Annotated[str, AfterValidator(_structure)]
Damping = Annotated[float, Field(gt=0, le=10, validation_alias=AliasChoices("dampening_frac", "percdamp"))]
BlockSize = Annotated[int, Field(ge=1, le=65536)]
FilePath = Annotated[Name, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]

# Accepted from other tools' recipes without effect here: dropped at once, so never in a written recipe.
IgnoredAny = AfterValidator(lambda _value: None)
IgnoredSwitch = Annotated[bool | None, IgnoredAny, Field(exclude=True)]
IgnoredLayers = Annotated[Targets | None, IgnoredAny, Field(exclude=True)]
IgnoredTime = Annotated[float | None, IgnoredAny, Field(exclude=True)]
IgnoredSchedule = Annotated[str | None, IgnoredAny, Field(exclude=True)]
IgnoredScheduleFields = Annotated[dict[str, Any] | None, IgnoredAny, Field(exclude=True)]
Unsupported = Annotated[None, reject_with("not supported yet"), Field(exclude=True)]
Rounding = Annotated[None, reject_with("weights are rounded by a GPTQModifier in a later stage"), Field(exclude=True)]
UnsupportedKVCache = Annotated[
    None, reject_with("the cache of keys and values is not rounded here"), Field(exclude=True)
]
Activations = Annotated[None, reject_with("activations are not rounded here"), Field(exclude=True)]
