"""Checks of the weights that a library returns against what was requested, whatever the library reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mopcompress.backends.subprocess_backend import Backend, BackendResult, Request
from mopcompress.errors import DataError, NumericalError, QualityGateError

_SLACK = 0.01  # tolerance of a sparsity, or a weight per row if more: libraries round down, and scores tie
_RESIDUE = 1e-2  # tolerance of a code, for float arithmetic
_SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16


@dataclass(frozen=True)
class ReturnedWeights:
    """The returned weights by the linear's name, and the scales [out, groups] of those that were quantised."""

    weights: dict[str, Tensor]
    scales: dict[str, Tensor]


def read_returned_weights(
    backend: Backend, answer: BackendResult, shapes: Mapping[str, torch.Size], requests: Sequence[Request]
) -> ReturnedWeights:
    """Read and check the returned weights, one for every name in `shapes`.

    Raises `DataError` when the file cannot be read, `NumericalError` when a weight is missing, misshapen or not finite,
    and `QualityGateError` when a request was not carried out.
    """
    returned = ReturnedWeights({}, {})
    try:
        with safe_open(answer.weights, framework="pt") as file:
            stored = set(file.keys())
            for name, shape in shapes.items():
                if name not in stored:
                    raise NumericalError(f"{backend.name} returned no weight for {name}; use another backend")
                returned.weights[name] = file.get_tensor(name).float()
                _check_tensor(backend, name, returned.weights[name], shape)
                if f"{name}.scales" in stored:
                    returned.scales[name] = file.get_tensor(f"{name}.scales").float()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{backend.name} returned no weights that can be read ({error}); run again") from error
    version = answer.versions.get(backend.name, "")
    for request in requests:
        sparsity = request.options.get("sparsity")
        for index, name in enumerate(request.linears):
            options = dict(request.options)
            if isinstance(sparsity, Sequence):
                options["sparsity"] = sparsity[index]
            problem = describe_mismatch(returned.weights[name], returned.scales.get(name), options)
            if problem:
                raise QualityGateError(
                    f"{backend.name} {version} did not carry out {request.method} as requested: {name} {problem}; "
                    "omit --backend, or change the request"
                )
    return returned


def describe_mismatch(
    weight: Float[Tensor, "out in"], scales: Float[Tensor, "rows groups"] | None, options: Mapping[str, Any]
) -> str | None:
    """Describe how a weight contradicts the options of a method; None when it does not."""
    if "bits" in options:
        return _describe_grid_mismatch(weight, scales, options["bits"], options.get("group_size") or weight.shape[-1])
    if options.get("pattern"):
        return _describe_pattern_mismatch(weight, *options["pattern"])
    sparsity, requested = float((weight == 0).float().mean()), options["sparsity"]
    if abs(sparsity - requested) > max(_SLACK, 1 / weight.shape[-1]) + 1e-6:
        return f"has {sparsity:.2%} zeros instead of {requested:.2%}"
    return None


def round_scales_to_fp16(
    weight: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"]
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out groups"]]:
    """Return the weight's integers times scales rounded to fp16, and those scales, as quantised formats store them."""
    group_size = weight.shape[-1] // scales.shape[-1]
    codes = (weight / scales.repeat_interleave(group_size, dim=-1)).round()
    rounded = scales.half().clamp_min(_SMALLEST_SCALE).float()
    return codes * rounded.repeat_interleave(group_size, dim=-1), rounded


def _check_tensor(backend: Backend, name: str, weight: Tensor, shape: torch.Size) -> None:
    if weight.shape != shape:
        raise NumericalError(
            f"{backend.name} returned {name} as {list(weight.shape)} instead of {list(shape)}; use another backend"
        )
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"{backend.name} returned NaN or infinite weights for {name}; use more damping")


def _describe_pattern_mismatch(weight: Tensor, n: int, m: int) -> str | None:
    groups = (weight == 0).unflatten(-1, (-1, m)).sum(-1)
    violated = float((groups < n).float().mean())
    return f"has fewer than {n} zeros in {violated:.2%} of its groups of {m}" if violated else None


def _describe_grid_mismatch(weight: Tensor, scales: Tensor | None, bits: int, group_size: int) -> str | None:
    if scales is None or scales.shape != (len(weight), weight.shape[-1] // group_size):
        return f"has no scales of groups of {group_size}"
    if not bool((scales > 0).all()):
        return "has scales that are not positive"
    codes = weight / scales.repeat_interleave(group_size, dim=-1)
    limit = 2 ** (bits - 1)
    whole = (codes - codes.round()).abs() <= _RESIDUE
    off = float((~(whole & (codes >= -limit - _RESIDUE) & (codes <= limit - 1 + _RESIDUE))).float().mean())
    return f"has {off:.2%} of its weights off the grid of {bits} bits" if off else None
