"""A finished or partial run folder, read and checked: rows, manifest, document scores, sweeps."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopcompress.errors import DataError, InputNotFoundError, RefusedError
from mopcompress.results import (
    BenchRow,
    Cell,
    DocumentScores,
    Sweep,
    check_comparable,
    read_documents,
    read_rows,
    read_sweeps,
)


@dataclass(frozen=True)
class Run:
    """Everything that a report is made of. All cells have the same tasks and scored tokens, in the same order."""

    rows: tuple[BenchRow, ...]
    manifest: Mapping[str, Any]  # run.json; empty when it is missing
    documents: Mapping[Cell, DocumentScores]
    sweeps: Mapping[str, Sweep]  # by `results.sweep_name`

    @property
    def spec(self) -> Mapping[str, Any]:
        """The `run` part of the resolved recipe; empty when it was not recorded."""
        return section(section(self.manifest, "recipe"), "run")


def section(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a part of the manifest; empty when it is missing or null."""
    part = manifest.get(name)
    return part if isinstance(part, dict) else {}


def read_run(folder: Path) -> Run:
    """Read `rows.jsonl`, `run.json`, the documents that the rows name, and the sweeps.

    Raises `InputNotFoundError` when there is nothing to report on, `DataError` when the parts contradict each other,
    `RefusedError` when a row names a file outside the folder.
    """
    rows = tuple(read_rows(folder / "rows.jsonl"))
    if not rows:
        raise InputNotFoundError(
            f"{folder}: no finished row in rows.jsonl; run `mopcompress bench` into this folder first"
        )
    documents: dict[Cell, DocumentScores] = {}
    for row in rows:
        if row.cell in documents:
            raise DataError(f"{folder / 'rows.jsonl'}: two rows for {row.cell}; remove one of them")
        documents[row.cell] = _read_documents(row, folder)
    _check_same_tokens(rows, documents)
    check_comparable(rows, folder / "rows.jsonl")
    return Run(
        rows=rows,
        manifest=_read_manifest(folder / "run.json"),
        documents=documents,
        sweeps=read_sweeps(folder / "sweeps"),
    )


def _read_manifest(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); restore it, or run the bench in another folder") from error
    if not isinstance(manifest, dict):
        raise DataError(
            f"{path}: a {type(manifest).__name__}, not a map; restore it, or run the bench in another folder"
        )
    return manifest


def _read_documents(row: BenchRow, folder: Path) -> DocumentScores:
    path = folder / row.documents_file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RefusedError(
            f"{folder / 'rows.jsonl'}: documents file {row.documents_file!r} lies outside the run folder"
        )
    try:
        scores = read_documents(path)
    except FileNotFoundError as error:
        raise InputNotFoundError(f"{path}: missing, but rows.jsonl names it; copy the whole run folder") from error
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}: not document scores ({error}); remove its row from rows.jsonl and run again"
        ) from error
    counts = {len(scores.tasks), len(scores.nats), len(scores.scored_tokens), row.documents}
    if scores.written is not None:
        counts |= {len(scores.written.answers), len(scores.written.rouge_l), len(scores.written.exact)}
    if len(counts) > 1 or sum(scores.scored_tokens) != row.scored_tokens:
        raise DataError(
            f"{path}: does not belong to its row ({row.cell}); remove that row from rows.jsonl and run again"
        )
    return scores


def _check_same_tokens(rows: tuple[BenchRow, ...], documents: Mapping[Cell, DocumentScores]) -> None:
    first = documents[rows[0].cell]
    for row in rows[1:]:
        other = documents[row.cell]
        if list(other.tasks) != list(first.tasks) or list(other.scored_tokens) != list(first.scored_tokens):
            raise DataError(
                f"{row.documents_file}: not the test tokens of {rows[0].documents_file}, so ({row.cell}) and "
                f"({rows[0].cell}) cannot be compared; run them again into one new folder"
            )
