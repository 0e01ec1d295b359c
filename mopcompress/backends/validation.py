"""Whether a weight that a library gave back is what was asked for: counted, whatever the library says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mopcompress.backends.subprocess_backend import Backend, BackendResult, Request
from mopcompress.errors import DataError, NumericalError, QualityGateError

_SLACK = 0.01  # a share may be missed by so much, or by a weight a row: libraries round down, and scores tie
_RESIDUE = 1e-2  # of a code, from float arithmetic
_SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16


@dataclass(frozen=True)
class ReturnedLayer:
    """What came back, by the linear's name: its weight, and the scales [out, groups] of its grid if it was rounded."""

    weights: dict[str, Tensor]
    scales: dict[str, Tensor]


def read_given(
    backend: Backend, answer: BackendResult, shapes: Mapping[str, torch.Size], requests: Sequence[Request]
) -> ReturnedLayer:
    """The weights that came back, one for every name in `shapes`, after a look at each.

    Raises `NumericalError` when one is missing, misshapen or not finite, `QualityGateError` when a request was not
    carried out.
    """
    given = ReturnedLayer({}, {})
    try:
        with safe_open(answer.weights, framework="pt") as file:
            there = set(file.keys())
            for name, shape in shapes.items():
                if name not in there:
                    raise NumericalError(f"{backend.name} gave no weight back for {name}; use another backend")
                given.weights[name] = file.get_tensor(name).float()
                _check_tensor(backend, name, given.weights[name], shape)
                if f"{name}.scales" in there:
                    given.scales[name] = file.get_tensor(f"{name}.scales").float()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{backend.name} gave no weights back that can be read ({error}); run again") from error
    version = answer.versions.get(backend.name, "")
    for request in requests:
        shares = request.options.get("sparsity")
        for index, name in enumerate(request.linears):
            own = {"sparsity": shares[index]} if isinstance(shares, Sequence) else {}
            problem = fault_of(given.weights[name], given.scales.get(name), {**request.options, **own})
            if problem:
                raise QualityGateError(
                    f"{backend.name} {version} did not do what {request.method} was asked for: {name} {problem}; "
                    "leave --backend out, or ask for something else"
                )
    return given


def fault_of(
    weight: Float[Tensor, "out in"], scales: Float[Tensor, "rows groups"] | None, options: Mapping[str, Any]
) -> str | None:
    """In what a weight contradicts the settings of a method; None when in nothing."""
    if "bits" in options:
        return _fault_of_grid(weight, scales, options["bits"], options.get("group_size") or weight.shape[-1])
    if options.get("pattern"):
        return _fault_of_pattern(weight, *options["pattern"])
    counted, asked = float((weight == 0).float().mean()), options["sparsity"]
    if abs(counted - asked) > max(_SLACK, 1 / weight.shape[-1]) + 1e-6:
        return f"has {counted:.2%} zeros, asked were {asked:.2%}"
    return None


def with_fp16_scales(
    weight: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"]
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out groups"]]:
    """The same integers times scales that fp16 can hold, which is how quantised formats keep them; and those scales."""
    spread = scales.repeat_interleave(weight.shape[-1] // scales.shape[-1], dim=-1)
    kept = scales.half().clamp_min(_SMALLEST_SCALE).float()
    return (weight / spread).round() * kept.repeat_interleave(weight.shape[-1] // scales.shape[-1], dim=-1), kept


def _check_tensor(backend: Backend, name: str, weight: Tensor, shape: torch.Size) -> None:
    if weight.shape != shape:
        raise NumericalError(
            f"{backend.name} gave {name} back as {list(weight.shape)}, it is {list(shape)}; prune with another backend"
        )
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"{backend.name} gave NaN or infinite weights back for {name}; ask for more damping")


def _fault_of_pattern(weight: Tensor, n: int, m: int) -> str | None:
    groups = (weight == 0).unflatten(-1, (-1, m)).sum(-1)
    violated = float((groups < n).float().mean())
    return f"has fewer than {n} zeros in {violated:.2%} of its groups of {m}" if violated else None


def _fault_of_grid(weight: Tensor, scales: Tensor | None, bits: int, group_size: int) -> str | None:
    if scales is None or scales.shape != (len(weight), weight.shape[-1] // group_size):
        return f"came without scales of groups of {group_size}"
    if not bool((scales > 0).all()):
        return "came with scales that are not positive"
    codes = weight / scales.repeat_interleave(group_size, dim=-1)
    limit = 2 ** (bits - 1)
    whole = (codes - codes.round()).abs() <= _RESIDUE
    off = float((~(whole & (codes >= -limit - _RESIDUE) & (codes <= limit - 1 + _RESIDUE))).float().mean())
    return f"has {off:.2%} of its weights off the grid of {bits} bits" if off else None
