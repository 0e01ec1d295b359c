"""`prune` and `quantize` by another library: the same recipe, and the same kind of folder and manifest."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopcompress.backends.subprocess_backend import BACKENDS, Backend, BackendResult, Request, find_python, run_backend
from mopcompress.backends.validation import read_returned_weights, round_scales_to_fp16
from mopcompress.compress.plan import MethodConfig
from mopcompress.compress.sequential import LayerRow, linears_of, plan_methods
from mopcompress.entrypoints.allocate_sparsity import allocate_sparsity
from mopcompress.entrypoints.compressed_folder import count_zeros, publish_model, request_metadata, write_scales
from mopcompress.entrypoints.from_recipe import Compressing, method_config
from mopcompress.entrypoints.inputs import load_calibration
from mopcompress.entrypoints.shape_checks import check_not_repaired
from mopcompress.environment import provenance
from mopcompress.errors import QualityGateError, UsageError
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import (
    check_output,
    load_model,
    resolve_model,
    save_model,
    weights_hash,
)
from mopcompress.progress import Progress, silent
from mopcompress.recipe import GPTQModifier, Recipe, StructuredPruningModifier
from mopcompress.recipe.pruning_modifiers import Pruning

CPU = torch.device("cpu")
COMMON_FIELDS = ("method", "options", "targets", "ignore")  # fields of `MethodConfig` that every library has


def compress_external(
    recipe: Recipe, modifiers: Sequence[Pruning | GPTQModifier], target: Path, *, progress: Progress = silent
) -> dict[str, Any]:
    """Have the recipe's backend compress the model by `modifiers`, in order, into `target`; returns the manifest.

    Raises `UnavailableError` when the library is missing or fails, and `UsageError` for a method that it lacks. Raises
    `QualityGateError` when its result is not the one that was asked for, or too many matrices fell back.
    """
    backend = BACKENDS[recipe.run.backend]
    if recipe.repair:
        raise UsageError(f"--backend: {backend.name} makes no low-rank repair; leave one of them out")
    supported = _require_unstructured(backend, modifiers)
    configs = [method_config(modifier) for modifier in supported]
    _check_methods(backend, configs)
    python = find_python(backend, recipe.run.backend_python)
    source = resolve_model(recipe.run.model, progress=progress.message)
    check_output(target, source)
    check_not_repaired(source)
    model = load_model(source, device=CPU)
    calibration = load_calibration(recipe.run, source, weights_hash(source), progress)
    allocated = [
        allocate_sparsity(config, modifier, model, calibration.tokens)
        for config, modifier in zip(configs, supported, strict=True)
    ]
    requests = build_requests(backend, model, allocated)
    with tempfile.TemporaryDirectory(prefix="mopcompress-") as folder:
        progress.message(f"{backend.name} is compressing, in {python}")
        result = run_backend(backend, python, Path(folder), model=source, requests=requests, tokens=calibration.tokens)
        rows, scales = _load_result(model, backend, result, requests)
    if len(result.fallbacks) > recipe.run.max_fallback_fraction * len(rows):
        raise QualityGateError(
            f"{backend.name} gave up its method for {len(result.fallbacks)} of {len(rows)} matrices, for example "
            f"{result.fallbacks[0]}, and says so in its log only; run.max_fallback_fraction allows "
            f"{recipe.run.max_fallback_fraction:g} of them; calibrate on more tokens, ask for more damping, or allow it"
        )
    metadata: dict[str, Any] = {
        **request_metadata(source, modifiers, calibration, recipe),
        **count_zeros(rows),
        "fallbacks": len(result.fallbacks),
        "compress_seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "backend": {"name": backend.name, "python": str(python), **_backend_metadata(result)},
        **provenance(CPU),
    }
    with publish_model(target, metadata, rows) as scratch:
        save_model(model, source, scratch)
        write_scales(scratch, scales, supported)
    return metadata


def build_requests(backend: Backend, model: LanguageModel, configs: Sequence[MethodConfig]) -> list[Request]:
    """Name the linears of every method, so that each library compresses exactly those that ours would."""
    linears = {name: linear for index in range(len(model.blocks)) for linear, name in linears_of(model, index).items()}
    requests = []
    for planned in plan_methods(model, configs):
        names = [name for name in linears if name in planned.target_index]
        unsupported = next((name for name in names if not isinstance(linears[name], nn.Linear)), None)
        if unsupported:
            kind = type(linears[unsupported]).__name__
            raise UsageError(f"--backend: {backend.name} cannot compress {unsupported}, a {kind}")
        requests.append(Request(planned.config.method, planned.options_for(names), names))
    return requests


def _require_unstructured(backend: Backend, modifiers: Sequence[Pruning | GPTQModifier]) -> list[Compressing]:
    supported = [modifier for modifier in modifiers if not isinstance(modifier, StructuredPruningModifier)]
    if len(supported) < len(modifiers):
        raise UsageError(f"--backend: {backend.name} has no structured pruning; leave --backend out")
    return supported


def _check_methods(backend: Backend, configs: Sequence[MethodConfig]) -> None:
    for config in configs:
        if config.method not in backend.methods:
            names = ", ".join(backend.methods)
            raise UsageError(f"--backend: {backend.name} has no {config.method} ({names}); leave --backend out")
        if config.method == "gptq" and config.options.get("sparsity"):
            raise UsageError(f"--backend: {backend.name} does not prune while it rounds; write a stage for each")
        for field in fields(config):
            if field.name not in COMMON_FIELDS and getattr(config, field.name) != field.default:
                raise UsageError(f"--backend: {backend.name} has no {field.name}; leave it out of the recipe")


def _load_result(
    model: LanguageModel, backend: Backend, result: BackendResult, requests: Sequence[Request]
) -> tuple[list[LayerRow], dict[str, Tensor]]:
    """Put the library's weights, once checked, into the model in place; return a row per linear, and the scales."""
    methods = {
        name: [request.method for request in requests if name in request.linears]
        for request in requests
        for name in request.linears
    }
    weights = model.network.state_dict()
    shapes = {name: weights[f"{name}.weight"].shape for name in methods}
    returned = read_returned_weights(backend, result, shapes, requests)
    for name, scale in returned.scales.items():
        returned.weights[name], returned.scales[name] = round_scales_to_fp16(returned.weights[name], scale)
    rows = []
    for index in range(len(model.blocks)):
        for linear, name in linears_of(model, index).items():
            if name not in methods:
                continue
            linear.weight.copy_(returned.weights.pop(name))
            rows.append(
                LayerRow(
                    name=name,
                    block=index,
                    blocks=len(model.blocks),
                    methods=methods[name],
                    weights=linear.weight.numel(),
                    zeros=int((linear.weight == 0).sum()),
                    escalations=int(name in result.fallbacks),
                    seconds=result.seconds / len(methods),
                )
            )
    return rows, returned.scales


def _backend_metadata(result: BackendResult) -> dict[str, Any]:
    metadata = asdict(result)
    del metadata["weights"]  # a file in the temporary folder, which is removed
    return metadata
