"""The teacher of a recovery: the dense model that a compressed one was made from, or another model by name."""

from collections.abc import Sequence
from pathlib import Path

from mopcompress.data.encoding import Document
from mopcompress.errors import DataError, InputNotFoundError
from mopcompress.models.dense_weights import open_dense_weights
from mopcompress.models.model_loading import OpenedModel, load_model, resolve_model, weights_hash
from mopcompress.progress import Progress
from mopcompress.recipe import PromptRecoveryModifier
from mopcompress.recover.adapter import DenseWeights
from mopcompress.recover.distillation import Distillation, Teacher
from mopcompress.storage import artifacts


def build_distillation(
    modifier: PromptRecoveryModifier,
    base: OpenedModel,
    documents: Sequence[Document],
    batch_size: int,
    progress: Progress,
) -> Distillation | None:
    """Run the teacher of `base` on the training documents; None when the recipe does not distill.

    Its distributions come from the cache when an earlier run computed them; its hidden states are too large for that.
    Raises `InputNotFoundError` without a teacher, `DataError` when it does not fit the model or has changed.
    """
    if not modifier.distill and not modifier.squarehead:
        return None
    model = base.model
    folder = _teacher_folder(modifier, base)
    teacher = load_model(folder, device=model.device)
    if teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise DataError(f"teacher {folder}: its tokens are not those of {base.folder}; name another recovery.teacher")
    if teacher.config.vocab_size != model.config.vocab_size:
        raise DataError(
            f"teacher {folder} scores {teacher.config.vocab_size} tokens, padding included, and {base.folder} "
            f"{model.config.vocab_size}; name another recovery.teacher"
        )
    if modifier.squarehead and (len(teacher.blocks), teacher.hidden_size) != (len(model.blocks), model.hidden_size):
        raise DataError(
            f"teacher {folder} has {len(teacher.blocks)} blocks of width {teacher.hidden_size}, and {base.folder} "
            f"{len(model.blocks)} of {model.hidden_size}: leave recovery.squarehead out, or name another "
            "recovery.teacher"
        )
    outputs = Teacher(
        teacher,
        documents,
        temperature=modifier.distill_temperature,
        batch_size=batch_size,
        with_hidden_states=bool(modifier.squarehead),
        weights_sha256=weights_hash(folder),
        progress=lambda done: progress.update("teacher, once for all arms: training rows", done, len(documents)),
    )
    return Distillation(outputs, modifier.distill, modifier.squarehead)


def teacher_hash(modifier: PromptRecoveryModifier) -> str | None:
    """Return the hash of the weights of the teacher that the recipe names; None when it names none."""
    return weights_hash(resolve_model(modifier.teacher)) if modifier.teacher else None


def load_dense_weights(modifier: PromptRecoveryModifier, base: OpenedModel) -> DenseWeights | None:
    """Return a reader of the weights that linears had before compression; None for an arm that takes training steps.

    Raises as `dense_folder` does.
    """
    if modifier.rate is not None:
        return None
    return open_dense_weights(_teacher_folder(modifier, base), base.model.tokenizer, device=base.model.device)


def _teacher_folder(modifier: PromptRecoveryModifier, base: OpenedModel) -> Path:
    return resolve_model(modifier.teacher) if modifier.teacher else dense_folder(base.folder)


def dense_folder(base: Path) -> Path:
    """Return the folder of the dense model that `base` was compressed from, by any number of commands.

    Raises `InputNotFoundError` when no manifest names it or it is gone, `DataError` when it holds another model.
    """
    folder = base
    while made := (artifacts.read_manifest(folder) or {}).get("base"):
        folder = Path(made["folder"])
        if not folder.is_dir():
            raise InputNotFoundError(
                f"teacher {folder}, which {base} was made from, is not there; name it by recovery.teacher"
            )
        if weights_hash(folder) != made["sha256"]:
            raise DataError(
                f"teacher {folder} has weights {weights_hash(folder)}, but {base} was made from {made['sha256']}; "
                "name the right one by recovery.teacher"
            )
    if folder == base:
        raise InputNotFoundError(
            f"teacher: nothing in {base} says which dense model it was made from; name one by recovery.teacher"
        )
    return folder
