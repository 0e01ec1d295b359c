"""A teacher's distributions on disk, so that another run, arm or process on the same rows need not run it again."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mopcompress.data.encoding import Encoded
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover import distillation
from mopcompress.recover.distillation import Kept, Store
from mopcompress.storage.cache import facts_of, kept

FILE = "distributions.safetensors"


def store_of(teacher: LanguageModel, sha256: str, documents: Sequence[Encoded], *, temperature: float) -> Store:
    """Keeps what a teacher with these weights says of the documents.

    At one temperature: the share of all tokens that are not kept one by one cannot be had at another.
    """
    facts = facts_of(teacher, sha256, documents) | {
        "kind": "distributions of a teacher",
        "top": distillation.TOP,
        "temperature": temperature,
    }
    scored = sum(len(document.tokens) - document.context_tokens for document in documents)
    return partial(_kept, facts, scored * (2 * distillation.TOP + 1) * 4)


def _kept(facts: Mapping[str, Any], size: int, run: Callable[[], Kept]) -> Kept:
    def write(scratch: Path, _manifest: dict[str, Any]) -> None:
        found = run()
        save_file({"tokens": found.tokens, "log_shares": found.log_shares}, scratch / FILE)

    return kept(facts, size=size, write=write, read=lambda folder: Kept(**load_file(folder / FILE)), otherwise=run)
