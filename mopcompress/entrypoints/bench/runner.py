"""`bench`: the grid setting x arm x seed, with one compressed model per setting and one row per finished cell.

A run can be stopped anywhere and started again: finished models and rows stay, a training is resumed from its
checkpoint, and a larger grid runs only what is new. A run with other settings than the folder's raises an error.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mopcompress.data.dataset import EncodedDataset
from mopcompress.entrypoints.bench.cell import adapter_folder, record_cell
from mopcompress.entrypoints.bench.manifest import check_rows, continue_manifest, write_manifest
from mopcompress.entrypoints.bench.protocol import new_manifest
from mopcompress.entrypoints.compress import compress_into
from mopcompress.entrypoints.evaluate import measure
from mopcompress.entrypoints.from_recipe import adapter_config, first_layer
from mopcompress.entrypoints.inputs import CalibrationSet, SplitStates, load_calibration, load_dataset_for
from mopcompress.entrypoints.lr_sweep import check_validation
from mopcompress.entrypoints.teacher import build_distillation, load_dense_weights
from mopcompress.entrypoints.train_adapter import TrainingSetup, log_expert_count, train_with_sweep
from mopcompress.environment import choose_device, now, provenance
from mopcompress.errors import DataError
from mopcompress.grid import DENSE, CompressionSetting, cells_of, modifiers_of, settings_of
from mopcompress.models.model_loading import OpenedModel, open_model
from mopcompress.models.smollm2 import NOTE
from mopcompress.progress import Progress, silent
from mopcompress.recipe import PromptRecoveryModifier, Recipe
from mopcompress.recipe.pruning_modifiers import replace_checked
from mopcompress.recover.checkpoint import CheckpointFolder, resumable_training
from mopcompress.recover.distillation import Distillation
from mopcompress.recover.methods.eora import check_dense_shapes
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.report import write_report
from mopcompress.results import (
    BenchRow,
    Cell,
    append_row,
    folder_name,
    read_rows,
    read_sweeps,
    sweep_name,
)
from mopcompress.storage import artifacts
from mopcompress.storage.cache import cache_folder

ROWS, SWEEPS = "rows.jsonl", "sweeps"


def bench(recipe: Recipe, folder: Path, *, command: str = "", progress: Progress = silent) -> list[BenchRow]:
    """Run the cells of a grid that are still missing, write the report, and return all rows of the folder.

    The grid is compression setting x arm x seed, from `run:` of the recipe: `methods`, `ratios`, `bits`, `arms` and
    `seeds`. Each setting compresses the model once; each of its arms is trained on the compressed model and scored on
    the same test rows. A finished cell is never run again, and a run that was stopped is resumed.

    Args:
        recipe: Checked settings, as `load_recipe` returns them.
        folder: The run's folder; it is created, or continued. It gets `run.json`, `rows.jsonl`, `models/`,
            `adapters/`, `documents/`, `sweeps/` and the report in three formats.
        command: The command line, for the manifest.
        progress: Receives messages and counts.

    Returns:
        One row per cell, in the order in which they were measured: perplexities, the exact match as a fraction of
        documents, sizes in bytes, and times in seconds.

    Raises:
        RecipeError: The folder was made with other settings.
        OutputError: Another run is using the folder.
        UsageError: The grid is empty, or the model cannot have an arm as the recipe asks for it.
        DataError: The data do not fit the model or an arm, or finished rows are of another model or arm.
        QualityGateError: Too many matrices needed more damping than asked for.

    Example:
        Prune a tiny random model to half of its weights, and repair it with EoRA:

        >>> import tempfile
        >>> from pathlib import Path
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from mopcompress import bench, load_recipe
        >>> folder = Path(tempfile.mkdtemp())
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        >>> LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)).save_pretrained(folder / "model")
        >>> words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")
        >>> _ = tokenizer.save_pretrained(folder / "model")
        >>> flags = {"model": str(folder / "model"), "ratios": "0.5", "arms": "none,eora", "device": "cpu"}
        >>> recipe = load_recipe(None, flags | {"train_rows": "24", "test_rows": "12", "max_seq_length": "64"})
        >>> rows = bench(recipe, folder / "run")
        >>> [(row.setting, row.arm, row.sparsity) for row in rows]
        [('dense', 'none', 0.0), ('sparsegpt 50%', 'none', 0.5), ('sparsegpt 50%', 'eora', 0.5)]
    """
    with artifacts.locked(folder):
        for scratch in (*folder.glob("models/.*.partial-*"), *folder.glob("adapters/.*.partial-*")):
            shutil.rmtree(scratch)  # of a run that was killed
        return _run(recipe, folder, command, progress)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Everything that the cells of one run share."""

    recipe: Recipe
    recovery: PromptRecoveryModifier  # the recipe's, with a teacher: the bench's own dense model unless it names one
    folder: Path
    source: Path  # of the dense model
    dataset: EncodedDataset
    distillation: Distillation | None
    calibration: CalibrationSet
    progress: Progress

    def cells(self, setting: CompressionSetting) -> list[Cell]:
        """Return the cells of a setting, those included that are finished."""
        return cells_of(self.recipe.run.model_dump(by_alias=True), setting)

    def finished_rows(self) -> list[BenchRow]:
        """Read the rows of finished cells."""
        return read_rows(self.folder / ROWS)

    def run_setting(self, setting: CompressionSetting) -> None:
        """Compress the model of one setting unless it is there, and fill the cells that have no row yet."""
        finished = {row.cell for row in self.finished_rows()}
        missing = [cell for cell in self.cells(setting) if cell not in finished]
        if missing:
            base = self._open(setting, self._compress(setting))
            states = SplitStates(base, self.dataset, self.recipe.run.eval_batch_size, self.progress)
            for cell in missing:
                self._fill(cell, setting, states)

    def _compress(self, setting: CompressionSetting) -> Path:
        """Return the folder of the setting's model, and write it if it is missing."""
        if setting == DENSE:
            return self.source
        target = self.folder / "models" / folder_name(setting.name)
        if artifacts.read_manifest(target) is None:
            compress_into(
                target,
                self.source,
                modifiers_of(self.recipe, setting),
                self.calibration,
                self.recipe,
                progress=self.progress,
                restart_on_mismatch=True,
            )
        return target

    def _open(self, setting: CompressionSetting, folder: Path) -> OpenedModel:
        """Load the setting's model. Raises `DataError` when finished rows are of another one."""
        base = open_model(str(folder), device=choose_device(self.recipe.run.device))
        hashes = {row.model_sha256 for row in self.finished_rows() if row.setting == setting.name}
        if hashes - {None, base.sha256}:
            raise DataError(
                f"{self.folder}: finished rows of {setting.name} are of another model than models/ holds now, as "
                "pruning with other threads gives; restore that model, or use another --output-dir"
            )
        return base

    def _fill(self, cell: Cell, setting: CompressionSetting, states: SplitStates) -> None:
        """Train and measure one cell, and append its row."""
        modifier = self.recovery if cell.arm == "none" else self.recovery.with_arm(cell.arm)
        layer = first_layer(cell.arm, modifier.layer, states.base.model)
        trained = None
        with nullcontext() if cell.arm == "none" else self._resumable(cell, setting, states.base) as checkpoints:
            if checkpoints:
                setup = TrainingSetup(
                    states=states,
                    seed=cell.seed,
                    progress=self.progress,
                    dense_weights=load_dense_weights(modifier, states.base),
                    distillation=self.distillation,
                    checkpoints=checkpoints,
                )
                # one sweep per arm and setting, with the first seed, serves all seeds
                sweep_file = self.folder / SWEEPS / f"{sweep_name(setting.name, cell.arm)}.json"
                trained, _ = train_with_sweep(modifier, setup, sweep_file=sweep_file)
            measurement = measure(
                states,
                layer,
                trained.adapter if trained else None,
                trained.config if trained else None,
                max_new_tokens=self.recipe.run.max_new_tokens,
                progress=self.progress,
            )
            row = record_cell(cell, setting, states, measurement, trained, self.folder)
            append_row(row, self.folder / ROWS)
        self.progress.message(f"{row.setting} {row.arm} seed {row.seed}: perplexity {row.perplexity:.4g}")

    def _resumable(
        self, cell: Cell, setting: CompressionSetting, base: OpenedModel
    ) -> AbstractContextManager[CheckpointFolder]:
        """Return the training of a cell. Its settings are the folder's: only model, code and machine can differ."""
        origin = provenance(base.model.device)
        job = {name: origin[name] for name in ("versions", "commit", "device", "threads")} | {"model": base.sha256}
        target = adapter_folder(self.folder, setting, cell)
        return resumable_training(target, job, self.progress.message, restart_on_mismatch=True)


def _run(recipe: Recipe, folder: Path, command: str, progress: Progress) -> list[BenchRow]:
    start, settings = time.perf_counter(), settings_of(recipe)
    grid, model = _prepare(recipe, folder, progress)
    manifest = new_manifest(recipe, model, grid.dataset, grid.calibration.metadata)
    manifest |= {"command": command, **provenance(choose_device(recipe.run.device))}
    manifest = continue_manifest(manifest, folder)
    earlier_seconds = manifest["seconds"] or 0.0
    check_rows(folder, [cell for setting in settings for cell in grid.cells(setting)])
    write_manifest(manifest, folder)
    for setting in settings:
        grid.run_setting(setting)
        manifest["seconds"] = earlier_seconds + time.perf_counter() - start
        manifest["sweeps"] = {name: asdict(sweep) for name, sweep in read_sweeps(folder / SWEEPS).items()}
        write_manifest(manifest, folder)
    write_manifest(manifest | {"finished": now()}, folder)
    write_report(folder)
    return grid.finished_rows()


def _prepare(recipe: Recipe, folder: Path, progress: Progress) -> tuple[_Grid, dict[str, Any]]:
    """Load what all cells share, after a check that every arm can be built; return it and the manifest's model.

    The dense model is freed again: each setting loads its own.
    """
    source = open_model(recipe.run.model, device=choose_device(recipe.run.device), log=progress.message)
    recovery = replace_checked(recipe.recovery, teacher=recipe.recovery.teacher or str(source.folder))
    dataset = load_dataset_for(source.model, recipe.run)
    arms = [recovery.with_arm(arm) for arm in recipe.run.trained_arms]
    log_expert_count(arms, dataset.tasks, progress)
    _check_arms(recovery, arms, source, dataset)
    check_validation(dataset, recipe.run.data, arms)
    distillation = build_distillation(recovery, source, dataset.train, recipe.run.eval_batch_size, progress)
    model = {
        "name": recipe.run.model,
        "sha256": source.sha256,
        "weights": source.model.network.num_parameters(),
        "note": NOTE if source.folder.is_relative_to(cache_folder()) else None,
    }
    source_folder, sha256 = source.folder, source.sha256
    del source
    grid = _Grid(
        recipe=recipe,
        recovery=recovery,
        folder=folder,
        source=source_folder,
        dataset=dataset,
        distillation=distillation,
        calibration=load_calibration(recipe.run, source_folder, sha256, progress),
        progress=progress,
    )
    return grid, model


def _check_arms(
    recovery: PromptRecoveryModifier,
    arms: Sequence[PromptRecoveryModifier],
    source: OpenedModel,
    dataset: EncodedDataset,
) -> None:
    """Build every arm's adapter on the dense model, without training. Raises as that does."""
    first_layer("none", recovery.layer, source.model)
    for modifier in arms:
        config = adapter_config(modifier, source.model, dataset.tasks, source.sha256)
        adapter = RECOVERY_METHODS[modifier.arm].build(source.model, config)
        check_dense_shapes(adapter, source.model, load_dense_weights(modifier, source))
