"""Who teaches: the dense model that a compressed one was made from, or another that is named."""

from collections.abc import Sequence
from pathlib import Path

from mopcompress.data.encoding import Document
from mopcompress.errors import DataError, InputNotFoundError
from mopcompress.models.dense_weights import open_dense_weights
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import load_model, resolve_model, weights_hash
from mopcompress.progress import Progress
from mopcompress.recipe import PromptRecoveryModifier
from mopcompress.recover.adapter import DenseWeights
from mopcompress.recover.distillation import Distillation, Teacher
from mopcompress.storage import artifacts


def build_distillation(
    modifier: PromptRecoveryModifier,
    base: Path,
    model: LanguageModel,
    documents: Sequence[Document],
    batch_size: int,
    progress: Progress,
) -> Distillation | None:
    """What the teacher of the model in `base` makes of the training documents; None where nothing is distilled.

    Its distributions are those kept from another run, or computed and kept; its hidden states are too large for that.
    Raises `InputNotFoundError` without a teacher, `DataError` when it is not the one that the model was made from.
    """
    if not modifier.distill and not modifier.squarehead:
        return None
    folder = resolve_model(modifier.teacher) if modifier.teacher else dense_folder(base)
    teacher = load_model(folder, device=model.device)
    if teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise DataError(f"teacher {folder}: its tokens are not those of {base}; name another --teacher")
    widths = [one.config.vocab_size for one in (teacher, model)]
    if widths[0] != widths[1]:
        raise DataError(
            f"teacher {folder} scores {widths[0]} tokens, padding included, and {base} {widths[1]}; "
            "name another --teacher"
        )
    if modifier.squarehead and (len(teacher.blocks), teacher.hidden_size) != (len(model.blocks), model.hidden_size):
        raise DataError(
            f"teacher {folder} has {len(teacher.blocks)} blocks of width {teacher.hidden_size}, and {base} "
            f"{len(model.blocks)} of {model.hidden_size}: leave --squarehead out, or name another --teacher"
        )
    taught = Teacher(
        teacher,
        documents,
        temperature=modifier.distill_temperature,
        batch_size=batch_size,
        with_hidden_states=bool(modifier.squarehead),
        weights_sha256=weights_hash(folder),
        progress=lambda done: progress.update("teacher, once for all arms: training rows", done, len(documents)),
    )
    return Distillation(taught, modifier.distill, modifier.squarehead)


def teacher_hash(modifier: PromptRecoveryModifier) -> str | None:
    """The hash of the weights of the teacher that the recipe names; None where it names none."""
    return weights_hash(resolve_model(modifier.teacher)) if modifier.teacher else None


def dense_weights(modifier: PromptRecoveryModifier, base: Path, model: LanguageModel) -> DenseWeights | None:
    """The weights that linears had before `base` was compressed, read when asked for; None for an arm that trains.

    Raises as `dense_folder` does.
    """
    if modifier.rate is not None:
        return None
    folder = resolve_model(modifier.teacher) if modifier.teacher else dense_folder(base)
    return open_dense_weights(folder, model.tokenizer, device=model.device)


def dense_folder(base: Path) -> Path:
    """Where the dense model lies that `base` was compressed from, in as many commands as there were.

    Raises `InputNotFoundError` when no manifest says so or the folder is gone, `DataError` when it holds another model.
    """
    folder = base
    while made := (artifacts.read_manifest(folder) or {}).get("base"):
        folder = Path(made["folder"])
        if not folder.is_dir():
            raise InputNotFoundError(
                f"teacher {folder}, which {base} was made from, is not there; name it by --teacher"
            )
        if weights_hash(folder) != made["sha256"]:
            raise DataError(
                f"teacher {folder} has weights {weights_hash(folder)}, but {base} was made from {made['sha256']}; "
                "name the right one by --teacher"
            )
    if folder == base:
        raise InputNotFoundError(
            f"teacher: nothing in {base} says which dense model it was made from; name one by --teacher"
        )
    return folder
