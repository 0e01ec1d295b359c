"""`prune` and `quantize` by another library: the same recipe in, the same kind of folder and manifest out."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopcompress.backends.subprocess_backend import BACKENDS, Backend, BackendResult, Request, python_for, run
from mopcompress.backends.validation import read_given, with_fp16_scales
from mopcompress.compress.plan import MethodConfig
from mopcompress.compress.sequential import LayerRow, linears_of, plan_methods
from mopcompress.entrypoints.allocate_sparsity import allocate_sparsity
from mopcompress.entrypoints.compressed_folder import mask_facts, published, request_facts, write_scales
from mopcompress.entrypoints.from_recipe import Compressing, method_config
from mopcompress.entrypoints.inputs import calibration_tokens
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
COMMON = ("method", "options", "targets", "ignore")  # what every library has of a `MethodConfig`


def compress_external(
    recipe: Recipe, modifiers: Sequence[Pruning | GPTQModifier], target: Path, *, progress: Progress = silent
) -> dict[str, Any]:
    """Have the recipe's backend compress the model by `modifiers`, in order, into `target`; returns the manifest.

    Raises `UnavailableError` when the library is not there or fails, `UsageError` for a method that it has not,
    `QualityGateError` when it did not do what it was asked for, or gave up its method for too many matrices.
    """
    backend = BACKENDS[recipe.run.backend]
    if recipe.repair:
        raise UsageError(f"--backend: {backend.name} makes no low-rank repair; leave one of them out")
    known = _without_structured(backend, modifiers)
    compressions = [method_config(modifier) for modifier in known]
    _check_methods(backend, compressions)
    python = python_for(backend, recipe.run.backend_python)
    source = resolve_model(recipe.run.model, progress=progress.message)
    check_output(target, source)
    check_not_repaired(source)
    model = load_model(source, device=CPU)
    tokens, calibration = calibration_tokens(recipe.run, source, weights_hash(source), progress)
    pairs = zip(compressions, known, strict=True)
    requests = requests_of(backend, model, [allocate_sparsity(one, modifier, model, tokens) for one, modifier in pairs])
    with tempfile.TemporaryDirectory(prefix="mopcompress-") as folder:
        progress.message(f"{backend.name} is compressing, in {python}")
        answer = run(backend, python, Path(folder), model=source, requests=requests, tokens=tokens)
        rows, scales = _take_over(model, backend, answer, requests)
    if len(answer.fallbacks) > recipe.run.max_fallback_fraction * len(rows):
        raise QualityGateError(
            f"{backend.name} gave up its method for {len(answer.fallbacks)} of {len(rows)} matrices, for example "
            f"{answer.fallbacks[0]}, and says so in its log only; --max-fallback allows {recipe.run.max_fallback_fraction:g} of "
            "them; calibrate on more tokens, ask for more damping, or allow it"
        )
    facts: dict[str, Any] = {
        **request_facts(source, modifiers, calibration, recipe),
        **mask_facts(rows),
        "fallbacks": len(answer.fallbacks),
        "compress_seconds": answer.seconds,
        "peak_bytes": answer.peak_bytes,
        "backend": {"name": backend.name, "python": str(python), **_backend_facts(answer)},
        **provenance(CPU),
    }
    with published(target, facts, rows) as scratch:
        save_model(model, source, scratch)
        write_scales(scratch, scales, [(one.bits, one.group_size) for one in known if isinstance(one, GPTQModifier)])
    return facts


def requests_of(backend: Backend, model: LanguageModel, compressions: Sequence[MethodConfig]) -> list[Request]:
    """The steps with their linears by name, so that every library compresses exactly those that ours would."""
    kinds = {name: linear for index in range(len(model.blocks)) for linear, name in linears_of(model, index).items()}
    requests = []
    for step in plan_methods(model, compressions):
        names = [name for name in kinds if name in step.target_index]
        strange = next((name for name in names if not isinstance(kinds[name], nn.Linear)), None)
        if strange:
            raise UsageError(f"--backend: {backend.name} cannot compress {strange}, a {type(kinds[strange]).__name__}")
        requests.append(Request(step.compression.method, step.options_for(names), names))
    return requests


def _without_structured(backend: Backend, modifiers: Sequence[Pruning | GPTQModifier]) -> list[Compressing]:
    known = [one for one in modifiers if not isinstance(one, StructuredPruningModifier)]
    if len(known) < len(modifiers):
        raise UsageError(f"--backend: {backend.name} has no structured pruning; leave --backend out")
    return known


def _check_methods(backend: Backend, compressions: Sequence[MethodConfig]) -> None:
    for one in compressions:
        if one.method not in backend.methods:
            known = ", ".join(backend.methods)
            raise UsageError(f"--backend: {backend.name} has no {one.method} ({known}); leave --backend out")
        if one.method == "gptq" and one.options.get("sparsity"):
            raise UsageError(f"--backend: {backend.name} does not prune while it rounds; write a stage for each")
        for field in fields(one):
            if field.name not in COMMON and getattr(one, field.name) != field.default:
                raise UsageError(f"--backend: {backend.name} has no {field.name}; leave it out of the recipe")


def _take_over(
    model: LanguageModel, backend: Backend, answer: BackendResult, requests: Sequence[Request]
) -> tuple[list[LayerRow], dict[str, Tensor]]:
    """Put what came back into the model, in place, once it is checked; a row for every linear, and its scales."""
    asked = {name: [one.method for one in requests if name in one.linears] for one in requests for name in one.linears}
    weights = model.network.state_dict()
    shapes = {name: weights[f"{name}.weight"].shape for name in asked}
    given = read_given(backend, answer, shapes, requests)
    for name, scale in given.scales.items():
        given.weights[name], given.scales[name] = with_fp16_scales(given.weights[name], scale)
    rows = []
    for index in range(len(model.blocks)):
        for linear, name in linears_of(model, index).items():
            if name not in asked:
                continue
            linear.weight.copy_(given.weights.pop(name))
            rows.append(
                LayerRow(
                    name=name,
                    block=index,
                    blocks=len(model.blocks),
                    methods=asked[name],
                    weights=linear.weight.numel(),
                    zeros=int((linear.weight == 0).sum()),
                    escalations=int(name in answer.fallbacks),
                    seconds=answer.seconds / len(asked),
                )
            )
    return rows, given.scales


def _backend_facts(answer: BackendResult) -> dict[str, Any]:
    facts = asdict(answer)
    del facts["weights"]  # a file that is gone by now
    return facts
