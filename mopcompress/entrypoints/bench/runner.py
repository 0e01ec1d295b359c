"""`bench`: the grid setting x arm x seed, one compressed model a setting, one row a finished cell.

A run can be stopped anywhere and started again: compressed models and rows that are finished are kept, a training goes
on where it stopped, a larger grid runs only what is new, and a run with other settings than the folder's is refused.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mopcompress.data.dataset import EncodedDataset
from mopcompress.entrypoints.bench.cell import OpenedModel, adapter_folder, score_cell
from mopcompress.entrypoints.bench.manifest import continue_manifest, write_manifest
from mopcompress.entrypoints.bench.protocol import new_manifest
from mopcompress.entrypoints.compress import compress_into
from mopcompress.entrypoints.from_recipe import adapter_config, first_layer
from mopcompress.entrypoints.inputs import calibration_tokens, load_dataset_for
from mopcompress.entrypoints.lr_sweep import (
    Train,
    check_validation,
    describe_sweep,
    read_trials,
    sweep_rate,
    write_sweep,
    write_trials,
)
from mopcompress.entrypoints.teacher import build_distillation, dense_weights
from mopcompress.entrypoints.train_adapter import log_expert_count, train_adapter
from mopcompress.environment import choose_device, now, provenance
from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.state_cache import TRAINING_DTYPE, load_or_compute_states
from mopcompress.grid import DENSE, CompressionSetting, cells_of, modifiers_of, settings_of
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import load_model, resolve_model, weights_hash
from mopcompress.models.smollm2 import NOTE
from mopcompress.progress import Progress, silent
from mopcompress.recipe import PromptRecoveryModifier, Recipe
from mopcompress.recipe.arms import ARM_DEFAULTS, revision_of
from mopcompress.recipe.pruning_modifiers import replace_checked
from mopcompress.recover.adapter import AdapterInputs, TrainedAdapter
from mopcompress.recover.checkpoint import CheckpointFolder, resumable_training
from mopcompress.recover.methods.eora import check_dense_shapes
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.report import write_report
from mopcompress.results import (
    BenchRow,
    Cell,
    append_row,
    check_comparable,
    folder_name,
    read_rows,
    read_sweeps,
    sweep_name,
)
from mopcompress.storage import artifacts
from mopcompress.storage.cache import cache_folder


def bench(recipe: Recipe, folder: Path, *, command: str = "", progress: Progress = silent) -> list[BenchRow]:
    """Run what the grid still lacks, write the report, and return all rows of the folder.

    Raises `RecipeError` when the folder was made with other settings, `OutputError` when another run is using it,
    and, before anything is written, `UsageError` or `DataError` when an arm cannot be as the recipe wants it.
    """
    with artifacts.locked(folder):
        for unfinished in (*folder.glob("models/.*.partial-*"), *folder.glob("adapters/.*.partial-*")):
            shutil.rmtree(unfinished)  # what a killed run was building
        return _BenchRun(recipe, folder, command, progress).run()


def check_rows(folder: Path, cells: Sequence[Cell]) -> None:
    """Raise `DataError` where rows of `folder` cannot be compared with each other, or with those still to come."""
    path = folder / "rows.jsonl"
    rows = read_rows(path)
    check_comparable(rows, path)
    missing = {cell.arm for cell in {*cells} - {row.cell for row in rows}}
    for row in rows:
        if row.arm in missing and row.revision != revision_of(row.arm):
            raise DataError(
                f"{path}: {row.arm} has changed since (revision {row.revision}, now {revision_of(row.arm)}), so that "
                "its other cells would be of another arm; use another --output-dir"
            )


class _BenchRun:
    """What all cells of one run share."""

    def __init__(self, recipe: Recipe, folder: Path, command: str, progress: Progress) -> None:
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.device = choose_device(recipe.run.device)
        self.source = resolve_model(recipe.run.model, progress=progress.message)
        self.source_sha256 = weights_hash(self.source)
        # the bench's own dense model teaches, unless another is named
        self.recovery = replace_checked(recipe.recovery, teacher=recipe.recovery.teacher or str(self.source))
        self.command = command

    def run(self) -> list[BenchRow]:
        start, settings = time.perf_counter(), settings_of(self.recipe)
        model = load_model(self.source, device=self.device)
        documents = load_dataset_for(model, self.recipe.run)
        arms = [self.recovery.with_arm(arm) for arm in self.recipe.run.trained_arms]
        log_expert_count(arms, documents.tasks, self.progress)
        first_layer("none", self.recovery.layer, model)
        for one in arms:
            config = adapter_config(one, model, documents.tasks, self.source_sha256)
            adapter = RECOVERY_METHODS[one.arm].build(model, config)
            check_dense_shapes(adapter, model, dense_weights(one, self.source, model))
        check_validation(documents, self.recipe.run.data, arms)
        size = self.recipe.run.eval_batch_size
        self.taught = build_distillation(self.recovery, self.source, model, documents.train, size, self.progress)
        weights = model.network.num_parameters()
        del model  # each setting loads its own
        tokens, calibration = calibration_tokens(self.recipe.run, self.source, self.source_sha256, self.progress)
        model_facts = {"name": self.recipe.run.model, "sha256": self.source_sha256, "weights": weights}
        note = NOTE if self.source.is_relative_to(cache_folder()) else None
        manifest = new_manifest(self.recipe, model_facts | {"note": note}, documents, calibration)
        manifest |= {"command": self.command, **provenance(self.device)}
        manifest = continue_manifest(manifest, self.folder)
        before = manifest["seconds"] or 0.0
        check_rows(
            self.folder, [cell for one in settings for cell in cells_of(self.recipe.run.model_dump(by_alias=True), one)]
        )
        write_manifest(manifest, self.folder)
        for setting in settings:
            done = {row.cell for row in read_rows(self.folder / "rows.jsonl")}
            missing = [
                cell for cell in cells_of(self.recipe.run.model_dump(by_alias=True), setting) if cell not in done
            ]
            if missing:
                self._fill(self._base(setting, self._compressed(setting, tokens, calibration)), documents, missing)
            manifest["seconds"] = before + time.perf_counter() - start
            manifest["sweeps"] = {name: asdict(one) for name, one in read_sweeps(self.folder / "sweeps").items()}
            write_manifest(manifest, self.folder)
        write_manifest(manifest | {"finished": now()}, self.folder)
        write_report(self.folder)
        return read_rows(self.folder / "rows.jsonl")

    def _compressed(self, setting: CompressionSetting, tokens: Any, calibration: dict[str, Any]) -> Path:
        """The folder of the setting's model, made when it is not there."""
        if setting == DENSE:
            return self.source
        target = self.folder / "models" / folder_name(setting.name)
        if artifacts.read_manifest(target) is None:
            modifiers = modifiers_of(self.recipe, setting)
            compress_into(
                target,
                self.source,
                modifiers,
                tokens,
                calibration,
                self.recipe,
                progress=self.progress,
                restart_on_mismatch=True,
            )
        return target

    def _base(self, setting: CompressionSetting, compressed: Path) -> OpenedModel:
        """The setting's model. Raises `DataError` when finished rows are of another one."""
        sha256 = weights_hash(compressed)
        finished = [row for row in read_rows(self.folder / "rows.jsonl") if row.setting == setting.name]
        if {row.model_sha256 for row in finished} - {None, sha256}:
            raise DataError(
                f"{self.folder}: finished rows of {setting.name} are of another model than models/ holds now, as "
                "pruning with other threads gives; restore that model, or use another --output-dir"
            )
        return OpenedModel(setting, compressed, sha256, load_model(compressed, device=self.device))

    def _fill(self, base: OpenedModel, documents: EncodedDataset, cells: Sequence[Cell]) -> None:
        """Train and score the missing cells of one setting, on states that they share."""
        model, sha256 = base.model, base.sha256
        cached: dict[tuple[int, str], HiddenStateDataset] = {}

        def states(
            layer: int, rows: tuple[Any, ...], which: str, dtype: torch.dtype = torch.float32
        ) -> HiddenStateDataset:
            if (layer, which) not in cached:
                size = self.recipe.run.eval_batch_size
                cached[layer, which] = load_or_compute_states(
                    model, sha256, rows, layer, size, which, self.progress, dtype=dtype
                )
            return cached[layer, which]

        for cell in cells:
            modifier = self.recovery if cell.arm == "none" else self.recovery.with_arm(cell.arm)
            layer = first_layer(cell.arm, modifier.layer, model)
            trained, adapter = cell.arm != "none", adapter_folder(self.folder, base.setting, cell)
            with self._unfinished(adapter, sha256) if trained else nullcontext() as checkpoints:
                recovered = None
                if checkpoints:
                    rows = states(layer, documents.train, "training rows", TRAINING_DTYPE)
                    material = AdapterInputs(model, rows, documents.tasks, dense_weights(modifier, self.source, model))
                    train = self._training(material, sha256, cell.seed, checkpoints)
                    if modifier.sweeps:
                        validation = states(layer, documents.validation, "validation rows")
                        name = sweep_name(base.setting.name, cell.arm)
                        modifier, recovered = self._swept(name, modifier, model, validation, train, checkpoints)
                    recovered = recovered or train(modifier)
                test = states(layer, documents.test, "test rows")
                scorable = cell.arm == "none" or not ARM_DEFAULTS[cell.arm].needs_tasks
                text = states(layer, documents.text, "windows of text") if documents.text and scorable else None
                row = score_cell(
                    cell,
                    base,
                    test,
                    text,
                    recovered,
                    run=self.recipe.run,
                    data=documents.facts["name"],
                    folder=self.folder,
                    progress=self.progress,
                )
                append_row(row, self.folder / "rows.jsonl")
            self.progress.message(f"{row.setting} {row.arm} seed {row.seed}: perplexity {row.perplexity:.4g}")

    def _unfinished(self, adapter: Path, base_sha256: str) -> AbstractContextManager[CheckpointFolder]:
        """A cell's training so far. Its settings are the folder's: only model, code and machine can be others."""
        facts = provenance(self.device)
        job = {name: facts[name] for name in ("versions", "commit", "device", "threads")} | {"model": base_sha256}
        return resumable_training(adapter, job, self.progress.message, restart_on_mismatch=True)

    def _training(self, material: AdapterInputs, base_sha256: str, seed: int, checkpoints: CheckpointFolder) -> Train:
        """How a cell's arm is trained, whatever the rate."""
        return partial(
            train_adapter,
            material=material,
            base_sha256=base_sha256,
            seed=seed,
            progress=self.progress,
            distillation=self.taught,
            checkpoints=checkpoints,
        )

    def _swept(
        self,
        name: str,
        modifier: PromptRecoveryModifier,
        model: LanguageModel,
        validation: HiddenStateDataset,
        train: Train,
        checkpoints: CheckpointFolder,
    ) -> tuple[PromptRecoveryModifier, TrainedAdapter | None]:
        """With the rate found for this arm and setting: once, with the seed that comes first, for all seeds.

        The training too, where the sweep was done here and its trials were as long.
        """
        path, recovered = self.folder / "sweeps" / f"{name}.json", None
        if not path.exists():
            found, recovered = sweep_rate(
                modifier,
                model,
                validation,
                train,
                batch_size=self.recipe.run.eval_batch_size,
                known=read_trials(checkpoints.folder),
                keep=partial(write_trials, folder=checkpoints.folder),
            )
            self.progress.message(describe_sweep(found))
            write_sweep(found, path)
        return modifier.at_rate(read_sweeps(path.parent)[name].learning_rate), recovered
