"""Reports of a run folder: report.json, report.md and report.html. Reads rows, never torch: it runs on a laptop."""

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
    """Write report.json, report.md and report.html of a bench into its folder, each atomically.

    The same run gives the same bytes. A run that is not finished is reported as far as it is, with its missing cells
    named.

    Args:
        folder: The output folder of `bench`, with `rows.jsonl`, `run.json` and the scores of the documents.

    Returns:
        The paths of the three reports, in that order.

    Raises:
        InputNotFoundError: The folder has no rows, or lacks a file that a row names.
        DataError: The files of the folder contradict each other, or one of them is damaged.
        RefusedError: A row names a file outside the folder.
        StorageError: A report cannot be written.

    Example:
        >>> from pathlib import Path
        >>> import mopcompress
        >>> [path.name for path in mopcompress.write_report(Path("runs/bench"))]
        ['report.json', 'report.md', 'report.html']
    """
    content, numbers = build_content(read_run(folder))
    texts = {
        "report.json": json.dumps(_without_nonfinite(numbers), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": to_markdown(content),
        "report.html": to_html(content),
    }
    return [_write(text, folder / name) for name, text in texts.items()]


def _without_nonfinite(value: Any) -> Any:
    """Replace infinities and NaN by strings, because JSON has no numbers for them."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
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
