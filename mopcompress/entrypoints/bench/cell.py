"""One cell of a bench: an arm on a compressed model, scored; its adapter and its documents on disk, and its row."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from mopcompress.entrypoints.evaluate import score
from mopcompress.entrypoints.recover import publish_adapter
from mopcompress.environment import peak_bytes, provenance
from mopcompress.evaluation.generation_metrics import sample_answers, score_generation
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import macro_perplexity, macro_rouge_l, micro_average, task_scores
from mopcompress.grid import DENSE, Cell, CompressionSetting
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import weights_bytes
from mopcompress.progress import Progress
from mopcompress.recipe import RunSpec
from mopcompress.recipe.arms import revision_of
from mopcompress.recover.adapter import TrainedAdapter, trained_parameters
from mopcompress.recover.gate_statistics import measure_gate
from mopcompress.recover.save_and_load import adapter_bytes
from mopcompress.results import BenchRow, folder_name, write_documents
from mopcompress.storage import artifacts


def adapter_folder(folder: Path, setting: CompressionSetting, cell: Cell) -> Path:
    """Where a bench's `folder` has, or will have, the adapter of a cell."""
    return folder / "adapters" / f"{folder_name(setting.name)}-{cell.arm}-{cell.seed}"


@dataclass(frozen=True)
class OpenedModel:
    """What all cells of one setting stand on."""

    setting: CompressionSetting
    folder: Path
    sha256: str  # of its weights
    model: LanguageModel


def score_cell(
    cell: Cell,
    base: OpenedModel,
    test: HiddenStateDataset,
    text: HiddenStateDataset | None,
    recovered: TrainedAdapter | None,
    *,
    run: RunSpec,
    data: str,
    folder: Path,
    progress: Progress,
) -> BenchRow:
    """Score what `recovered` gives on the base, and leave adapter and documents in the bench's `folder`."""
    setting, model, size = base.setting, base.model, run.eval_batch_size
    facts = (artifacts.read_manifest(base.folder) or {}) if setting != DENSE else {}
    trained = recovered.adapter if recovered else None
    start = time.perf_counter()
    scores = score(model, test, trained, size, progress)
    seconds = time.perf_counter() - start
    if run.max_new_tokens is not None:
        scores = score_generation(
            scores,
            model,
            test,
            trained.compile_for_inference(model) if trained else None,
            max_new_tokens=run.max_new_tokens,
            batch_size=size,
            progress=progress,
        )
    overall = micro_average(scores)
    on_text = micro_average(score(model, text, trained, size, progress)) if text else None
    adapter = adapter_folder(folder, setting, cell)
    if recovered:
        shutil.rmtree(adapter, ignore_errors=True)  # of a row that was taken out, or was not written any more
        publish_adapter(recovered, adapter, {"seed": cell.seed, **provenance(model.device)})
    write_documents(scores, folder / "documents" / f"{adapter.name}.json")
    domains = recovered.config.tasks if recovered else ()
    return BenchRow(
        ratio=setting.ratio,
        bits=setting.bits,
        method=setting.method,
        arm=cell.arm,
        seed=cell.seed,
        data=data,
        perplexity=overall.perplexity,
        perplexity_macro=macro_perplexity(scores),
        exact_match=overall.exact_match,
        documents=overall.documents,
        scored_tokens=overall.scored_tokens,
        sparsity=facts.get("sparsity", 0.0),
        weights=facts.get("weights", 0),
        model_bytes=weights_bytes(base.folder),
        adapter_bytes=adapter_bytes(adapter) if recovered else 0,
        trained_parameters=trained_parameters(trained) if trained else 0,
        train_steps=len(recovered.rows) if recovered else 0,
        train_seconds=recovered.seconds if recovered else 0.0,
        compress_seconds=facts.get("compress_seconds", 0.0),
        evaluate_seconds=seconds,
        text_perplexity=on_text.perplexity if on_text else None,
        rouge_l=overall.rouge_l,
        rouge_l_macro=macro_rouge_l(scores),
        written_exact_match=overall.written_exact_match,
        samples=sample_answers(model, test.documents, scores),
        fallbacks=facts.get("fallbacks", 0),
        peak_bytes=peak_bytes(),
        per_task=task_scores(scores),
        gate=measure_gate(model, trained, test, domains, batch_size=size) if trained else None,
        documents_file=f"documents/{adapter.name}.json",
        model_sha256=base.sha256,
        revision=revision_of(cell.arm),
    )
