"""Where calibration tokens come from: the model's own text, the training rows, or text that the user names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from mopcompress.data.dataset import EncodedDataset, load_dataset
from mopcompress.data.encoding import Document
from mopcompress.data.text_windows import document_windows, read_text, text_windows
from mopcompress.environment import choose_device
from mopcompress.evaluation.generation import check_fits
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import load_model, load_tokenizer
from mopcompress.models.sampling import sample_text
from mopcompress.progress import Progress
from mopcompress.recipe import RunSpec
from mopcompress.storage import artifacts
from mopcompress.storage.cache import cache_folder

FILE = "tokens.safetensors"


def calibration_tokens(
    run: RunSpec, source: Path, model_sha256: str, progress: Progress
) -> tuple[Int[Tensor, "samples length"], dict[str, Any]]:
    """The windows that compression is calibrated on, and what a report says of them.

    The model is loaded, whole, only when it has to write its own text, and let go again.
    """
    samples, length = run.num_calibration_samples, run.max_seq_length
    if run.calibration == "self":
        tokens = _own_text(run, source, model_sha256, progress)
    elif run.calibration == "data":
        tokens = document_windows(load_dataset(run, load_tokenizer(source)).train, samples=samples, length=length)
    else:
        tokens = text_windows(read_text(run.calibration), load_tokenizer(source), samples=samples, length=length)
    facts = {
        "source": run.calibration,
        "samples": samples,
        "length": length,
        "sha256": artifacts.fingerprint({"tokens": tokens.tolist()}),
    }
    return tokens.cpu(), facts


def check_calibration(tokens: Int[Tensor, "samples length"], model: LanguageModel) -> None:
    """Raise `DataError` when the windows are longer than what the model has learned positions for."""
    model.check_context(tokens.shape[1], "calibration text", "lower --max-seq-length")


def _own_text(run: RunSpec, source: Path, model_sha256: str, progress: Progress) -> Int[Tensor, "samples length"]:
    """Sampled once for a model and a seed, then read from the cache."""
    facts = {
        "kind": "calibration text sampled from the model",
        "model": model_sha256,
        "samples": run.num_calibration_samples,
        "length": run.max_seq_length,
        "seed": run.seed,
        "torch": torch.__version__,
    }
    folder = cache_folder() / "calibration" / artifacts.fingerprint(facts)
    if not (folder / artifacts.MANIFEST).exists():
        what = "sampling calibration text from the dense model (once)"
        tokens = sample_text(
            load_model(source, device=choose_device(run.device)),
            samples=run.num_calibration_samples,
            length=run.max_seq_length,
            seed=run.seed,
            progress=lambda done: progress.update(what, done, run.max_seq_length),
        )
        with artifacts.publish(folder, facts) as scratch:
            save_file({"tokens": tokens.cpu()}, scratch / FILE)
    artifacts.verify(folder)
    return load_file(folder / FILE)["tokens"]


def load_dataset_for(model: LanguageModel, run: RunSpec) -> EncodedDataset:
    """The same for a model that is to run on them.

    Raises `DataError`, besides, when a row, a window of text, or an answer that the run asks for exceeds its context.
    """
    documents = load_dataset(run, model.tokenizer)
    rows = (*documents.train, *documents.validation, *documents.test)
    model.check_context(_longest(rows), f"data {run.data}: a row", "lower --max-length")
    model.check_context(_longest(documents.text), "--text: a window", "leave it out")
    if run.max_new_tokens is not None:
        check_fits(model.network, [one.tokens[: one.context_tokens] for one in documents.test], run.max_new_tokens)
    return documents


def _longest(rows: Sequence[Document]) -> int:
    return max((len(row.tokens) for row in rows), default=0)
