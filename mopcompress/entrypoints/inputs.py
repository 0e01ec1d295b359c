"""Inputs of a run: calibration windows, the dataset, and hidden states of its rows, checked against the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.state_cache import TRAINING_DTYPE, load_or_compute_states
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import OpenedModel, load_model, load_tokenizer
from mopcompress.models.sampling import sample_text
from mopcompress.progress import Progress
from mopcompress.recipe import RunSpec
from mopcompress.storage import artifacts
from mopcompress.storage.cache import cached

FILE = "tokens.safetensors"


@dataclass(frozen=True)
class CalibrationSet:
    """The windows of text that compression is calibrated on, and their entry in a manifest."""

    tokens: Int[Tensor, "samples length"]
    metadata: dict[str, Any]  # source, samples, length in tokens, hash


def load_calibration(run: RunSpec, source: Path, model_sha256: str, progress: Progress) -> CalibrationSet:
    """Load the calibration windows of a run: text that the model writes, training rows, or a text that is named.

    The model is loaded, whole, only when it has to write its own text, and freed afterwards.
    """
    samples, length = run.num_calibration_samples, run.max_seq_length
    if run.calibration == "self":
        tokens = _sampled_text(run, source, model_sha256, progress)
    elif run.calibration == "data":
        tokens = document_windows(load_dataset(run, load_tokenizer(source)).train, samples=samples, length=length)
    else:
        tokens = text_windows(read_text(run.calibration), load_tokenizer(source), samples=samples, length=length)
    metadata = {
        "source": run.calibration,
        "samples": samples,
        "length": length,
        "sha256": artifacts.fingerprint({"tokens": tokens.tolist()}),
    }
    return CalibrationSet(tokens.cpu(), metadata)


def check_calibration(calibration: CalibrationSet, model: LanguageModel) -> None:
    """Raise `DataError` when the windows are longer than the model's learned positions."""
    model.check_context(calibration.tokens.shape[1], "calibration text", "lower --max-seq-length")


def _sampled_text(run: RunSpec, source: Path, model_sha256: str, progress: Progress) -> Int[Tensor, "samples length"]:
    """Sample text from the model, once per model and seed; read it from the cache later."""
    key = {
        "kind": "calibration text sampled from the model",
        "model": model_sha256,
        "samples": run.num_calibration_samples,
        "length": run.max_seq_length,
        "seed": run.seed,
        "torch": torch.__version__,
    }

    def sample() -> Int[Tensor, "samples length"]:
        what = "sampling calibration text from the dense model (once)"
        return sample_text(
            load_model(source, device=choose_device(run.device)),
            samples=run.num_calibration_samples,
            length=run.max_seq_length,
            seed=run.seed,
            progress=lambda done: progress.update(what, done, run.max_seq_length),
        )

    def write(folder: Path, _manifest: dict[str, Any]) -> None:
        save_file({"tokens": sample().cpu()}, folder / FILE)

    def read(folder: Path) -> Int[Tensor, "samples length"]:
        return load_file(folder / FILE)["tokens"]

    size = run.num_calibration_samples * run.max_seq_length * torch.int64.itemsize
    return cached(key, folder="calibration", size=size, write=write, read=read, compute=sample)


def load_dataset_for(model: LanguageModel, run: RunSpec) -> EncodedDataset:
    """Load the run's dataset for a model that has to process it.

    Raises as `load_dataset` does, and `DataError` when a row, a window of text, or a requested answer exceeds the
    model's context.
    """
    dataset = load_dataset(run, model.tokenizer)
    rows = (*dataset.train, *dataset.validation, *dataset.test)
    model.check_context(_longest(rows), f"data {run.data}: a row", "lower --max-length")
    model.check_context(_longest(dataset.text), "run.eval_text: a window", "leave it out")
    if run.max_new_tokens is not None:
        contexts = [document.tokens[: document.context_tokens] for document in dataset.test]
        check_fits(model.network, contexts, run.max_new_tokens)
    return dataset


def _longest(rows: Sequence[Document]) -> int:
    return max((len(row.tokens) for row in rows), default=0)


@dataclass(frozen=True)
class SplitStates:
    """Hidden states of the splits of a dataset under one model: loaded or computed once per split and layer.

    A layer's states are the ones that enter this block. Training rows have a smaller dtype: nothing is scored on them.
    """

    base: OpenedModel
    dataset: EncodedDataset
    batch_size: int  # documents
    progress: Progress
    _cache: dict[tuple[int, str], HiddenStateDataset] = field(default_factory=dict, repr=False)

    def train(self, layer: int) -> HiddenStateDataset:
        """Return the states of the training rows."""
        return self._load(layer, self.dataset.train, "training rows", TRAINING_DTYPE)

    def validation(self, layer: int) -> HiddenStateDataset:
        """Return the states of the validation rows."""
        return self._load(layer, self.dataset.validation, "validation rows")

    def test(self, layer: int) -> HiddenStateDataset:
        """Return the states of the test rows."""
        return self._load(layer, self.dataset.test, "test rows")

    def text(self, layer: int) -> HiddenStateDataset:
        """Return the states of the windows of plain text."""
        return self._load(layer, self.dataset.text, "windows of text")

    def _load(
        self, layer: int, documents: tuple[Document, ...], label: str, dtype: torch.dtype = torch.float32
    ) -> HiddenStateDataset:
        if (layer, label) not in self._cache:
            self._cache[layer, label] = load_or_compute_states(
                self.base.model, self.base.sha256, documents, layer, self.batch_size, label, self.progress, dtype=dtype
            )
        return self._cache[layer, label]
