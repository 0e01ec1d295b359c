"""One finished cell of a bench: its adapter and its documents on disk, and its row."""

import shutil
from pathlib import Path

from mopcompress.entrypoints.evaluate import Measurement
from mopcompress.entrypoints.inputs import SplitStates
from mopcompress.entrypoints.recover import publish_adapter
from mopcompress.environment import peak_bytes, provenance
from mopcompress.grid import DENSE, CompressionSetting
from mopcompress.models.model_loading import weights_bytes
from mopcompress.recipe.arms import revision_of
from mopcompress.recover.adapter import TrainedAdapter, trained_parameters
from mopcompress.recover.save_and_load import adapter_bytes
from mopcompress.results import BenchRow, Cell, folder_name, write_documents
from mopcompress.storage import artifacts


def adapter_folder(folder: Path, setting: CompressionSetting, cell: Cell) -> Path:
    """Return the path of a cell's adapter in a bench's `folder`."""
    return folder / "adapters" / f"{folder_name(setting.name)}-{cell.arm}-{cell.seed}"


def record_cell(
    cell: Cell,
    setting: CompressionSetting,
    states: SplitStates,
    measurement: Measurement,
    trained: TrainedAdapter | None,
    folder: Path,
) -> BenchRow:
    """Write the adapter and the document scores of a cell into the bench's `folder`, and return its row."""
    base = states.base
    metadata = (artifacts.read_manifest(base.folder) or {}) if setting != DENSE else {}
    adapter = adapter_folder(folder, setting, cell)
    if trained:
        shutil.rmtree(adapter, ignore_errors=True)  # of a row that was removed, or not written before a kill
        publish_adapter(trained, adapter, {"seed": cell.seed, **provenance(base.model.device)})
    documents_file = f"documents/{adapter.name}.json"
    write_documents(measurement.scores, folder / documents_file)
    return BenchRow(
        ratio=setting.ratio,
        bits=setting.bits,
        method=setting.method,
        arm=cell.arm,
        seed=cell.seed,
        data=states.dataset.facts["name"],
        **measurement.summary(),
        sparsity=metadata.get("sparsity", 0.0),
        weights=metadata.get("weights", 0),
        model_bytes=weights_bytes(base.folder),
        adapter_bytes=adapter_bytes(adapter) if trained else 0,
        trained_parameters=trained_parameters(trained.adapter) if trained else 0,
        train_steps=len(trained.rows) if trained else 0,
        train_seconds=trained.seconds if trained else 0.0,
        compress_seconds=metadata.get("compress_seconds", 0.0),
        evaluate_seconds=measurement.seconds,
        fallbacks=metadata.get("fallbacks", 0),
        peak_bytes=peak_bytes(),
        documents_file=documents_file,
        model_sha256=base.sha256,
        revision=revision_of(cell.arm),
    )
