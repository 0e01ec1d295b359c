"""From a run folder to report.json, report.md and report.html. Reads rows, never torch: tables redraw on a laptop."""

import json
import math
from pathlib import Path
from typing import Any

from mopcompress.errors import StorageError
from mopcompress.report.content import build_content
from mopcompress.report.render import to_html, to_markdown
from mopcompress.report.run_folder import read_run
from mopcompress.storage.artifacts import write_atomically

__all__ = ["write_report"]


def write_report(folder: Path) -> list[Path]:
    """Write the three reports of the run in `folder` beside its rows, each atomically; returns their paths.

    The same run gives the same bytes. Unfinished runs are reported as far as they are. Raises `InputNotFoundError`,
    `DataError` or `RefusedError` when the run cannot be read and `StorageError` when the reports cannot be written.
    """
    content, numbers = build_content(read_run(folder))
    texts = {
        "report.json": json.dumps(_finite(numbers), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": to_markdown(content),
        "report.html": to_html(content),
    }
    return [_write(text, folder / name) for name, text in texts.items()]


def _finite(value: Any) -> Any:
    """The value with infinities and NaN as strings, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write(text: str, path: Path) -> Path:
    try:
        # a lone surrogate in a task's name has no UTF-8; it is shown as its escape
        write_atomically(path, text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error}); free some space or report on a writable copy"
        ) from error
    return path
