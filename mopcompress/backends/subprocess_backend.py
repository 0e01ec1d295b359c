"""A library in a child process: the Python that runs it, the job that it reads and the answer that it writes.

The job folder holds `job.json` and `tokens.safetensors` before the run, and `weights.safetensors` and `facts.json`
after it. It is also the child's working directory, so files that a library leaves behind are removed with the folder.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from mopcompress.errors import InputNotFoundError, NumericalError, OutOfMemoryError, UnavailableError

LOG = "log.txt"


@dataclass(frozen=True)
class Backend:
    """A library that can replace our own methods."""

    name: str  # of the module and of the package
    worker: str  # the script in this folder that runs in the library's environment
    methods: tuple[str, ...]
    install: str  # the argument of `pip install`
    environment: Mapping[str, str] = field(default_factory=dict)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "llmcompressor",
            "llmcompressor_worker.py",
            ("magnitude", "wanda", "sparsegpt", "gptq"),
            "'llmcompressor==0.14.*'",
        ),
        Backend(
            "gptqmodel",
            "gptqmodel_worker.py",
            ("gptq",),
            "'gptqmodel==7.6.*'",
            {"GPTQMODEL_CPU_WORKERS": "2"},  # it needs two, and on two cores would start a single one
        ),
    )
}


@dataclass(frozen=True)
class Request:
    """A step of a job: a method with our names of its settings, and the linears that it is applied to, by name.

    Linears are in the model's order. `sparsity`, when it is a sequence, has a fraction for each of them.
    """

    method: str
    options: Mapping[str, Any]
    linears: Sequence[str]


@dataclass(frozen=True)
class BackendResult:
    """The answer of a library, as it reports it. `weights` is a file with a tensor for every linear of the job.

    The file also holds `<name>.scales`, [out, groups], for a linear that was quantised.
    """

    weights: Path
    seconds: float  # of compression, without imports, loading and saving
    process_seconds: float
    peak_bytes: int  # resident, of the whole child
    threads: int
    versions: dict[str, str]
    fallbacks: tuple[str, ...]  # linears for which the library's method failed, which only its log mentions


def find_python(backend: Backend, path: str | None) -> Path:
    """Return the interpreter that has the library: the one at `path`, else this one.

    Raises `InputNotFoundError` when `path` does not exist, and `UnavailableError` when the library is not installed.
    """
    if path is None:
        if importlib.util.find_spec(backend.name) is not None:
            return Path(sys.executable)
        raise _not_installed(backend, "is not installed together with mopcompress")
    python = Path(path).expanduser().absolute()  # not resolved: a virtual environment is found by its link
    if not python.is_file():
        raise InputNotFoundError(f"--backend-python: there is no file {python}; name the python of an environment")
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({backend.name!r}) is None)"
    try:
        installed = subprocess.run([python, "-I", "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise UnavailableError(f"--backend-python: {python} does not run ({error.strerror}); name a python") from error
    if not installed:
        raise _not_installed(backend, f"is not installed for {python}")
    return python


def run_backend(
    backend: Backend,
    python: Path,
    folder: Path,
    *,
    model: Path,
    requests: Sequence[Request],
    tokens: Int[Tensor, "samples length"],
) -> BackendResult:
    """Let the library compress linears of the model folder, in a child process; `folder` is an empty job folder.

    Raises `OutOfMemoryError` when the child was killed, `UnavailableError` when it failed, and `NumericalError` when
    its answer is incomplete.
    """
    save_file({"tokens": tokens.cpu().contiguous()}, folder / "tokens.safetensors")
    steps = [asdict(request) for request in requests]
    (folder / "job.json").write_text(json.dumps({"model": str(model.absolute()), "steps": steps}), encoding="utf-8")
    worker = Path(__file__).with_name(backend.worker)
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with (folder / LOG).open("wb") as log:
        code = _wait(
            subprocess.Popen(
                [python, "-I", worker, folder.absolute()],
                cwd=folder,
                env={**os.environ, **offline, **backend.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
    if code == -9:  # SIGKILL, which Windows does not name
        raise OutOfMemoryError(f"{backend.name} was killed, probably for lack of memory; use fewer calibration samples")
    if code != 0:
        raise UnavailableError(f"{backend.name} failed in {python}: {_last_line(folder / LOG)}")
    return _read_answer(backend, folder, time.perf_counter() - start)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait for the child's exit code; when the wait is interrupted, kill the child."""
    try:
        return child.wait()
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        child.wait()


def _read_answer(backend: Backend, folder: Path, process_seconds: float) -> BackendResult:
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        answer = BackendResult(
            weights=folder / "weights.safetensors",
            process_seconds=process_seconds,
            **facts | {"fallbacks": tuple(facts["fallbacks"])},
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise NumericalError(
            f"{backend.name} ended without a complete answer ({error}): {_last_line(folder / LOG)}"
        ) from error
    return answer


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "it printed nothing"


def _not_installed(backend: Backend, where: str) -> UnavailableError:
    return UnavailableError(
        f"backend {backend.name} {where}; make an environment of its own (python -m venv ENV && ENV/bin/pip "
        f"install {backend.install}) and give --backend-python ENV/bin/python"
    )
