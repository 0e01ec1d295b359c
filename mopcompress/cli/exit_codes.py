"""Exit codes: every end of a command is one line on stderr and a code, whatever happened."""

import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import typer

from mopcompress.cli.progress_display import print_error
from mopcompress.errors import MopError, OutOfMemoryError, StoppedError, StorageError

BUG = 1
CLOSED_PIPE = 128 + 13  # as a shell reports any tool whose reader is gone; 13 is SIGPIPE, which Windows lacks
SIGNALS = (signal.SIGINT, signal.SIGTERM)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def exit_cleanly() -> Iterator[None]:
    """Turn every error in the block, and a first Ctrl-C or SIGTERM, into one line and an exit code."""
    with _stoppable():
        try:
            yield
            sys.stdout.flush()
        except typer.Exit:
            raise
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
            raise typer.Exit(CLOSED_PIPE) from None
        except KeyboardInterrupt:
            typer.echo("stopped; run the same command again to resume it", err=True)
            raise typer.Exit(StoppedError.exit_code) from None
        except Exception as error:  # noqa: BLE001 (the last resort: a bug leaves a file behind, never a silent end)
            message, code = _message_and_code(error)
            print_error(message)
            raise typer.Exit(code) from None


def _message_and_code(error: Exception) -> tuple[str, int]:
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MopError):
        return str(error), error.exit_code
    # torch says so by a class or a text of its own, safetensors by a text; neither is imported here
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "t allocate memory" in text:
        advice = "lower --max-length, --num-calibration-samples or run.eval_batch_size, or use a machine with more"
        return f"out of memory ({text or type(error).__name__}); {advice}", OutOfMemoryError.exit_code
    if getattr(error, "errno", None) in FULL or "No space left on device" in text or "File too large" in text:
        return f"writing failed ({text}); free some space and run again", StorageError.exit_code
    name = type(error).__name__
    return f"{name}: {text}; this is a bug, its traceback is in {_crash_file(error)}", BUG


def _crash_file(error: Exception) -> Path | None:
    """Write the traceback, without the values of variables, to this or the temporary folder; return its path."""
    name = f"mopcompress-crash-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}.txt"
    for folder in (Path(), Path(tempfile.gettempdir())):
        try:
            (folder / name).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        except OSError:
            continue
        return (folder / name).absolute()
    return None


@contextmanager
def _stoppable() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first signal, so that scratch folders are removed; exit at once at the second."""

    def exit_now(_number: int, _frame: FrameType | None) -> None:
        os._exit(StoppedError.exit_code)

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in SIGNALS:
            signal.signal(number, exit_now)
        raise KeyboardInterrupt

    handlers = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
