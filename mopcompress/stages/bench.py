"""`bench`: the grid setting x arm x seed, one compressed model a setting, one row a finished cell.

A run can be stopped anywhere and started again: compressed models and rows that are finished are kept, a larger grid
runs only what is new, and a run with other settings than those the folder was made with is refused.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mopcompress import artifact
from mopcompress.evaluation import macro_perplexity, macro_rouge_l, micro, task_scores
from mopcompress.grid import DENSE, Cell, Setting, cells_of
from mopcompress.models.checkpoint import load_model, resolve_model, weights_bytes, weights_hash
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.smollm2 import NOTE, cache_folder
from mopcompress.recipe import PromptRecoveryModifier, Recipe
from mopcompress.recipe.arms import TRAINED
from mopcompress.recipe.modifiers import changed
from mopcompress.recover.adapter import trained_parameters
from mopcompress.recover.arms import ARMS
from mopcompress.recover.folder import adapter_bytes
from mopcompress.report import write_report
from mopcompress.results import BenchRow, append_row, read_rows, write_documents
from mopcompress.stages.calibration import calibration_tokens
from mopcompress.stages.compress import compress_into
from mopcompress.stages.documents import Documents, load_documents
from mopcompress.stages.evaluate import score
from mopcompress.stages.gate import read_gate
from mopcompress.stages.grid import folder_of, modifiers_of, settings_of
from mopcompress.stages.manifest import continued, write_manifest
from mopcompress.stages.progress import Progress, silent
from mopcompress.stages.protocol import new_manifest
from mopcompress.stages.provenance import choose_device, now, peak_bytes, provenance
from mopcompress.stages.recover import (
    TRAINING,
    Recovered,
    adapter_config,
    cache_states,
    first_layer,
    publish_adapter,
    train_arm,
)
from mopcompress.stages.sweep import check_validation, read_sweeps, sweep_rate, told, write_sweep
from mopcompress.stages.teacher import dense_weights, taught_by
from mopcompress.stages.written import samples, with_answers
from mopcompress.states import CachedStates


def bench(recipe: Recipe, folder: Path, *, command: str = "", progress: Progress = silent) -> list[BenchRow]:
    """Run what the grid still lacks, write the report, and return all rows of the folder.

    Raises `RecipeError` when the folder was made with other settings, `OutputError` when another run is using it,
    and, before anything is written, `UsageError` or `DataError` when an arm cannot be as the recipe wants it.
    """
    with artifact.locked(folder):
        for unfinished in (*folder.glob("models/.*.partial-*"), *folder.glob("adapters/.*.partial-*")):
            shutil.rmtree(unfinished)  # what a killed run was building
        return _Bench(recipe, folder, command, progress).run()


class _Bench:
    """What all cells of one run share."""

    def __init__(self, recipe: Recipe, folder: Path, command: str, progress: Progress) -> None:
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.device = choose_device(recipe.run.device)
        self.source = resolve_model(recipe.run.model, progress=lambda line: progress(line, 0, 0))
        self.source_sha256 = weights_hash(self.source)
        # the bench's own dense model teaches, unless another is named
        self.recovery = changed(recipe.recovery, teacher=recipe.recovery.teacher or str(self.source))
        self.command = command

    def run(self) -> list[BenchRow]:
        start = time.perf_counter()
        model = load_model(self.source, device=self.device)
        documents = load_documents(self.recipe.run, model.tokenizer)
        arms = [self.recovery.with_arm(arm) for arm in self.recipe.run.trained_arms]
        for one in arms:
            ARMS[one.arm].build(model, adapter_config(one, model, documents.tasks, self.source_sha256))
        if any(one.sweeps for one in arms):
            check_validation(len(documents.validation), self.recipe.run.data)
        size = self.recipe.run.batch_size
        self.taught = taught_by(self.recovery, self.source, model, documents.train, size, self.progress)
        weights = model.network.num_parameters()
        del model  # each setting loads its own
        tokens, calibration = calibration_tokens(self.recipe.run, self.source, self.source_sha256, self.progress)
        model_facts = {"name": self.recipe.run.model, "sha256": self.source_sha256, "weights": weights}
        note = NOTE if self.source.is_relative_to(cache_folder()) else None
        manifest = new_manifest(self.recipe, model_facts | {"note": note}, documents, calibration)
        manifest |= {"command": self.command, **provenance(self.device)}
        manifest = continued(manifest, self.folder)
        before = manifest["seconds"] or 0.0
        write_manifest(manifest, self.folder)
        for setting in settings_of(self.recipe):
            done = {Cell(*row.cell) for row in read_rows(self.folder / "rows.jsonl")}
            missing = [cell for cell in cells_of(self.recipe.run.model_dump(), setting) if cell not in done]
            if missing:
                compressed = self._compressed(setting, tokens, calibration)
                self._fill(setting, compressed, documents, missing)
            manifest["seconds"] = before + time.perf_counter() - start
            manifest["sweeps"] = read_sweeps(self.folder / "sweeps")
            write_manifest(manifest, self.folder)
        write_manifest(manifest | {"finished": now()}, self.folder)
        write_report(self.folder)
        return read_rows(self.folder / "rows.jsonl")

    def _compressed(self, setting: Setting, tokens: Any, calibration: dict[str, Any]) -> Path:
        """The folder of the setting's model, made when it is not there."""
        if setting == DENSE:
            return self.source
        target = self.folder / "models" / folder_of(setting)
        if artifact.read_manifest(target) is None:
            modifiers = modifiers_of(self.recipe, setting)
            compress_into(target, self.source, modifiers, tokens, calibration, self.recipe, progress=self.progress)
        return target

    def _fill(self, setting: Setting, base: Path, documents: Documents, cells: Sequence[Cell]) -> None:
        """Train and score the missing cells of one setting, on states that they share."""
        model = load_model(base, device=self.device)
        facts = (artifact.read_manifest(base) or {}) if setting != DENSE else {}
        cached: dict[tuple[int, str], CachedStates] = {}

        sha256 = weights_hash(base)

        def states(layer: int, rows: tuple[Any, ...], which: str, dtype: torch.dtype = torch.float32) -> CachedStates:
            if (layer, which) not in cached:
                size = self.recipe.run.batch_size
                cached[layer, which] = cache_states(model, sha256, rows, layer, size, which, self.progress, dtype=dtype)
            return cached[layer, which]

        for cell in cells:
            recovered, modifier = None, self.recovery
            if cell.arm != "none":
                modifier = modifier.with_arm(cell.arm)
                layer = first_layer(cell.arm, modifier.layer, model)
                rows = states(layer, documents.train, "training rows", TRAINING)
                train = partial(self._train, model, rows, documents.tasks, sha256, cell.seed)
                if modifier.sweeps:
                    validation = states(layer, documents.validation, "validation rows")
                    modifier = self._swept(f"{folder_of(setting)}-{cell.arm}", modifier, model, validation, train)
                recovered = train(modifier)
            layer = first_layer(cell.arm, modifier.layer, model)
            test = states(layer, documents.test, "test rows")
            scorable = cell.arm == "none" or not TRAINED[cell.arm].needs_tasks
            text = states(layer, documents.text, "windows of text") if documents.text and scorable else None
            self._score(setting, base, facts, documents, test, text, model, cell, recovered)

    def _train(
        self,
        model: LanguageModel,
        rows: CachedStates,
        tasks: tuple[str, ...],
        base_sha256: str,
        seed: int,
        modifier: PromptRecoveryModifier,
    ) -> Recovered:
        dense = dense_weights(modifier, self.source, model)
        return train_arm(model, rows, tasks, modifier, base_sha256, seed, self.progress, self.taught, dense=dense)

    def _swept(
        self,
        name: str,
        modifier: PromptRecoveryModifier,
        model: LanguageModel,
        validation: CachedStates,
        train: Callable[[PromptRecoveryModifier], Recovered],
    ) -> PromptRecoveryModifier:
        """With the rate found for this arm and setting: once, with the seed that comes first, for all seeds."""
        path = self.folder / "sweeps" / f"{name}.json"
        if not path.exists():
            size = self.recipe.run.batch_size
            found = sweep_rate(modifier, model, validation, lambda one: train(one).adapter, batch_size=size)
            self.progress(told(found), 0, 0)
            write_sweep(found, path)
        return modifier.at_rate(read_sweeps(path.parent)[name]["learning_rate"])

    def _score(
        self,
        setting: Setting,
        base: Path,
        facts: dict[str, Any],
        documents: Documents,
        test: CachedStates,
        text: CachedStates | None,
        model: LanguageModel,
        cell: Cell,
        recovered: Recovered | None,
    ) -> None:
        trained, size = recovered.adapter if recovered else None, self.recipe.run.batch_size
        start = time.perf_counter()
        scores = score(model, test, trained, size, self.progress)
        seconds = time.perf_counter() - start
        scores = with_answers(scores, model, test, trained, self.recipe.run, self.progress)
        on_text = micro(score(model, text, trained, size, self.progress)) if text else None
        name = f"{folder_of(setting)}-{cell.arm}-{cell.seed}"
        adapter = self.folder / "adapters" / name
        if recovered and artifact.read_manifest(adapter) is None:
            publish_adapter(recovered, adapter, {"seed": cell.seed, **provenance(self.device)})
        write_documents(scores, self.folder / "documents" / f"{name}.json")
        domains = recovered.config.tasks if recovered else ()
        row = BenchRow(
            ratio=setting.ratio,
            bits=setting.bits,
            method=setting.method,
            arm=cell.arm,
            seed=cell.seed,
            data=documents.facts["name"],
            perplexity=micro(scores).perplexity,
            perplexity_macro=macro_perplexity(scores),
            exact_match=micro(scores).exact_match,
            documents=micro(scores).documents,
            scored_tokens=micro(scores).scored_tokens,
            sparsity=facts.get("sparsity", 0.0),
            weights=facts.get("weights", 0),
            model_bytes=weights_bytes(base),
            adapter_bytes=adapter_bytes(adapter) if recovered else 0,
            trained_parameters=trained_parameters(trained) if trained else 0,
            train_steps=len(recovered.rows) if recovered else 0,
            train_seconds=recovered.seconds if recovered else 0.0,
            compress_seconds=facts.get("compress_seconds", 0.0),
            evaluate_seconds=seconds,
            text_perplexity=on_text.perplexity if on_text else None,
            rouge_l=micro(scores).rouge_l,
            rouge_l_macro=macro_rouge_l(scores),
            written_exact_match=micro(scores).written_exact_match,
            samples=samples(model, test.documents, scores),
            fallbacks=facts.get("fallbacks", 0),
            peak_bytes=peak_bytes(),
            per_task=task_scores(scores),
            gate=read_gate(model, trained, test, domains, batch_size=size) if trained else None,
            documents_file=f"documents/{name}.json",
        )
        append_row(row, self.folder / "rows.jsonl")
        self.progress(f"{row.setting} {row.arm} seed {row.seed}: perplexity {row.perplexity:.4g}", 0, 0)
